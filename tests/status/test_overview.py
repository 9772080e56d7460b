"""What `lorabench status` prints and watches, of few runs and of many, beside what the store and the queue hold."""

import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorabench.cli import main
from lorabench.spec.sweep import read_sweep
from lorabench.store.claim import take
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests import fake_runs
from tests.conftest import BASE, TOY
from tests.fake_slurm import FakeSlurm, record, submitted
from tests.fake_slurm import slurm_commands as slurm_commands

SPECS = list(fake_runs.sweep(*range(100)).runs)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def status(store: Store, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["status", str(store.root), *arguments]) == 0
    return capsys.readouterr().out


def rows(store: Store, capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    return {row["run_id"]: row for row in json.loads(status(store, capsys, "--json"))["runs"]}


def test_a_run_shows_its_job_its_pace_and_its_log(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted(store.root, [[spec] for spec in SPECS[:4]], ["5"])
    (folder / "submitit").mkdir()
    (folder / "submitit" / "5_3_0_log.out").write_text("submitit INFO\n")
    (folder / "submitit" / "5_3_0_log.err").write_text("module: command not found\n")
    slurm_commands.queue({"5_0": "PENDING Priority", "5_1": "RUNNING", "5_3": "FAILED NonZeroExitCode"})
    slurm_commands.no_accounting()
    record(store, SPECS[2], Status.FAILED, error="ValueError: no")
    (store.folder(SPECS[2].id) / "log.txt").write_text("\n".join(f"line {n}" for n in range(99)) + "\nValueError: no\n")
    progress = {"job": "5_1", "step": 50, "steps": 200, "step_seconds_median": 0.5, "tokens_per_second": 90.0}
    with take(store.folder(SPECS[1].id), progress):
        found = rows(store, capsys)
        text = status(store, capsys)
    waits, runs, failed, lost = (found[spec.id] for spec in SPECS[:4])
    assert waits["status"] == "pending" and waits["queue"]["reason"] == "Priority"
    assert waits["queue"]["job_id"] == "5_0" and waits["queue"]["submission"] == folder.name
    assert runs["eta_seconds"] == 75.0 and runs["queue"]["state"] == "RUNNING"
    assert failed["last_lines"] == ["line 95", "line 96", "line 97", "line 98", "ValueError: no"]
    assert lost["status"] == "lost" and lost["last_lines"] == ["module: command not found"]
    assert waits["eta_seconds"] is None and waits["last_lines"] == runs["last_lines"] == []
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert "1 min 15 s" in lines[SPECS[1].id] and "Priority" in lines[SPECS[0].id]
    assert f"{SPECS[2].id}:\n    line 95\n" in text and f"{SPECS[3].id}:\n    module: command not found" in text
    assert "waiting: 1 Priority" in text
    assert sorted(text.splitlines()[-1].split(", ")) == ["1 failed", "1 lost", "1 pending", "1 running"]


def test_of_many_runs_those_that_need_a_look_are_listed(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store.root, [[spec] for spec in SPECS], ["5"])
    slurm_commands.queue({f"5_{n}": "PENDING Priority" if n < 99 else "PENDING Dependency" for n in range(62, 100)})
    for spec in SPECS[:60]:
        record(store, spec, Status.DONE, measures={"total_seconds": 100.0})
    record(store, SPECS[60], Status.OOM, error="CUDA out of memory")
    with take(store.folder(SPECS[61].id), {"job": "5_61"}):
        few, every = status(store, capsys), status(store, capsys, "--all")
    listed = [line.split()[0] for line in few.splitlines() if line.startswith("lora-")]
    assert set(listed) == {SPECS[60].id, SPECS[61].id}
    assert "waiting: 37 Priority, 1 Dependency" in few
    assert few.splitlines()[-1].split(", ") and "60 done" in few.splitlines()[-1]
    assert "about 1 h 04 min left" in few  # 38 wait behind one that runs, 100 s each, and half of that one
    assert sum(line.startswith("lora-") for line in every.splitlines()) == 100


def test_many_runs_are_counted_by_setting(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank, learning rate and seed are swept: 200 settings would be too many, so learning rates are put together."""
    from lorabench.spec.sweep import parse_sweep

    table = TOY | {"method": {"name": "lora", "rank": [16, 2]}, "seed": [0, 1]}
    sweep = parse_sweep({"base": table | {"lr": [1e-5 * n for n in range(1, 31)]}}, default_name="grid")
    for spec in sweep.runs:
        record(store, spec, Status.DONE if spec.method.rank == 2 or spec.seed else Status.DIVERGED)
    text = status(store, capsys)
    head = [line.split() for line in text.splitlines()[:3]]
    assert head == [["method.rank", "done", "diverged"], ["2", "60", "-"], ["16", "30", "30"]]


def test_a_line_of_a_setting_names_its_method(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels leave the name out, as an id begins with it; and it is never left out for having the most values."""
    from lorabench.spec.sweep import parse_sweep

    names = ["lora", "loha", "oft", "full", "head", "prompt", "prefix"]
    base = TOY | {"seq_len": [32, 64, 128], "warmup": [0.0, 0.1, 0.2]}
    for spec in parse_sweep({"base": base, "grid": [{"method": {"name": name}} for name in names]}, "grid").runs:
        record(store, spec, Status.DONE)
    head, *lines = [line.split() for line in status(store, capsys).splitlines()[:-1] if line]
    assert head[0] == "method.name" and {line[0] for line in lines} == {*names}


def test_a_sweep_is_shown_with_what_is_missing_of_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f'{BASE}method.name = "lora"\nseed = [0, 1, 2]\n'
    (tmp_path / "small.toml").write_text(text)
    record(store, SPECS[0], Status.DONE)
    record(store, SPECS[50], Status.DONE)
    monkeypatch.chdir(tmp_path)
    for arguments in (["results", "small.toml"], ["small.toml"]):
        assert main(["status", *arguments]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "1 done, 2 missing"


def test_a_cluster_that_does_not_answer_is_said_and_the_rest_shown(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store.root, [[SPECS[0]], [SPECS[1]]], ["5"])
    record(store, SPECS[0], Status.DONE)
    slurm_commands.answer("squeue", err="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    assert main(["status", str(store.root)]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Unable to contact slurm controller" in err
    assert "SLURM did not answer" in out and out.splitlines()[-1] in ("1 done, 1 missing", "1 missing, 1 done")


def test_neither_torch_nor_pandas_nor_submitit_is_loaded(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]]], ["5"])
    slurm_commands.queue({"5": "PENDING Priority"})
    program = (
        "import sys; from lorabench.cli import main; main(sys.argv[1:]); "
        "sys.exit(str({'torch', 'pandas', 'submitit', 'pydantic', 'rich'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", program, "status", str(store.root)], capture_output=True, text=True)
    assert done.stderr.strip() == "" and "1 pending" in done.stdout


def live(store: Store, slurm_commands: FakeSlurm, *seen: threading.Event) -> threading.Thread:
    """A run that waits, runs and is done, each for a moment, or until it is seen."""
    moments = [event.wait for event in seen] or [time.sleep] * 2
    submitted(store.root, [[SPECS[0]]], ["5"])
    slurm_commands.queue({"5": "PENDING Priority"})

    def live() -> None:
        moments[0](1.0 if not seen else 60.0)
        with take(store.folder(SPECS[0].id), {"job": "5"}):
            moments[1](1.0 if not seen else 60.0)
            record(store, SPECS[0], Status.DONE)

    thread = threading.Thread(target=live)
    thread.start()
    return thread


def test_watching_prints_changes_and_ends(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store, SPECS[1], Status.DONE)
    thread = live(store, slurm_commands)
    assert main(["status", str(store.root), "--watch", "0.1"]) == 0
    thread.join()
    lines = [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] in ("1 pending, 1 done", "1 done, 1 pending")
    assert lines[1:] == [f"{SPECS[0].id}  pending -> running", f"{SPECS[0].id}  running -> done"]


def test_watching_tells_by_its_exit_code_that_not_all_is_done(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    record(store, SPECS[0], Status.OOM)
    assert main(["status", str(store.root), "--watch", "0.1", "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["status"] == "oom"


def test_watching_draws_anew_in_a_terminal(store: Store, slurm_commands: FakeSlurm) -> None:
    seen = {b"1 pending": threading.Event(), b"1 running": threading.Event()}
    thread = live(store, slurm_commands, *seen.values())
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lorabench", "status", str(store.root), "--watch", "0.2"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
            for words, event in seen.items():
                if words in written:
                    event.set()
    except OSError:  # the other end is closed
        pass
    assert process.wait(timeout=60) == 0
    thread.join()
    os.close(ours)
    text = written.decode()
    assert "1 pending" in text and "1 running" in text and "1 done" in text
    assert "\x1b[1A" in text  # the cursor goes up: the new picture is drawn over the old one


def test_runs_that_nobody_has_begun_are_told_of(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Though no launcher lives that would say so: each sweep that was run is kept in the results."""
    (store.root / "lr").mkdir(parents=True)
    file = store.root / "lr" / "sweep.toml"
    file.write_text(BASE + "lr = [1e-3, 2e-3, 3e-3]\n[[grid]]\nmethod.name = 'lora'\n")
    (store.root / "broken").mkdir()
    (store.root / "broken" / "sweep.toml").write_text("[base]\nmodel = 3\n")
    record(store, read_sweep(file).runs[0], Status.DONE)
    assert json.loads(status(store, capsys, "--json"))["not_begun"] == {"lr": 2}
    assert f"lr: 2 of its runs not begun; `run` or `submit` with {file} begins them" in status(store, capsys)
    named = json.loads(status(store, capsys, "lr", "--json"))
    assert named["not_begun"] == {} and [row["status"] for row in named["runs"]] == ["done", "missing", "missing"]
