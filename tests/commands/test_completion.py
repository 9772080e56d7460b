"""What the shells are told, asked as they ask: by the scripts themselves, in each shell that is here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorabench.cli import COMMANDS, main
from lorabench.commands.completion import BETWEEN, SCRIPTS

RUNS = ["lora-8658ba9b86bb", "lora-db22e2484d93"]
STORE = Path(__file__).parents[1] / "fixtures" / "store"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs and the sweep of a store, as the default results folder."""
    monkeypatch.chdir(tmp_path)
    for run in RUNS:
        (tmp_path / "results" / "runs" / run).mkdir(parents=True)
    (tmp_path / "results" / "runs" / ".corrupt").mkdir()
    (tmp_path / "results" / "ranks").mkdir()
    (tmp_path / "results" / "ranks" / "sweep.toml").touch()
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("co", ["compare", "convert", "compress", "completion"]),
        ("--v", ["--version"]),
        ("logs lora-d", RUNS[1:]),
        ("logs --results results ", RUNS),
        ("logs --results ", []),
        ("compare lora-8658ba9b86bb ", RUNS),
        ("merge lora-8658ba9b86bb lora-db22e2484d93 lora-8", RUNS[:1]),
        ("cancel ", ["ranks", *RUNS]),
        ("status ra", ["ranks"]),
        ("list lor", ["lora", "lora_fa"]),
        ("export results --to te", ["tensorboard"]),
        ("run --sharding ", ["auto", "ddp", "fsdp"]),
        ("status --", ["--help", "--results", "--watch", "--verify", "--all", "--json"]),
        ("logs --results none ", []),
        ("plan ", []),
        ("nothing ", []),
    ],
)
def test_words_are_completed(line: str, wanted: list[str], results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", f"--complete={line.replace(' ', BETWEEN)}"]) == 0
    assert capsys.readouterr().out.splitlines() == wanted


def test_every_command_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "--complete="]) == 0
    assert capsys.readouterr().out.splitlines() == [*COMMANDS, "--help", "--version"]
    with pytest.raises(SystemExit) as stop:
        main(["completion"])
    assert stop.value.code == 2 and "required: shell (bash, zsh, fish)" in capsys.readouterr().err


ASKED = {
    "bash": 'source "$0"; COMP_WORDS=(lorabench logs --results results lora-d); COMP_CWORD=4; _lorabench;'
    ' echo "${COMPREPLY[@]}"; COMP_WORDS=(lorabench logs --results results ""); _lorabench; echo "${COMPREPLY[@]}"',
    "zsh": 'compdef() { : }; compadd() { shift; echo "$@" }; source "$0";'
    " words=(lorabench logs --results results lora-d); CURRENT=5; _lorabench;"
    ' words=(lorabench logs --results results ""); _lorabench',
    "fish": 'source $argv[1]; complete -C "lorabench logs --results results lora-d";'
    ' complete -C "lorabench logs --results results lora-" | string join " "',
}
"""Each shell is asked for what begins with `lora-d`, and then for all."""


@pytest.mark.parametrize("shell", SCRIPTS)
def test_the_scripts_work_in_their_shells(shell: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    assert main(["completion", shell]) == 0
    script = results.parent / "script"
    script.write_text(capsys.readouterr().out)
    command = results.parent / "bin" / "lorabench"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lorabench "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(STORE.parents[2]), "HOME": str(results)
    }  # fmt: skip
    call = [shell, "-c", ASKED[shell], str(script)]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.splitlines() == [RUNS[1], " ".join(RUNS)], done.stderr
