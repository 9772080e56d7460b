"""What is submitted, once: against commands of SLURM that are scripts, so that every way to fail can be had."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from lorabench.cluster import slurm, work
from lorabench.cluster.enqueue import only_one
from lorabench.cluster.profile import Profile
from lorabench.cluster.queue import Submission, check_own, read_submissions, user_name
from lorabench.cluster.run_states import standings
from lorabench.cluster.submit import Order, prepare, scripts, send, try_out, warnings
from lorabench.config.decode import InputError
from lorabench.config.digests import file_digests
from lorabench.launch.pool import Pool, launch
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep
from lorabench.store.claim import take
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests import fake_runs
from tests.cluster.fake_sbatch import FakeCluster
from tests.cluster.fake_sbatch import cluster as cluster

PROFILE = Profile(gpus=0, cells_per_job=2, parallel=8)


def order(sweep: Sweep, **changes: object) -> Order:
    profile = replace(PROFILE, **{key: value for key, value in changes.items() if key != "retry"})
    return Order(sweep=sweep, profile=profile, cluster="fake", retry=frozenset(changes.get("retry", ())))


def plan(sweep: Sweep, seconds: float = 1.0) -> dict[str, object]:
    """As `lorabench.launch.plan` makes it, without a model."""
    estimate = {"seconds": seconds, "peak_gib": 0.5, "basis": "similar runs", "updates_bytes": 100.0}
    return {"runs": [{"run_id": spec.id, "estimate": estimate} for spec in sweep.runs]}


def submit(sweep: Sweep, store: Store, **changes: object) -> Submission | None:
    prospect = prepare(order(sweep, **changes), store, plan(sweep))
    return send(prospect, store) if prospect.jobs else None


def end(store: Store, spec: RunSpec, status: Status, updates: bytes = b"") -> None:
    """As a worker leaves a run behind, with a file of updates if there are any."""
    store.write_spec(spec)
    hold = take(store.folder(spec.id))
    assert hold
    folder = store.folder(spec.id)
    if updates:
        (folder / "updates").mkdir()
        (folder / "updates" / "delta.safetensors").write_bytes(updates)
    files = file_digests(folder / "updates", folder)
    with hold:
        store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=status, error="it did", files=files))


def queued(cluster: FakeCluster, *submissions: Submission | None, state: str = "PENDING") -> None:
    """squeue knows all jobs of these submissions."""
    known = [submission for submission in submissions if submission]
    cluster.queue({str(id): state for submission in known for id in submission.job_ids if id})


def test_the_scripts_of_a_dry_run_are_what_sbatch_is_given(cluster: FakeCluster, tmp_path: Path) -> None:
    store = Store(tmp_path / "my results")
    one = order(fake_runs.sweep(*range(5)), cells_per_job=1, max_array=2, setup=["module load x"])
    prospect = prepare(one, store, plan(one.sweep))
    told = scripts(prospect, store.root)
    assert cluster.scripts == []
    send(prospect, store)
    assert cluster.scripts == told
    arrays = ["--array=0-1%2" in text for text in told]
    assert arrays == [True, True, False]  # an array of one is a plain job


def test_a_submission_is_written_down_with_the_ids_of_its_jobs(cluster: FakeCluster, tmp_path: Path) -> None:
    store, sweep = Store(tmp_path / "r"), fake_runs.sweep(*range(10))
    submission = submit(sweep, store, max_array=2)
    assert submission
    (read,) = read_submissions(store.root)
    assert read.jobs == tuple((a.id, b.id) for a, b in zip(sweep.runs[::2], sweep.runs[1::2], strict=True))
    assert read.job_ids == ["100_0", "100_1", "101_0", "101_1", "102"]
    assert read.complete
    assert read.specs == {spec.id: spec.to_json() for spec in sweep.runs}
    assert all(f"--comment=lorabench:{read.name}\n" in text for text in cluster.scripts)
    assert not list(read.folder.rglob("*.pkl"))  # whoever may write a pickle runs code as the one who loads it


def test_what_is_done_queued_or_has_failed_is_not_submitted_again(cluster: FakeCluster, tmp_path: Path) -> None:
    store, sweep = Store(tmp_path / "r"), fake_runs.sweep(*range(8))
    first = submit(fake_runs.sweep(0, 1), store)
    queued(cluster, first)
    for spec, status in zip(sweep.runs[2:6], (Status.DONE, Status.OOM, Status.CANCELLED, Status.RUNNING), strict=True):
        end(store, spec, status)  # a running record whose worker has gone: interrupted
    second = submit(sweep, store)
    assert second
    submitted = [id for job in second.jobs for id in job]
    assert submitted == [spec.id for spec in sweep.runs[4:]]
    queued(cluster, first, second)
    assert submit(sweep, store) is None
    queued(cluster, first, second, state="COMPLETING")
    assert submit(sweep, store) is None


def test_jobs_that_are_gone_leave_their_runs_to_be_submitted_again(cluster: FakeCluster, tmp_path: Path) -> None:
    store, sweep = Store(tmp_path / "r"), fake_runs.sweep(0, 1, 2)
    first = submit(sweep, store)
    cluster.queue({})
    cluster.no_accounting()
    second = submit(sweep, store)
    assert first and second and second.jobs == first.jobs


def test_a_retry_is_submitted_once_and_belongs_to_the_failure_it_was_asked_for(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    store, sweep = Store(tmp_path / "r"), fake_runs.sweep(0, 1, 2)
    for spec, status in zip(sweep.runs, (Status.OOM, Status.TIMEOUT, Status.FAILED), strict=True):
        end(store, spec, status)
    (store.folder(sweep.runs[1].id) / "timeouts.json").write_text('{"count": 4}')
    retried = submit(sweep, store, retry=[Status.OOM, Status.TIMEOUT])
    assert retried and retried.jobs == ((sweep.runs[0].id, sweep.runs[1].id),)
    assert retried.retry == {sweep.runs[0].id: 1, sweep.runs[1].id: 1}
    assert not (store.folder(sweep.runs[1].id) / "timeouts.json").exists()
    queued(cluster, retried)
    assert submit(sweep, store, retry=[Status.OOM, Status.TIMEOUT]) is None  # it waits already
    end(store, sweep.runs[0], Status.OOM)  # in the new job, which may go on with others
    again = submit(sweep, store, retry=[Status.OOM])
    assert again and again.jobs == ((sweep.runs[0].id,),)
    assert again.retry == {sweep.runs[0].id: 2}


def test_a_run_whose_files_have_changed_is_made_again_by_its_job_where_that_is_asked(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sweep = Store(tmp_path / "r"), fake_runs.sweep(fake_runs.DONE, 1)
    damaged = sweep.runs[0]
    for spec in sweep.runs:
        end(store, spec, Status.DONE, updates=b"what it learned")
    file = store.folder(damaged.id) / "updates" / "delta.safetensors"
    file.write_bytes(b"something else!")
    assert submit(sweep, store) is None  # no file is read where that is not asked
    retried = submit(sweep, store, retry=[Status.CORRUPT])
    assert retried and retried.jobs == ((damaged.id,),) and retried.retry == {damaged.id: 1}
    assert file.read_bytes() == b"something else!"  # until its job begins
    queued(cluster, retried)
    assert submit(sweep, store, retry=[Status.CORRUPT]) is None  # it waits already
    assert [s.status for s in standings(store, sweep.runs, verify=True)] == [Status.PENDING, Status.DONE]

    monkeypatch.setattr(work, "Pool", partial(Pool, preload=("lorabench.launch.worker",)))
    monkeypatch.setattr(work, "launch", partial(launch, target=fake_runs.run))
    for _ in range(2):  # the second time SLURM has queued the job again
        outcome = work.compute(store, retried, PROFILE, 0, retried.job_ids[0] or "")
        assert outcome and [state.status for state in outcome.states] == [Status.DONE]
    assert len((store.root / "starts.txt").read_text().splitlines()) == 1
    kept = store.root / "runs" / ".corrupt" / f"{damaged.id}.1" / "updates" / "delta.safetensors"
    assert kept.read_bytes() == b"something else!"
    assert [store.verified(state).status for state in store.states(list(sweep.runs))] == [Status.DONE] * 2
    cluster.queue({})
    assert submit(sweep, store, retry=[Status.CORRUPT]) is None


def test_nothing_is_submitted_where_squeue_does_not_answer(cluster: FakeCluster, tmp_path: Path) -> None:
    store, sweep = Store(tmp_path / "r"), fake_runs.sweep(0)
    submit(sweep, store)
    cluster.answer("squeue", err="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    with pytest.raises(slurm.Unreachable, match="Unable to contact"):
        submit(sweep, store)
    said: list[str] = []
    prospect = prepare(order(sweep), store, plan(sweep), said.append)  # a dry run goes on
    assert any("Unable to contact" in line for line in said)
    assert prospect.name


def test_what_sbatch_says_is_told_and_what_it_took_before_is_kept(cluster: FakeCluster, tmp_path: Path) -> None:
    store, sweep = Store(tmp_path / "r"), fake_runs.sweep(*range(8))
    cluster.refuse(after=1)
    with pytest.raises(InputError, match="invalid partition specified: nope; 1 of 2 arrays were submitted"):
        submit(sweep, store, max_array=2)
    (first,) = read_submissions(store.root)
    assert (first.complete, first.job_ids) == (False, ["100_0", "100_1", None, None])
    (cluster.folder / "sbatch.refuse").unlink()
    queued(cluster, first)
    second = submit(sweep, store, max_array=2)
    assert second and [id for job in second.jobs for id in job] == [spec.id for spec in sweep.runs[4:]]


def test_a_refused_submission_leaves_nothing_behind(cluster: FakeCluster, tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    cluster.refuse()
    with pytest.raises(InputError, match=r"^sbatch: invalid partition specified: nope$"):
        submit(fake_runs.sweep(0), store)
    assert list(read_submissions(store.root)) == []


def test_a_dry_run_tells_that_the_cluster_would_refuse(cluster: FakeCluster, tmp_path: Path) -> None:
    one, said = order(fake_runs.sweep(0)), []
    prospect = prepare(one, Store(tmp_path / "r"), plan(one.sweep))
    try_out(prospect, tmp_path, said.append)
    assert said == ["sbatch --test-only: Job 5 to start at once"] and cluster.scripts == []
    cluster.refuse()
    with pytest.raises(InputError, match=r"^sbatch: invalid partition specified: nope$"):
        try_out(prospect, tmp_path, said.append)


def child(root: Path, *seeds: int) -> subprocess.Popen[str]:
    """A submitter of its own, as the command is one."""
    code = f"""
import sys, time
from pathlib import Path
from lorabench.cluster.enqueue import only_one
from lorabench.store.store import Store
from tests import fake_runs
from tests.cluster.test_submit import submit
store = Store(Path({str(root)!r}))
with only_one(store.root, print):
    made = submit(fake_runs.sweep(*{seeds!r}), store)
print("made", made.name if made else None, flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def test_two_overlapping_submits_at_once_submit_each_run_once(cluster: FakeCluster, tmp_path: Path) -> None:
    root = tmp_path / "r"
    cluster.answer(
        "squeue",
        "".join(f"{100 + a}_{e}|PENDING|None|N/A|N/A||{user_name()}|(null)\n" for a in range(2) for e in range(9)),
    )
    children = [child(root, *range(8)), child(root, *range(4, 12))]
    assert [process.wait(60) for process in children] == [0, 0]
    submitted = [id for submission in read_submissions(root) for job in submission.jobs for id in job]
    assert sorted(submitted) == sorted(spec.id for spec in fake_runs.sweep(*range(12)).runs)


def test_a_submitter_that_is_killed_once_sbatch_took_its_jobs_leaves_them_queued(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    root = tmp_path / "r"
    cluster.kill_submitter()
    assert child(root, *range(4)).wait(60) == -signal.SIGKILL
    (cluster.folder / "sbatch.kill").unlink()
    (left,) = read_submissions(root)
    assert left.job_ids == [None, None] and len(cluster.scripts) == 1
    cluster.queue({"100_0": "PENDING", "100_1": "RUNNING"}, comment=f"lorabench:{left.name}")
    store = Store(root)
    with only_one(root, print):  # what the dead one held is taken over
        assert submit(fake_runs.sweep(*range(4)), store) is None
    cluster.queue({})
    cluster.no_accounting()
    assert submit(fake_runs.sweep(*range(4)), store)


def test_a_second_submit_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    code = f"""
import time
from pathlib import Path
from lorabench.cluster.enqueue import only_one
with only_one(Path({str(tmp_path)!r}), print):
    print("held", flush=True)
    time.sleep(1.5)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout and first.stdout.readline() == "held\n"
        began = time.monotonic()
        with only_one(tmp_path, said.append):
            assert time.monotonic() - began > 0.5
            assert first.wait(10) == 0
    assert len(said) == 1 and f"pid {first.pid}" in said[0]


@pytest.mark.parametrize(
    ("changes", "config", "words"),
    [
        ({"cpus": 1, "cells_at_once": 2}, {}, "cpus = 1: the runs of a job use 2 threads"),
        ({"mem_gib": 0.25}, {}, "mem_gib = 0.25: 4 runs are expected to need more"),
        ({"minutes": 4, "signal_seconds": 100}, {}, None),
        ({"minutes": 3, "signal_seconds": 100}, {}, "minutes = 3: 4 runs are expected to take longer"),
        ({}, {"PreemptType": "preempt/qos"}, "preempts jobs without the signal"),
        ({}, {"PreemptType": "preempt/qos", "PreemptParameters": "send_user_signal"}, None),
        ({}, {"PreemptType": "preempt/qos", "SlurmctldParameters": "preempt_send_user_signal"}, None),
        ({}, {}, None),
    ],
)
def test_what_may_go_wrong_is_told_before(
    changes: dict[str, object], config: dict[str, str], words: str | None, cluster: FakeCluster, tmp_path: Path
) -> None:
    cluster.configure(**config)
    one = order(fake_runs.sweep(*range(4)), **changes)
    lines = warnings(prepare(one, Store(tmp_path / "r"), plan(one.sweep, 100.0)), one.sweep.runs)
    assert len(lines) == bool(words)
    assert all(words and words in line for line in lines)


def test_arrays_stay_below_what_the_cluster_allows(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.configure(MaxArraySize="3")
    submission = submit(fake_runs.sweep(*range(20)), Store(tmp_path / "r"))
    assert submission and [array.count for array in submission.arrays] == [3, 3, 3, 1]
    assert ["#SBATCH --array=0-2%2\n" in text for text in cluster.scripts] == [True, True, True, False]


def test_a_variable_of_the_job_that_submits_is_not_asked_for_again(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1000")
    monkeypatch.setenv("SLURM_CONF", "/etc/somewhere/slurm.conf")
    submit(fake_runs.sweep(0), Store(tmp_path / "r"))
    lines = (cluster.folder / "sbatch.environment").read_text().splitlines()
    assert "SLURM_CONF=/etc/somewhere/slurm.conf" in lines
    assert not [line for line in lines if line.startswith(("SLURM_JOB_ID", "SLURM_MEM"))]
    assert os.environ["SLURM_JOB_ID"] == "7"


def test_a_path_that_slurm_would_change_is_refused(cluster: FakeCluster, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must have no %"):
        submit(fake_runs.sweep(0), Store(tmp_path / "50%"))
    assert cluster.scripts == []


def test_a_plan_is_its_user_s_alone_whatever_the_umask(cluster: FakeCluster, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        submission = submit(fake_runs.sweep(0), Store(tmp_path / "r"))
    finally:
        os.umask(before)
    assert submission
    check_own(submission.folder)
    assert (tmp_path / "r" / "queue").stat().st_mode & 0o022  # the folder above may be everybody's


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "plan.json").chmod(0o664), r"plan.json: others may write it \(mode 664\)"),
        (lambda folder: folder.chmod(0o757), "others may write it"),
        (lambda folder: os.chown(folder / "plan.json", 12345, -1), "plan.json: belongs to 12345, not to"),
        (lambda folder: os.chown(folder, 12345, -1), "belongs to 12345, not to"),
        (lambda folder: link(folder / "plan.json"), "plan.json: is a link"),
        (lambda folder: (folder / "plan.json").unlink(), "plan.json: cannot be read: No such file"),
    ],
    ids=["file", "folder", "file's owner", "folder's owner", "link", "missing"],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_plan_that_others_may_have_written_is_not_believed(
    harm: Callable[[Path], object], words: str, cluster: FakeCluster, tmp_path: Path
) -> None:
    submission = submit(fake_runs.sweep(0), Store(tmp_path / "r"))
    assert submission
    harm(submission.folder)
    with pytest.raises(InputError, match=words):
        check_own(submission.folder)


def link(file: Path) -> None:
    file.rename(file.with_name("other"))
    file.symlink_to("other")


def test_a_job_ends_where_others_may_have_written_its_plan(cluster: FakeCluster, tmp_path: Path) -> None:
    submission = submit(fake_runs.sweep(0), Store(tmp_path / "r"))
    assert submission
    (submission.folder / "plan.json").chmod(0o666)
    (line,) = [line for line in cluster.scripts[0].splitlines() if line.startswith("srun")]
    words = shlex.split(line)
    variables = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "100", "PYTHONPATH": os.getcwd()}
    job = [sys.executable, *words[words.index("-P") :]]
    done = subprocess.run(job, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "others may write it" in done.stderr and "Traceback" not in done.stderr
