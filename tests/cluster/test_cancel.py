"""Cancelling: jobs that hold nothing else, single runs of the others, and what runs writes its checkpoint."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorabench.cli import main
from lorabench.cluster import local
from lorabench.cluster.queue import read_submissions
from lorabench.cluster.run_states import standings
from lorabench.config.durable import write_bytes
from lorabench.spec.sweep import read_sweep
from lorabench.store.claim import take
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
from tests import fake_runs
from tests.conftest import make_spec
from tests.fake_slurm import NAME, FakeSlurm, submitted
from tests.fake_slurm import slurm_commands as slurm_commands

OURS = f"lorabench:{NAME}"
SPECS = list(fake_runs.sweep(*range(12)).runs)
SWEEP = """
[base]
model = "builtin:tiny-llama"
method.name = "lora"
task.name = "text"
task.data = "builtin:python-code"
seed = [0, 1, 2, 3, 4, 5]
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Twelve runs in three jobs; the sweep `half` declares the first six, the submission is of `grid`."""
    store = Store(tmp_path / "results")
    write_bytes(store.root / "half" / "sweep.toml", SWEEP.encode())
    submitted(store.root, [SPECS[:4], SPECS[4:8], SPECS[8:]], ["5"])
    return store


def cancel(store: Store, *what: str) -> int:
    return main(["cancel", *what, "--results", str(store.root)])


def scancels(slurm_commands: FakeSlurm) -> list[str]:
    return [call for call in slurm_commands.calls if call.startswith("scancel")]


def test_a_sweep_s_own_jobs_are_cancelled_and_of_the_others_its_runs(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm_commands.queue({"5_0": "PENDING", "5_1": "RUNNING", "5_2": "PENDING"}, OURS)
    with take(store.folder(SPECS[4].id), {"job": "5_1"}), take(store.folder(SPECS[6].id), {"job": "5_1"}):
        assert cancel(store, "half", "--dry-run") == 0
        assert scancels(slurm_commands) == [] and not store.cancel_marker(SPECS[4].id).exists()
        dry = capsys.readouterr()
        assert cancel(store, "half") == 0
        out, err = capsys.readouterr()
    assert out == dry.out and "would cancel" in dry.err
    assert scancels(slurm_commands) == ["scancel 5_[0]"]
    lines = out.splitlines()
    assert set(lines[0].split()) == {"job", "5_0", *(spec.id for spec in SPECS[:4])}
    assert {line.split()[1] for line in lines[1:]} == {SPECS[4].id, SPECS[5].id}
    assert all("its job holds 2 runs that go on" in line for line in lines[1:])
    assert "cancelled 1 job with 4 runs and 2 runs without their jobs" in err
    assert [store.cancel_marker(spec.id).exists() for spec in SPECS] == [False] * 4 + [True] * 2 + [False] * 6
    slurm_commands.queue({"5_1": "RUNNING", "5_2": "PENDING"}, OURS)
    found = [standing.status for standing in standings(store, SPECS)]
    assert found == ["cancelled"] * 6 + ["pending"] * 6


def test_the_name_of_what_was_submitted_means_all_of_it(store: Store, slurm_commands: FakeSlurm) -> None:
    slurm_commands.queue({"5_0": "PENDING", "5_1": "RUNNING", "5_2": "PENDING"}, OURS)
    with take(store.folder(SPECS[4].id), {"job": "5_1"}):
        assert cancel(store, "grid") == 0
    assert scancels(slurm_commands) == ["scancel 5_[0-2]"]
    assert store.cancel_marker(SPECS[4].id).exists()  # it is running: its job can tell why it was told to stop


def test_a_job_whose_other_runs_are_settled_is_cancelled_for_its_last_run(
    store: Store, slurm_commands: FakeSlurm
) -> None:
    slurm_commands.queue({"5_2": "RUNNING"}, OURS)
    from lorabench.store.record import RunRecord

    for spec in SPECS[8:11]:
        store.write_spec(spec)
        store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE))
    assert cancel(store, SPECS[11].id) == 0
    assert scancels(slurm_commands) == ["scancel 5_[2]"]


def test_nothing_to_cancel_is_said_so(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cancel(store, "half") == 0
    out, err = capsys.readouterr()
    assert out == "" and "half: nothing to cancel: 6 lost" in err and scancels(slurm_commands) == []


def test_an_unknown_name_gets_the_closest_sweep_but_never_another_run(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    near = SPECS[0].id[:-1] + ("0" if SPECS[0].id[-1] != "0" else "1")
    assert cancel(store, near) == 2
    assert f"no such run or sweep in {store.root}. `lorabench status" in capsys.readouterr().err
    assert cancel(store, "hlaf") == 2
    assert "SWEEP|RUN = hlaf: " in (err := capsys.readouterr().err) and "Did you mean 'half'?" in err


def test_a_run_that_has_not_begun_is_said_so(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bytes(store.root / "more" / "sweep.toml", SWEEP.replace("[0, 1, 2, 3, 4, 5]", "[77, 78]").encode())
    new = read_sweep(store.root / "more" / "sweep.toml").runs[0].id
    assert cancel(store, new) == 0
    assert f"{new}: nothing to cancel: it has not begun" in capsys.readouterr().err
    assert cancel(store, "more") == 0
    assert "more: nothing to cancel: 2 not begun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("comment", "user", "why"),
    [
        ("", None, "job 5_0 does not say that it is lorabench's"),
        ("a site's plug-in", None, "job 5_0 does not say that it is lorabench's"),
        (OURS, "somebody", "its job cannot be reached from here"),
        ("lorabench:20261125T000000-other-ffff", None, "its job cannot be reached from here"),
    ],
)
def test_a_job_that_is_not_known_to_be_ours_is_never_cancelled(
    comment: str, user: str | None, why: str, store: Store, slurm_commands: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As where SLURM was set up anew and counts from one, or somebody wrote the number of another job of mine."""
    slurm_commands.queue({"5_0": "RUNNING"}, comment, user)
    with take(store.folder(SPECS[0].id), {"job": "5_0"}):
        assert cancel(store, "half") == 0
    assert f"run {SPECS[0].id}  ({why})" in capsys.readouterr().out
    assert scancels(slurm_commands) == [] and store.cancel_marker(SPECS[0].id).exists()


def test_another_s_job_is_left_to_him(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(store.root, [SPECS[:2]], ["7"], user="somebody", name="20261124T150000-grid-ffff")
    slurm_commands.queue({"7": "PENDING"}, "lorabench:20261124T150000-grid-ffff", "somebody")
    assert cancel(store, SPECS[0].id) == 0
    assert "(its job is somebody's)" in capsys.readouterr().out and scancels(slurm_commands) == []


def test_where_slurm_does_not_answer_the_runs_are_marked(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm_commands.queue({"5_0": "RUNNING"}, OURS)
    slurm_commands.answer("scancel", err="scancel: error: Unable to contact slurm controller", code=1)
    with take(store.folder(SPECS[0].id), {"job": "5_0"}):
        assert cancel(store, "half") == 2
    assert "Unable to contact slurm controller" in capsys.readouterr().err
    assert store.cancel_marker(SPECS[0].id).exists()


def test_a_run_ends_at_its_next_step_and_goes_on_from_there(tmp_path: Path) -> None:
    """As `lorabench cancel` does: no signal, only the marker; the same numbers in the end."""
    from lorabench.training import stop

    spec, store, other = make_spec(), Store(tmp_path / "a"), Store(tmp_path / "b")
    write_bytes(store.cancel_marker(spec.id), b"")
    assert execute(spec, store, Options(device="cpu")) == Status.CANCELLED
    assert store.read(spec.id).error == "stopped by lorabench cancel; run again to resume"
    store.cancel_marker(spec.id).unlink()
    assert execute(spec, store, Options(device="cpu")) == execute(spec, other, Options(device="cpu")) == Status.DONE
    losses = [s.read(spec.id).measures["valid_loss"] for s in (store, other)]
    assert losses[0] == losses[1] and stop.MARKER_SECONDS < 10


def test_run_takes_the_marks_of_its_runs_away(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of it begins; the marks of other runs stay."""
    from lorabench.launch import pool

    marked = [SPECS[0], SPECS[7]]
    for spec in marked:
        write_bytes(store.cancel_marker(spec.id), b"")
    seen: list[list[bool]] = []

    def fake(*_: object, begin: Callable[[], object]) -> pool.Outcome:
        begin()
        seen.append([store.cancel_marker(spec.id).exists() for spec in marked])
        return pool.Outcome(states=[])

    monkeypatch.setattr(pool, "launch", fake)
    (tmp_path / "half.toml").write_text(SWEEP)
    assert main(["run", str(tmp_path / "half.toml"), "--results", str(store.root), "--device", "cpu"]) == 0
    assert seen == [[False, True]]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"),
        (
            "scancel",
            "scancel: error: Kill job error on job id 5_[0]: Unable to contact slurm controller (connect failure)",
        ),
    ],
)
def test_a_controller_that_is_down_is_one_message(
    command: str, said: str, store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a real one has said it, before the look or after it; nothing then says that anything was cancelled."""
    slurm_commands.queue({"5_0": "PENDING", "5_1": "RUNNING", "5_2": "PENDING"}, OURS)
    slurm_commands.answer(command, err=f"{said}\n", code=1)
    assert cancel(store, "half") == 2
    out, err = capsys.readouterr()
    told = said.removeprefix("scancel: error: ")
    assert (out, err) == ("", f"lorabench: error: {command}: {told}\n")
    (submission,) = read_submissions(store.root)
    assert not submission.cancelled


LOCAL_JOB = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[-1] + "/told", "w").close(), sys.exit()))
open(sys.argv[-1] + "/ready", "w").close()
for _ in range(600):  # one long sleep would not see a signal that comes just before it begins
    time.sleep(0.1)
"""


@pytest.mark.parametrize("in_shell", [False, True], ids=["process", "set-up lines"])
def test_a_local_job_is_told_to_stop(in_shell: bool, tmp_path: Path) -> None:
    folder = tmp_path / "submitit"
    folder.mkdir()
    command = [sys.executable, "-c", LOCAL_JOB, "submitit.local._local", str(folder)]
    if in_shell:
        import shlex

        command = ["/bin/sh", "-c", f"true && {shlex.join(command)}"]
    job = subprocess.Popen(command)
    try:
        while not (folder / "ready").exists():
            time.sleep(0.01)
        assert local.is_alive(str(job.pid), folder) and not local.is_alive(str(job.pid), tmp_path / "other")
        local.cancel(str(job.pid), tmp_path / "other")
        local.cancel(str(job.pid), folder)
        job.wait(timeout=10)
        assert (folder / "told").exists()
    finally:
        if job.poll() is None:
            os.kill(job.pid, signal.SIGKILL)
            job.wait()
