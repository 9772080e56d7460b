"""What the commands share: where the runs are, which sweep is meant, and runs by their ids."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from lorabench.cli import main, make_parser
from lorabench.commands._arguments import settle_place
from lorabench.config.decode import InputError
from tests.conftest import BASE

STORE = Path(__file__).parents[1] / "fixtures" / "store"
RUN, OTHER = "lora-8658ba9b86bb", "lora-db22e2484d93"


def place(*argv: str) -> tuple[str, str | None]:
    arguments: argparse.Namespace = make_parser().parse_args(argv)
    settle_place(arguments)
    return str(arguments.results), arguments.sweep


@pytest.mark.parametrize("command", ["analyze", "report", "status", "export --to csv"])
def test_results_are_told_by_a_flag_or_first(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "ranks").mkdir(parents=True)
    (tmp_path / "results" / "ranks" / "sweep.toml").touch()
    (tmp_path / "a.toml").touch()
    words = command.split()
    assert place(*words) == ("results", None)
    assert place(*words, "other") == ("other", None) == place(*words, "--results", "other")
    assert place(*words, "other", "ranks") == ("other", "ranks") == place(*words, "ranks", "--results", "other")
    assert place(*words, "ranks") == ("results", "ranks")
    assert place(*words, "a.toml") == ("results", "a.toml")
    (tmp_path / "ranks").mkdir()
    assert place(*words, "ranks") == ("ranks", None)  # a folder there is what it says
    with pytest.raises(InputError, match="--results other: RESULTS = results stands there too"):
        place(*words, "results", "ranks", "--results", "other")


def test_a_run_is_called_by_its_id_wherever_an_adapter_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def called(*argv: str) -> str:
        assert main([*argv, "--json"]) == 0
        return capsys.readouterr().out

    results = ["--results", str(STORE)]
    by_id = json.loads(called("inspect", RUN[:8], *results))
    assert by_id == json.loads(called("inspect", str(STORE / "runs" / RUN)))
    a, b = (
        json.loads(called("compare", RUN, OTHER, *results)),
        json.loads(called("compare", *(str(STORE / "runs" / run) for run in (RUN, OTHER)))),
    )
    assert a == b
    assert main(["convert", OTHER, str(tmp_path / "peft"), *results]) == 0
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    capsys.readouterr()
    for command in (["inspect", "lora-"], ["convert", "lora-", str(tmp_path / "new")], ["compare", "lora-", RUN]):
        assert main([*command, *results]) == 2
        assert "RUN = lora-: begins 2 runs" in capsys.readouterr().err
    assert main(["inspect", "lorra-1", *results]) == 2
    assert "lorra-1: no such file or folder" in capsys.readouterr().err


def test_a_run_that_is_not_done_has_no_adapter_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(STORE, tmp_path / "store")
    (tmp_path / "store" / "runs" / RUN / "record.json").unlink()
    assert main(["inspect", RUN, "--results", str(tmp_path / "store")]) == 2
    assert f"ADAPTER = {RUN}: is missing, not done" in capsys.readouterr().err


def test_a_run_that_has_not_begun_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lorabench.spec.sweep import read_sweep

    file = tmp_path / "results" / "few" / "sweep.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'{BASE}method.name = "lora"\n')
    (run,) = read_sweep(file).runs
    for given in (run.id, run.id[:10]):
        assert main(["cancel", given, "--results", str(tmp_path / "results")]) == 0
        assert f"{given}: nothing to cancel: it has not begun" in capsys.readouterr().err


def test_a_misspelt_choice_gets_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, close in ((["exprt"], "export"), (["export", "--to", "tensorbord"], "tensorboard")):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert (
            stop.value.code == 2 and f"unknown choice '{argv[-1]}'. Did you mean '{close}'?" in capsys.readouterr().err
        )


def test_an_unknown_flag_is_told_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["status", "--verfy"])
    assert stop.value.code == 2
    assert "lorabench status: error: unrecognized arguments: --verfy; see lorabench status --help" in (
        capsys.readouterr().err
    )
