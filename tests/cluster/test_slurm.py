"""SLURM's answers are read as they are: held against what a real one has said, and against its own short forms."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.cluster import slurm
from lorabench.cluster.slurm import Ended, Unreachable, condense_ids, expand_ids, list_ended, list_jobs, parse_ended
from tests.fake_slurm import FakeSlurm, recorded
from tests.fake_slurm import slurm_commands as slurm_commands

RECORDED = recorded()
JOBS: dict[str, str] = RECORDED["jobs"]


def queued(slurm_commands: FakeSlurm, answer: str = "squeue") -> dict[str, slurm.Job]:
    slurm_commands.answer("squeue", RECORDED[answer])
    return {job.id: job for job in list_jobs(["root"])}


def ended(slurm_commands: FakeSlurm, *job_ids: str) -> dict[str, Ended]:
    slurm_commands.answer("sacct", RECORDED["sacct"])
    found = list_ended(job_ids)
    assert found is not None
    return found


def test_the_queue_s_long_and_short_form_name_the_same_jobs(slurm_commands: FakeSlurm) -> None:
    """squeue itself expands arrays with `--array`; without, it leaves that to us."""
    long, short = queued(slurm_commands), queued(slurm_commands, "condensed")
    assert {id: job.state for id, job in long.items()} == {id: job.state for id, job in short.items()}
    assert any("[" in line for line in RECORDED["condensed"].splitlines())


@pytest.mark.parametrize(
    ("name", "state", "reason"),
    [
        ("held_0", "PENDING", "JobHeldUser"),
        ("later", "PENDING", "BeginTime"),
        ("dependent", "PENDING", "DependencyNeverSatisfied"),
        ("limited_5", "PENDING", "JobArrayTaskLimit"),
        ("limited_0", "RUNNING", None),
    ],
)
def test_what_waits_and_runs_is_queued_with_the_reason(
    name: str, state: str, reason: str | None, slurm_commands: FakeSlurm
) -> None:
    name, mark, index = name.partition("_")
    job = queued(slurm_commands)[JOBS[name] + mark + index]
    assert (job.state, job.reason, job.is_queued) == (state, reason, True)
    assert job.comment == "lorabench:20261124T143000-grid-0a1b"


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("done_1", "COMPLETED"), ("failed", "FAILED"), ("killed", "FAILED"), ("timeout", "TIMEOUT"),
        ("cancelled", "CANCELLED"), ("node_fail", "NODE_FAIL"), ("requeued", "COMPLETED"),
        ("all_cancelled_4", "CANCELLED"),
    ],
)  # fmt: skip
def test_the_accounting_and_the_queue_tell_the_same_end(name: str, state: str, slurm_commands: FakeSlurm) -> None:
    name, mark, index = name.rpartition("_") if name[-1].isdigit() else (name, "", "")
    job_id = JOBS[name] + mark + index
    job = queued(slurm_commands)[job_id]
    assert (job.state, job.is_queued) == (state, False)
    assert ended(slurm_commands, job_id)[job_id].state == state


def test_a_step_s_kill_for_memory_is_its_job_s(slurm_commands: FakeSlurm) -> None:
    """Where srun's step was killed, the job itself has merely FAILED, in the queue and in the accounting."""
    in_step, in_script = JOBS["oom"], JOBS["oom_batch"]
    assert f"\n{in_step}|FAILED|" in RECORDED["sacct"] and queued(slurm_commands)[in_step].state == "FAILED"
    assert queued(slurm_commands)[in_script].state == "OUT_OF_MEMORY"
    found = ended(slurm_commands, in_step, in_script)
    assert [end.state for end in found.values()] == ["OUT_OF_MEMORY"] * 2


def test_exit_codes_and_whether_a_job_ever_ran(slurm_commands: FakeSlurm) -> None:
    names = ("failed", "killed", "cancelled", "all_cancelled")
    elements = [JOBS[name] + "_0" * (name == "all_cancelled") for name in names]
    failed, killed, cancelled, never = ended(slurm_commands, *elements).values()
    assert (failed.exit_code, failed.signal, failed.began) == (3, 0, True)
    assert (killed.exit_code, killed.signal, killed.began) == (0, 9, True)
    assert cancelled.began and not never.began
    assert failed.nodes in ("n1", "n2") and failed.end and never.nodes is None


def test_an_element_that_was_cancelled_while_it_waited_leaves_no_trace(slurm_commands: FakeSlurm) -> None:
    """So the real one does: neither squeue nor sacct names it."""
    job = JOBS["some_cancelled"]
    assert {f"{job}_{i}" for i in (2, 3, 7)}.isdisjoint(queued(slurm_commands))
    assert {f"{job}_{i}" for i in (0, 1, 4, 5, 6, 8, 9)} <= set(queued(slurm_commands))
    assert set(ended(slurm_commands, f"{job}_2", f"{job}_4")) == {f"{job}_4"}


def test_whole_arrays_are_asked_for(slurm_commands: FakeSlurm) -> None:
    ended(slurm_commands, "12_1", "12_7", "9")
    assert slurm_commands.calls[-1].endswith(" --jobs=9,12")


def test_a_step_that_ran_out_of_memory_tells_of_its_job() -> None:
    """With cgroups, which the cluster of the recording has not; as the manual page of sacct has the states."""
    rows = [
        "7_0|FAILED|1:0|2026-11-24T14:00:00|2026-11-24T15:00:00|n1",
        "7_0.batch|FAILED|1:0|2026-11-24T14:00:00|2026-11-24T15:00:00|n1",
        "7_0.0|OUT_OF_MEMORY|0:125|2026-11-24T14:00:00|2026-11-24T15:00:00|n1",
        "7_1|FAILED|1:0|2026-11-24T14:00:00|2026-11-24T15:00:00|n1",
        "7_1.0|FAILED|1:0|2026-11-24T14:00:00|2026-11-24T15:00:00|n1",
    ]
    assert [end.state for end in parse_ended("\n".join(rows))] == ["OUT_OF_MEMORY", "FAILED"]


def test_of_a_requeued_job_the_last_start_counts() -> None:
    rows = [
        "5|PREEMPTED|0:0|2026-11-24T14:00:00|2026-11-24T14:10:00|n1",
        "5.0|OUT_OF_MEMORY|0:125|2026-11-24T14:00:00|2026-11-24T14:10:00|n1",
        "5|CANCELLED by 1000|0:15|2026-11-24T14:20:00|2026-11-24T14:30:00|n2",
        "5.0|CANCELLED|0:15|2026-11-24T14:20:00|2026-11-24T14:30:00|n2",
    ]
    *_, last = parse_ended("\n".join(rows))
    assert (last.state, last.signal, last.nodes) == ("CANCELLED", 15, "n2")


def test_an_element_that_has_started_outdoes_its_row_among_those_that_wait(slurm_commands: FakeSlurm) -> None:
    slurm_commands.accounting({"5_0": "TIMEOUT", "5_[0-3%2]": "PENDING"})
    found = list_ended(["5_0", "5_1"])
    assert found and {id: end.state for id, end in found.items()} == {"5_0": "TIMEOUT", "5_1": "PENDING"}


def test_what_others_let_stand_in_the_queue_stops_nobody(slurm_commands: FakeSlurm) -> None:
    """Parts of a heterogeneous job, ids of a kind not known here, and comments of several lines."""
    foreign = "7+0|RUNNING|None|N/A|N/A|n1|x|(null)\n7+1|RUNNING|None|N/A|N/A|n2|x|a\nb|c\n\x1fd\nx7|RUNNING||||||\n"
    own = f"8_1|PENDING|Priority|N/A|N/A||root|{slurm.COMMENT}x\n"
    slurm_commands.answer("squeue", foreign + own)
    assert [job.id for job in list_jobs(["root"])] == ["7+0", "7+1", "8_1"]
    for broken in (own.replace("8_1", "x8"), "8_[1-...]|PENDING||||||\n", "8|PENDING\n"):  # may be one of ours
        slurm_commands.answer("squeue", foreign + broken)
        with pytest.raises(Unreachable, match="cannot be read"):
            list_jobs(["root"])
    slurm_commands.answer("squeue", "JOBID  STATE\n")  # as another program of this name might
    with pytest.raises(Unreachable, match="cannot be read"):
        list_jobs(["root"])


@given(st.sets(st.tuples(st.integers(1, 4), st.none() | st.integers(0, 60))))
def test_short_forms_of_ids_are_expanded_and_condensed(numbers: set[tuple[int, int | None]]) -> None:
    ids = {f"{job}" if index is None else f"{job}_{index}" for job, index in numbers}
    condensed = condense_ids(ids)
    assert {id for text in condensed for id in expand_ids(text)} == ids
    assert len(condensed) <= len({(job, index is None) for job, index in numbers})


@pytest.mark.parametrize(
    ("text", "indices"), [("3-5", [3, 4, 5]), ("0-8:4", [0, 4, 8]), ("7", [7]), ("1,3,6-7%50", [1, 3, 6, 7])]
)
def test_what_sbatch_takes_as_an_array_is_read(text: str, indices: list[int]) -> None:
    assert expand_ids(f"12_[{text}]") == [f"12_{index}" for index in indices]


@pytest.mark.parametrize("text", ["12_[3-...]", "", "abc", "12_[", "12.batch"])
def test_an_id_that_cannot_be_read_is_said_so(text: str) -> None:
    with pytest.raises(Unreachable, match="cannot be read"):
        expand_ids(text)


def test_the_user_s_own_settings_of_the_commands_mean_nothing(
    slurm_commands: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SQUEUE_FORMAT", "SQUEUE_PARTITION", "SACCT_FORMAT", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "x")
    list_jobs(["root"])
    seen = dict(line.partition("=")[::2] for line in (slurm_commands.folder / "environment").read_text().splitlines())
    assert "SQUEUE_FORMAT" not in seen and "SQUEUE_PARTITION" not in seen and "SLURM_TIME_FORMAT" not in seen
    assert seen["SLURM_CLUSTERS"] == "x" and seen["SLURM_BITSTR_LEN"] == "0"


def test_without_accounting_there_is_no_answer_rather_than_an_error(slurm_commands: FakeSlurm) -> None:
    slurm_commands.no_accounting()
    assert list_ended(["5"]) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"err": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", "code": 1},
         "squeue: slurm_load_jobs error: Unable to contact slurm controller (connect failure)"),
        ({"code": 3}, "squeue: ended with exit code 3"),
        ({"out": "5|RUNNING\n"}, "squeue: a line that cannot be read: '5|RUNNING'"),
        ({"wait": 30}, "squeue: no answer from SLURM in 0.3 s"),
    ],
)  # fmt: skip
def test_a_cluster_that_does_not_answer_is_one_clear_message(
    answer: dict, message: str, slurm_commands: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.3)
    slurm_commands.answer("squeue", **answer)
    with pytest.raises(Unreachable) as error:
        list_jobs(["root"])
    assert error.value.problems == [message]


def test_a_machine_without_slurm_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unreachable, match="squeue: no such command here"):
        list_jobs(["root"])
    assert os.environ["PATH"] == str(tmp_path)


def test_jobs_are_cancelled_in_one_call_and_ended_ones_are_no_error(slurm_commands: FakeSlurm) -> None:
    slurm.cancel([f"12_{index}" for index in range(1000)] + ["9"])
    assert slurm_commands.calls == ["scancel 9 12_[0-999]"]
    slurm_commands.answer("scancel", err="scancel: error: Kill job error on job id 9: Invalid job id specified", code=1)
    slurm.cancel(["9"])
    slurm_commands.answer("scancel", err="scancel: error: Kill job error on job id 9: Access/permission denied", code=1)
    with pytest.raises(Unreachable, match="permission denied"):
        slurm.cancel(["9"])


def test_the_cluster_s_configuration_is_read(slurm_commands: FakeSlurm) -> None:
    slurm_commands.answer("scontrol", RECORDED["config"])
    assert slurm.max_array_size() == 1001 and slurm.config()["ClusterName"] == "sandbox"
    slurm_commands.answer("scontrol", "")
    with pytest.raises(Unreachable, match="no MaxArraySize"):
        slurm.max_array_size()
