"""How runs stand: every way in which store, queue and SLURM can agree or not, and what may never be written over."""

import errno
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorabench.cluster import slurm, verdict
from lorabench.cluster.queue import COMMENT, note_cancelled, read_submission, submission_folders, user_name
from lorabench.cluster.run_states import Standing, standings
from lorabench.config.decode import InputError
from lorabench.config.durable import write_bytes
from lorabench.spec.run_spec import RunSpec
from lorabench.store import claim
from lorabench.store.claim import STALE_SECONDS, take
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests import fake_runs
from tests.fake_slurm import FakeSlurm, record, recorded, submitted
from tests.fake_slurm import slurm_commands as slurm_commands
from tests.store.test_claim import write_claim

SPECS = list(fake_runs.sweep(*range(12)).runs)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def died(store: Store, spec: RunSpec, job_id: str, **fields: object) -> None:
    """A worker of this job had begun the run, and is no more."""
    record(store, spec, Status.RUNNING)
    write_claim(store.folder(spec.id), progress={"job": job_id, "step": 3}, **fields)


def stand(store: Store, *specs: RunSpec) -> list[Standing]:
    return standings(store, specs or SPECS[:1])


def test_without_a_queue_slurm_is_not_asked(store: Store, slurm_commands: FakeSlurm) -> None:
    record(store, SPECS[0], Status.DONE)
    assert [s.status for s in stand(store, *SPECS[:2])] == ["done", "missing"]
    assert [s.run_id for s in standings(store)] == [SPECS[0].id]
    submitted(store.root, [[SPECS[0]]], ["5"])
    assert stand(store)[0].queue is not None  # of a run that is done it is known where, but nobody need ask
    assert slurm_commands.calls == []


def test_what_waits_shows_slurm_s_reason(store: Store, slurm_commands: FakeSlurm) -> None:
    """Three jobs of an array that wait, run, and are queued again after their node died."""
    submitted(store.root, [[SPECS[0]], [SPECS[1], SPECS[2]], [SPECS[3]]], ["5"])
    slurm_commands.queue({"5_0": "PENDING Priority", "5_1": "RUNNING", "5_2": "PENDING BeginTime"})
    died(store, SPECS[3], "5_2")
    record(store, SPECS[2], Status.CANCELLED, error="stopped by SIGUSR2")
    with take(store.folder(SPECS[1].id), {"job": "5_1"}):
        found = stand(store, *SPECS[:4])
    assert [s.status for s in found] == ["pending", "running", "pending", "pending"]
    reasons = [s.queue and s.queue.reason for s in found]
    assert reasons == ["Priority", None, "in a running job", "BeginTime"]
    assert [s.queue and s.queue.job_id for s in found] == ["5_0", "5_1", "5_1", "5_2"]
    assert {s.run_id for s in standings(store)} == {spec.id for spec in SPECS[:4]}  # also those without a folder
    assert standings(store, [SPECS[0].id])[0].state.spec == SPECS[0].to_json()


def test_what_ends_between_the_look_at_the_store_and_at_the_queue_is_not_lost(
    store: Store, slurm_commands: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job of the first is done just then; the worker of the second is a new one, on a job of its own."""
    submitted(store.root, [[SPECS[0]], [SPECS[1]]], ["5"])
    died(store, SPECS[1], "5_1")
    slurm_commands.accounting({"5_0": "COMPLETED", "5_1": "TIMEOUT"})
    later = take(store.folder(SPECS[1].id), {"job": "77"})
    assert later is not None
    (store.folder(SPECS[1].id) / "claims" / "0002.json").rename(store.root / "claim")

    def list_jobs(users: object) -> list[slurm.Job]:
        record(store, SPECS[0], Status.DONE)
        (store.root / "claim").rename(store.folder(SPECS[1].id) / "claims" / "0002.json")
        return []

    monkeypatch.setattr(slurm, "list_jobs", list_jobs)
    assert [s.status for s in stand(store, *SPECS[:2])] == ["done", "running"]


def test_a_worker_that_is_silent_while_its_job_runs_is_shown_as_such(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]]], ["5"])
    slurm_commands.queue({"5": "RUNNING"})
    died(store, SPECS[0], "5", machine="another", time=time.time() - STALE_SECONDS - 30)
    (found,) = stand(store)
    assert found.status == "pending" and found.queue and found.queue.reason == "no heartbeat for 2 min 00 s"


VERDICTS = [
    ("OUT_OF_MEMORY", "oom", "lost"),
    ("TIMEOUT", "timeout", "lost"),
    ("DEADLINE", "timeout", "lost"),
    ("CANCELLED by 1000", "cancelled", "cancelled"),
    ("NODE_FAIL", "lost", "lost"),
    ("FAILED", "lost", "lost"),
    ("COMPLETED", "lost", "lost"),
    ("PREEMPTED", "lost", "lost"),
    ("RUNNING", "lost", "lost"),
]


@pytest.mark.parametrize(("state", "begun", "waiting"), VERDICTS)
def test_the_accounting_s_verdict_on_what_a_job_had_begun_and_had_not(
    state: str, begun: str, waiting: str, store: Store, slurm_commands: FakeSlurm
) -> None:
    submitted(store.root, [SPECS[:3]], ["5"])
    record(store, SPECS[0], Status.DONE)
    died(store, SPECS[1], "5")
    slurm_commands.accounting({"5": state})
    for _ in range(2):
        found = stand(store, *SPECS[:3])
        assert [s.status for s in found] == ["done", begun, waiting]
        assert all("job 5" in (s.state.error or "") for s in found[1:])
    kept = store.state(SPECS[1].id)
    assert kept.status == ("interrupted" if begun == "lost" else begun)
    assert kept.claim and kept.claim.progress["step"] == 3  # what is known of how far it came stays known
    assert not store.folder(SPECS[2].id).exists()


@pytest.mark.parametrize("state", [state for state, _, _ in VERDICTS])
def test_a_live_worker_is_never_written_over(state: str, store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]]], ["5"])
    slurm_commands.accounting({"5": state})
    with take(store.folder(SPECS[0].id), {"job": "5"}):
        record(store, SPECS[0], Status.RUNNING)
        assert stand(store)[0].status == "running"
    assert store.read(SPECS[0].id).status == Status.RUNNING


def test_a_run_that_was_interrupted_elsewhere_since_is_not_its_old_job_s(
    store: Store, slurm_commands: FakeSlurm
) -> None:
    """`lorabench run` on a workstation took it up and was killed: no job is to blame."""
    submitted(store.root, [[SPECS[0]], [SPECS[1]]], ["5"])
    slurm_commands.accounting({"5_0": "OUT_OF_MEMORY", "5_1": "OUT_OF_MEMORY"})
    died(store, SPECS[0], "77_3")
    record(store, SPECS[1], Status.RUNNING)
    write_claim(store.folder(SPECS[1].id), progress={"step": 3})
    assert [s.status for s in stand(store, *SPECS[:2])] == ["interrupted", "interrupted"]


def test_an_older_attempt_is_not_taken_for_the_job_s(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]]], ["5"])
    died(store, SPECS[0], "3", time=time.time() - 10 * 365 * 86400)
    slurm_commands.accounting({"5": "OUT_OF_MEMORY"})
    (found,) = stand(store)
    assert found.status == "lost" and "before the run began" in (found.state.error or "")


def test_a_cluster_without_accounting_says_what_it_cannot_know(store: Store, slurm_commands: FakeSlurm) -> None:
    """squeue remembers for some minutes how jobs ended; after that nobody does."""
    submitted(store.root, [[SPECS[0]], [SPECS[1]]], ["5"])
    died(store, SPECS[0], "5_0")
    died(store, SPECS[1], "5_1")
    slurm_commands.queue({"5_0": "TIMEOUT TimeLimit"})
    slurm_commands.no_accounting()
    ended, gone = stand(store, *SPECS[:2])
    assert (ended.status, gone.status) == ("timeout", "lost")
    assert gone.state.error == "its job 5_1 is gone; why is not known: this cluster keeps no accounting"


NEWER_OOM = "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0. Some of the step tasks have been OOM Killed.\n"


@pytest.mark.parametrize("said", [NEWER_OOM, recorded()["oom_log"]])
def test_a_kill_for_memory_is_read_in_the_job_s_log_where_nobody_else_tells(
    said: str, store: Store, slurm_commands: FakeSlurm
) -> None:
    """SLURM writes it there; without accounting the job itself has merely FAILED."""
    folder = submitted(store.root, [[SPECS[0], SPECS[1]], [SPECS[2]]], ["5"])
    (folder / "submitit").mkdir()
    (folder / "submitit" / "5_0_0_log.err").write_text("x\n" * 100 + said)
    (folder / "submitit" / "5_1_0_log.err").write_text("no oom kill event\n")
    slurm_commands.no_accounting()
    died(store, SPECS[0], "5_0")
    died(store, SPECS[2], "5_1")
    assert [s.status for s in stand(store, *SPECS[:3])] == ["oom", "lost", "lost"]
    assert store.read(SPECS[0].id).status == Status.OOM


def test_an_accounting_that_lags_behind_does_not_outdo_the_queue(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]]], ["5"])
    died(store, SPECS[0], "5")
    slurm_commands.queue({"5": "TIMEOUT TimeLimit"})
    slurm_commands.accounting({"5": "RUNNING"})
    assert stand(store)[0].status == "timeout"


def test_an_accounting_that_does_not_answer_stops_nobody(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]]], ["5"])
    slurm_commands.answer("sacct", err="sacct: error: slurm_persist_conn_open: Connection refused", code=1)
    told: list[str] = []
    (found,) = standings(store, SPECS[:1], told.append)
    assert stand(store)[0].status == found.status == "lost" and "Connection refused" in told[0]


def test_a_queue_that_does_not_answer_is_an_error_or_told(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]], [SPECS[1]]], ["5"])
    died(store, SPECS[1], "5_1")
    slurm_commands.answer("squeue", err="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    with pytest.raises(slurm.Unreachable):
        stand(store)
    told: list[str] = []
    found = standings(store, SPECS[:2], told.append)
    assert [s.status for s in found] == ["missing", "interrupted"] and len(told) == 1
    assert [s.queue and s.queue.reason for s in found] == ["SLURM did not answer"] * 2
    assert not any(call.startswith("sacct") for call in slurm_commands.calls)


def test_jobs_whose_ids_their_submitter_could_not_write_are_found(store: Store, slurm_commands: FakeSlurm) -> None:
    """It died between sbatch and its note: the comment of the jobs tells whose they are."""
    folder = submitted(store.root, [[spec] for spec in SPECS[:6]], ["5", "8", "9"], complete=False)
    jobs = json.loads((folder / "jobs.json").read_text())
    write_bytes(folder / "jobs.json", json.dumps(jobs | {"arrays": jobs["arrays"][:1]}).encode())
    queue = {"5_0": "RUNNING", "5_1": "PENDING", "8_0": "PENDING", "8_1": "PENDING"}
    slurm_commands.queue(queue, COMMENT + folder.name)
    found = stand(store, *SPECS[:6])
    assert [s.status for s in found] == ["pending"] * 4 + ["missing"] * 2
    assert [s.queue and s.queue.job_id for s in found] == ["5_0", "5_1", "8_0", "8_1", None, None]


def test_what_is_being_submitted_just_now_waits(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]], [SPECS[1]]], [], complete=False)
    lock = write_claim(store.root / "queue", host="login1", machine="another", pid=7)
    assert lock.is_alive() and [s.status for s in stand(store, *SPECS[:2])] == ["pending", "pending"]
    write_claim(store.root / "queue", host="login1", machine="another", pid=7, released=True)
    assert [s.status for s in stand(store, *SPECS[:2])] == ["missing", "missing"]
    with take(store.root / "queue"):  # the one who asks is the one who submits: an earlier one of his died
        assert [s.status for s in stand(store, *SPECS[:2])] == ["missing", "missing"]


@pytest.mark.parametrize("filesystem", ["nfs4", "ext4"])
def test_on_nfs_what_a_job_wrote_last_is_waited_for(
    filesystem: str, store: Store, slurm_commands: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is known from the accounting, from the queue, or from the run's last heartbeat."""
    device = os.stat(tmp_path).st_dev
    mounts = f"1 2 9:9 / /other rw - nfs4 s rw\n3 2 {os.major(device)}:{os.minor(device)} / /x rw - {filesystem} s rw\n"
    monkeypatch.setattr(verdict, "MOUNTS", tmp_path / "mounts")
    verdict.MOUNTS.write_text(mounts)
    submitted(store.root, [[SPECS[0]], [SPECS[1]], [SPECS[2]], [SPECS[3]]], ["5"])
    ended = datetime.now().isoformat(timespec="seconds")
    died(store, SPECS[2], "5_2")
    slurm_commands.answer("squeue", f"5_1|FAILED|NonZeroExitCode|N/A|{ended}|n1|{user_name()}|(null)\n")
    slurm_commands.answer(
        "sacct", f"5_0|COMPLETED|0:0|{ended}|{ended}|n1\n5_3|COMPLETED|0:0|{ended}|2026-11-24T14:31:00|n1\n"
    )
    waits = ["pending"] * 3 if filesystem == "nfs4" else ["lost"] * 3
    found = stand(store, *SPECS[:4])
    assert [s.status for s in found] == [*waits, "lost"]
    if filesystem == "nfs4":
        assert {s.queue and s.queue.reason for s in found[:3]} == {"its job has just ended"}
        monkeypatch.setattr(verdict, "LATE_SECONDS", -100.0)
        assert [s.status for s in stand(store, *SPECS[:4])] == ["lost"] * 4


@pytest.mark.parametrize("fails", ["claim", "record"])
def test_a_verdict_that_cannot_be_written_is_shown_all_the_same(
    fails: str, store: Store, slurm_commands: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk. Once there is room again it is written, and no claim of the vain attempts stands in its way."""
    submitted(store.root, [[SPECS[0]]], ["5"])
    died(store, SPECS[0], "5")
    slurm_commands.accounting({"5": "OUT_OF_MEMORY"})

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "claim":  # its file is made, and nothing fits in it
            patch.setattr(claim, "json", SimpleNamespace(**vars(json) | {"dumps": full}))
        else:
            patch.setattr(Store, "write", full)
        for _ in range(2):
            assert stand(store)[0].status == "oom"
    assert store.read(SPECS[0].id).status == Status.RUNNING
    assert stand(store)[0].status == "oom" and store.read(SPECS[0].id).status == Status.OOM


def test_another_s_jobs_are_shown_but_not_settled(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]], [SPECS[1]]], ["5"], user="somebody")
    died(store, SPECS[0], "5_0")
    slurm_commands.queue({"5_1": "PENDING Priority"}, user="somebody")
    slurm_commands.accounting({"5_0": "OUT_OF_MEMORY"})
    assert [s.status for s in stand(store, *SPECS[:2])] == ["oom", "pending"]
    assert store.read(SPECS[0].id).status == Status.RUNNING
    assert "somebody" in next(call for call in slurm_commands.calls if call.startswith("squeue"))


@pytest.mark.parametrize(("private", "status"), [("cloud,jobs,usage", "missing"), ("none", "lost")])
def test_another_s_jobs_that_the_cluster_hides_are_not_taken_for_lost(
    private: str, status: str, store: Store, slurm_commands: FakeSlurm
) -> None:
    slurm_commands.answer("scontrol", f"ClusterName             = here\nPrivateData             = {private}\n")
    submitted(store.root, [[SPECS[0]]], ["5"], name="20261124T1-a-0000", user="somebody")
    submitted(store.root, [[SPECS[1]]], ["6"], name="20261124T2-a-0000")
    theirs, ours = stand(store, *SPECS[:2])
    assert (theirs.status, ours.status) == (status, "lost")
    assert theirs.queue and ("somebody's" in (theirs.queue.reason or "")) is (status == "missing")


def test_another_cluster_s_jobs_are_not_taken_for_lost(store: Store, slurm_commands: FakeSlurm) -> None:
    """Two clusters share a results folder, and each counts its jobs by itself."""
    slurm_commands.answer("scontrol", "ClusterName             = here\n")
    submitted(store.root, [[SPECS[0]]], ["5"], slurm_cluster="there", name="20261124T1-a-0000")
    submitted(store.root, [[SPECS[1]]], ["6"], slurm_cluster="here", name="20261124T2-a-0000")
    slurm_commands.accounting({"5": "TIMEOUT", "6": "NODE_FAIL"})
    there, here = stand(store, *SPECS[:2])
    assert there.status == "missing" and there.queue and "on cluster there" in (there.queue.reason or "")
    assert here.status == "lost"


def test_a_later_job_with_the_same_number_is_not_the_run_s(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [[SPECS[0]]], ["5"])
    slurm_commands.queue({"5": "RUNNING"}, comment=COMMENT + "20261125T000000-another-ffff")
    assert stand(store)[0].status == "lost"
    slurm_commands.queue({"5": "RUNNING"}, user="somebody")
    assert stand(store)[0].status == "lost"
    slurm_commands.queue({"5": "RUNNING"}, comment="what a site's plug-in writes here")
    assert stand(store)[0].status == "pending"


def test_of_several_submissions_the_one_in_the_queue_counts_else_the_latest(
    store: Store, slurm_commands: FakeSlurm
) -> None:
    submitted(store.root, [[SPECS[0]]], ["5"], name="20261124T1-a-0000")
    submitted(store.root, [[SPECS[0]]], ["6"], name="20261124T2-a-0000")
    slurm_commands.queue({"5": "PENDING"})
    assert [s.queue and s.queue.job_id for s in stand(store)] == ["5"]
    slurm_commands.queue({})
    assert [(s.status, s.queue and s.queue.job_id) for s in stand(store)] == [("lost", "6")]


def test_a_failure_that_is_repeated_waits_until_it_has_begun(store: Store, slurm_commands: FakeSlurm) -> None:
    """`--retry`: the plan holds the number of the run's last claim; a later one is a new failure."""
    record(store, SPECS[0], Status.OOM)
    write_claim(store.folder(SPECS[0].id), number=2, released=True)
    submitted(store.root, [[SPECS[0]]], ["5"], retry={SPECS[0].id: 2})
    slurm_commands.queue({"5": "PENDING"})
    assert stand(store)[0].status == "pending"
    write_claim(store.folder(SPECS[0].id), number=3, released=True)
    assert stand(store)[0].status == "oom"


def test_a_marked_run_is_cancelled_though_its_job_goes_on(store: Store, slurm_commands: FakeSlurm) -> None:
    submitted(store.root, [SPECS[:3]], ["5"])
    slurm_commands.queue({"5": "RUNNING"})
    record(store, SPECS[0], Status.CANCELLED, error="stopped by lorabench cancel")
    for spec in SPECS[:2]:
        write_bytes(store.cancel_marker(spec.id), b"")
    assert [s.status for s in stand(store, *SPECS[:3])] == ["cancelled", "cancelled", "pending"]


def test_jobs_that_were_cancelled_while_they_waited_stay_so(store: Store, slurm_commands: FakeSlurm) -> None:
    """SLURM keeps no trace of them; the submission does."""
    submission = read_submission(submitted(store.root, [[SPECS[0]], [SPECS[1]]], ["5"]))
    assert submission is not None
    note_cancelled(submission, [1])
    lost, cancelled = stand(store, *SPECS[:2])
    assert (lost.status, cancelled.status) == ("lost", "cancelled")
    assert "no trace" in (lost.state.error or "")
    slurm_commands.no_accounting()
    assert [s.status for s in stand(store, *SPECS[:2])] == ["lost", "cancelled"]


def test_a_local_job_is_its_process(store: Store, slurm_commands: FakeSlurm) -> None:
    import socket

    folder = store.root / "queue" / "20261124T143000-grid-0a1b" / "submitit"
    program = "import time; time.sleep(60)"
    job = subprocess.Popen([sys.executable, "-c", program, "submitit.local._local", str(folder.absolute())])
    pids = [str(job.pid), str(os.getpid())]
    try:
        submitted(store.root, [[SPECS[0]], [SPECS[1]]], pids, kind="local", host=socket.gethostname())
        while not Path(f"/proc/{job.pid}/cmdline").read_bytes().count(b"submitit"):
            time.sleep(0.01)
        died(store, SPECS[1], pids[1])
        waits, gone = stand(store, *SPECS[:2])
        assert (waits.status, gone.status) == ("pending", "lost")  # this process is alive, but no job's
        assert gone.state.error == f"its job {os.getpid()} is gone; its process ended on {socket.gethostname()}"
    finally:
        job.kill()
        job.wait()
    assert stand(store)[0].status == "lost"
    submitted(store.root, [[SPECS[0]]], pids[:1], kind="local", host="elsewhere")
    (found,) = stand(store)
    assert found.status == "missing" and found.queue and found.queue.reason == "on elsewhere; not seen from here"
    assert slurm_commands.calls == []


@pytest.mark.parametrize(
    ("file", "field", "value", "words"),
    [
        ("plan", "jobs", [["lora-000000000000"]], 'jobs: "lora-000000000000" is none of its runs'),
        ("plan", "jobs", 7, "jobs = 7: must be list"),
        ("plan", "arrays", [[0, 10**200]], "holds none, or more than there are"),
        ("plan", "arrays", [[0]], "must be 2 values"),
        ("plan", "specs", {"../../x": {}}, "is no name of a file below the folder"),
        ("plan", "retry", {"x": "1"}, 'retry.x = "1": must be int'),
        ("plan", "submitted", "yesterday", "is no time"),
        ("plan", "kind", "cloud", 'kind = "cloud"'),
        ("jobs", "arrays", [{"job_id": "--user=root", "first": 0, "count": 1}], "is no number of a job"),
        ("jobs", "arrays", {"0": 1}, "must be list"),
        ("jobs", "complete", "yes", "must be bool"),
    ],
)
def test_a_field_of_a_wrong_type_is_told_and_nothing_else_suffers(
    file: str, field: str, value: object, words: str, store: Store, slurm_commands: FakeSlurm
) -> None:
    folder = submitted(store.root, [[SPECS[1]]], ["5"])
    table = json.loads((folder / f"{file}.json").read_text()) | {field: value}
    (folder / f"{file}.json").write_text(json.dumps(table))
    record(store, SPECS[0], Status.DONE)
    told: list[str] = []
    assert [s.status for s in standings(store, tell=told.append)] == ["done"]
    assert len(told) == 1 and f"{file}.json" in told[0] and words in told[0]


@pytest.mark.parametrize("content", [b'{"jobs": [', b'{"jobs": []}', b"[]"])
def test_a_damaged_plan_is_named(content: bytes, store: Store) -> None:
    write_bytes(store.root / "queue" / "20261124T1-a-0000" / "plan.json", content)
    record(store, SPECS[0], Status.DONE)
    with pytest.raises(InputError, match="20261124T1-a-0000"):
        standings(store)
    told: list[str] = []
    assert [s.status for s in standings(store, tell=told.append)] == ["done"]
    assert "20261124T1-a-0000" in told[0]


def test_a_folder_without_a_plan_is_no_submission(store: Store) -> None:
    (store.root / "queue" / "20261124T1-a-0000" / "submitit").mkdir(parents=True)
    assert standings(store) == []


def test_what_links_to_itself_in_the_queue_is_no_submission(tmp_path):
    (tmp_path / "queue" / "one").mkdir(parents=True)
    (tmp_path / "queue" / "two").symlink_to("two")
    assert submission_folders(tmp_path) == [tmp_path / "queue" / "one"]
