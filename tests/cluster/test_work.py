"""The job's side: why a job was told to stop, and what follows; and whole jobs of this machine."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from lorabench.cli import main
from lorabench.cluster import job, local, slurm, work
from lorabench.cluster.profile import Profile
from lorabench.cluster.queue import read_submission, read_submissions
from lorabench.cluster.work import TIMEOUTS, Interruption
from lorabench.config.decode import InputError
from lorabench.launch.pool import Outcome
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import read_sweep
from lorabench.store.claim import take
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests import fake_runs
from tests.fake_slurm import FakeSlurm, submitted
from tests.fake_slurm import slurm_commands as slurm_commands

PROFILE = Profile(gpus=0, minutes=60, signal_seconds=90, max_timeouts=1)


def stopped(store: Store, spec: RunSpec, number: int, status: Status = Status.CANCELLED) -> Outcome:
    """A launch that a signal has stopped while it computed this run."""
    store.write_spec(spec)
    hold = take(store.folder(spec.id))
    assert hold
    with hold:
        store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=status))
    return Outcome(states=[store.state(spec.id)], signal=number, stopped=(spec.id,))


def details(seconds_left: float, **changes: str) -> str:
    """As `scontrol show job` has it: see the real one's answers in slurm/README.md."""
    end = (datetime.now() + timedelta(seconds=seconds_left)).isoformat(timespec="seconds")
    table = {"JobState": "RUNNING", "Reason": "None", "EndTime": end, "PreemptTime": "None"} | changes
    return " ".join(f"{key}={value}" for key, value in table.items())


def ending(store: Store, profile: Profile = PROFILE, age: float = 1000) -> Interruption:
    return Interruption(store=store, profile=profile, job_id="7", began=time.time() - age)


USR2, TERM = signal.SIGUSR2, signal.SIGTERM
NOW = "2026-11-24T14:00:00"


@pytest.mark.parametrize(
    ("number", "left", "changes", "again", "counted"),
    [
        (USR2, 90, {}, True, 1),  # the time limit, on time
        (USR2, 150, {}, True, 1),  # and a minute early
        (USR2, 1800, {}, True, 0),  # somebody's scancel --signal=USR2
        (USR2, 20, {"PreemptTime": NOW}, True, 0),  # preempted: EndTime is the grace's
        (TERM, 20, {"PreemptTime": NOW}, True, 0),  # the same, on a cluster that sends no USR2
        (TERM, 0, {"JobState": "COMPLETING"}, False, 0),  # cancelled; or SLURM queues it again itself
        (TERM, 1800, {}, False, 0),
        (USR2, 90, {"JobState": "COMPLETING"}, False, 0),  # cancelled while it wrote its checkpoints
        (USR2, 0, {"JobState": "COMPLETING", "Reason": "TimeLimit"}, True, 1),  # they took too long
    ],
)
def test_why_a_job_was_told_to_stop_decides_what_follows(
    number: int, left: float, changes: dict[str, str], again: bool, counted: int,
    tmp_path: Path, slurm_commands: FakeSlurm,
) -> None:  # fmt: skip
    store, (spec,) = Store(tmp_path / "r"), fake_runs.sweep(0).runs
    outcome = stopped(store, spec, number)
    slurm_commands.answer("scontrol", details(left, **changes))
    assert ending(store).is_to_be_queued_again(outcome) == again
    file = store.folder(spec.id) / TIMEOUTS
    assert (json.loads(file.read_text())["count"] if file.exists() else 0) == counted


def test_without_scontrol_the_jobs_own_clock_tells_a_time_out(tmp_path: Path, slurm_commands: FakeSlurm) -> None:
    store, (spec,) = Store(tmp_path / "r"), fake_runs.sweep(0).runs
    slurm_commands.answer("scontrol", err="Unable to contact slurm controller", code=1)
    ending(store, age=1800).is_to_be_queued_again(stopped(store, spec, USR2))
    assert not (store.folder(spec.id) / TIMEOUTS).exists()
    ending(store, age=3500).is_to_be_queued_again(stopped(store, spec, USR2))
    assert (store.folder(spec.id) / TIMEOUTS).exists()


def test_one_time_out_too_many_is_the_runs_status_and_other_runs_go_on(
    tmp_path: Path, slurm_commands: FakeSlurm
) -> None:
    store, (spec, other) = Store(tmp_path / "r"), fake_runs.sweep(0, 1).runs
    slurm_commands.answer("scontrol", details(90))
    assert ending(store).is_to_be_queued_again(stopped(store, spec, USR2))  # the first of max_timeouts = 1
    outcome = stopped(store, spec, USR2)
    assert not ending(store).is_to_be_queued_again(outcome)  # nothing is left
    state = store.state(spec.id)
    assert (state.status, state.error) == (
        Status.TIMEOUT, "stopped by the time limit of 60 min, 2 times; --retry timeout resumes it",
    )  # fmt: skip
    both = Outcome(states=[*outcome.states, store.state(other.id, other)], signal=USR2, stopped=())
    assert ending(store).is_to_be_queued_again(both)


def test_a_run_that_ended_meanwhile_or_was_cancelled_is_no_time_out(tmp_path: Path, slurm_commands: FakeSlurm) -> None:
    store, (spec, other) = Store(tmp_path / "r"), fake_runs.sweep(0, 1).runs
    slurm_commands.answer("scontrol", details(90))
    assert not ending(store).is_to_be_queued_again(stopped(store, spec, USR2, Status.DONE))
    outcome = stopped(store, other, USR2)
    store.cancel_marker(other.id).write_text("")
    assert not ending(store).is_to_be_queued_again(outcome)
    assert not list(store.root.rglob(TIMEOUTS))


def test_a_job_that_cannot_learn_why_it_is_ended_waits_for_it(
    tmp_path: Path, slurm_commands: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (spec,) = Store(tmp_path / "r"), fake_runs.sweep(0).runs
    slurm_commands.answer("scontrol", details(90) + "\n" + details(90))  # as of a whole array: not of this job
    monkeypatch.setattr(work, "LINGER_SECONDS", 0.5)
    began = time.monotonic()
    assert not ending(store).is_to_be_queued_again(stopped(store, spec, TERM))
    assert time.monotonic() - began >= 0.5


def test_a_damaged_count_of_time_outs_keeps_no_job_from_being_queued_again(
    tmp_path: Path, slurm_commands: FakeSlurm
) -> None:
    store, (spec,) = Store(tmp_path / "r"), fake_runs.sweep(0).runs
    slurm_commands.answer("scontrol", details(90))
    outcome = stopped(store, spec, USR2)
    for damaged in ("{", '{"count": "x"}', '{"count": -1}', "[" * 10**5):
        (store.folder(spec.id) / TIMEOUTS).write_text(damaged)
        assert ending(store).is_to_be_queued_again(outcome)
        assert json.loads((store.folder(spec.id) / TIMEOUTS).read_text()) == {"count": 1}


def test_an_older_version_s_pickled_job_says_that_it_is_to_be_submitted_again() -> None:
    pickled = pickle.dumps(work.Work)[:-1] + b")\x81}\x8c\x04rootK\x01sb."  # an object of that class, with a field
    with pytest.raises(InputError, match="submit again to resume"):
        pickle.loads(pickled)


@pytest.mark.parametrize(("answers", "code"), [((0,), 144), ((1, 0), 144), ((1, 1, 1, 1), None)])
def test_a_job_is_queued_again_by_scontrol_which_may_be_busy(
    answers: tuple[int, ...], code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def requeue(job_id: str) -> None:
        asked.append(job_id)
        if answers[len(asked) - 1]:
            raise slurm.Unreachable("scontrol: busy")

    monkeypatch.setattr(slurm, "requeue", requeue)
    monkeypatch.setattr(job, "REQUEUE_SECONDS", 0.0)
    folder = submitted(tmp_path, [list(fake_runs.sweep(0).runs)], ["5"])
    with pytest.raises(SystemExit) as ended:
        job.queue_again(read_submission(folder), PROFILE, "5_0")  # type: ignore[arg-type]
    assert asked == ["5_0"] * len(answers)
    assert ended.value.code == (code or "scontrol: busy; submit again to resume")


def test_a_profile_without_requeue_leaves_the_job_ended(tmp_path: Path, slurm_commands: FakeSlurm) -> None:
    store, (spec,) = Store(tmp_path / "r"), fake_runs.sweep(0).runs
    slurm_commands.answer("scontrol", details(90))
    profile = Profile(gpus=0, requeue=False)
    assert not ending(store, profile).is_to_be_queued_again(stopped(store, spec, USR2))


SWEEP = """
[base]
model = "builtin:tiny-llama"
task = {name = "text", data = "builtin:python-code", max_train = 16, max_eval = 4}
method = {name = "lora", rank = 2}
seq_len = 32
batch_size = 2
serving = false
"""
LOCAL = """
kind = "local"
gpus = 0
parallel = 2
minutes = 30
signal_seconds = 60
setup = ["export LORABENCH_TEST_SETUP=1"]
environment = {OMP_NUM_THREADS = "1"}
"""


def command(*arguments: str, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lorabench", *arguments], capture_output=True, text=True, timeout=240, **options
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition: object, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.2)


def numbers(record: RunRecord) -> tuple[dict[str, str], dict[str, float]]:
    """What must not depend on where a run was computed."""
    timed = ("seconds", "gib", "per_second", "utilization", "joules")
    return record.files, {k: v for k, v in record.measures.items() if not any(t in k for t in timed)}


FEW, LONG = "steps = 6\nseed = [0, 1, 2]\n", "steps = 200\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`few.toml`, `long.toml`, a profile, and in `here` what `run` has computed of both."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "local.toml").write_text(LOCAL)
    for name, runs in {"few": FEW, "long": LONG, "all": f"[[grid]]\n{FEW}[[grid]]\n{LONG}"}.items():
        (folder / f"{name}.toml").write_text(SWEEP + runs)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    run = ["run", str(folder / "all.toml"), "--results", str(folder / "here"), "--workers", "1", "--pack", "off"]
    command(*run, env=one_thread)
    return folder


def submit(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What it says, called in this process."""
    assert main(["submit", *arguments]) == 0
    return capsys.readouterr().out


def test_local_jobs_outlive_the_command_and_compute_what_run_computes(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, there, here = files / "few.toml", files / "there", files / "here"
    runs = read_sweep(sweep).runs
    alone = ["--pack", "off"]  # the jobs have two of them and one, and their packs other bits than that of all three
    order = [str(sweep), "--cluster", str(files / "local.toml"), "--results", str(there), *alone]
    assert "3 runs: 3 to submit" in command("submit", *order)
    assert "to submit" not in submit(capsys, *order)
    wait_for(lambda: all(state.status == Status.DONE for state in Store(there).states(list(runs))))
    for spec in runs:
        record, expected = Store(there).read(spec.id), Store(here).read(spec.id)
        assert record and expected and numbers(record) == numbers(expected)
        assert record.attempts == 1
    (submission,) = read_submissions(there)
    assert [len(job) for job in submission.jobs] == [2, 1]
    for job_id in submission.job_ids:
        assert job_id
        wait_for(lambda id=job_id: not local.is_alive(id, submission.submitit))


def test_a_local_job_that_is_cancelled_leaves_a_checkpoint_and_is_submitted_again(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = files / "long.toml"
    (spec,) = read_sweep(sweep).runs
    there, here = Store(files / "again"), Store(files / "here")
    order = [str(sweep), "--cluster", str(files / "local.toml"), "--results", str(there.root)]
    submit(capsys, *order)
    wait_for(lambda: ((there.state(spec.id, spec).claim or no_claim).progress.get("step") or 0) >= 10)
    (submission,) = read_submissions(there.root)
    (job_id,) = submission.job_ids
    assert job_id and there.state(spec.id).claim.progress["job"] == job_id  # type: ignore[union-attr]
    local.cancel(job_id, submission.submitit)
    wait_for(lambda: not local.is_alive(job_id, submission.submitit))
    assert there.state(spec.id).status == Status.CANCELLED
    submit(capsys, *order)
    wait_for(lambda: there.state(spec.id).status == Status.DONE)
    record, expected = there.read(spec.id), here.read(spec.id)
    assert record and expected and numbers(record) == numbers(expected)
    assert record.resumed_from_step and record.attempts == 2


class no_claim:
    progress: dict[str, int] = {}
