"""What a cluster does to a job by its rules: each run ends once, whole, and with the bits of a run left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sandbox import Sandbox, started
from tests.study import BASE, LONG, Study, assert_same, computed_here, slowed

ONE = LONG.replace("seed = [0, 1]", "seed = 0")

WIDE = BASE.replace("max_train = 64", "max_train = 256").replace("batch_size = 2", "batch_size = 256") + "steps = 1\n"
"""A GiB of activations."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with started() as sandbox:
        yield sandbox


def test_preempted_runs_are_requeued_and_go_on(study, long):
    with slowed(study.store):
        study.submit(study.sweep("long", LONG), cells_per_job=2)
        study.wait_until(study.running)
        study.sandbox.preempt()
        study.wait_until(lambda: [job for job in study.sandbox.queue() if job["state"] == "PENDING"], 60)
    assert study.statuses() <= {"pending", "running", "done"}
    study.wait_until_idle()
    assert_same(study.store, long)
    assert any(study.record(run_id).resumed_from_step for run_id in study.store.run_ids())


def test_a_run_that_does_not_fit_its_time_ends_as_timeout_after_so_many_tries(study, long):
    sweep = study.sweep("one", ONE)
    with slowed(study.store):
        study.submit(sweep, minutes=1, signal_seconds=50, max_timeouts=1)
        study.wait_until_idle(240)
    ((run_id, row),) = study.status().items()
    assert row["status"] == "timeout" and "2 times" in row["error"]
    study.submit(sweep)
    assert not study.sandbox.queue()
    study.submit(sweep, "--retry", "timeout", "--minutes", "30")
    study.wait_until_idle()
    assert_same(study.store, long, [run_id])


def test_a_run_without_enough_memory_ends_as_oom_and_is_done_with_more(study, tmp_path_factory):
    if not study.sandbox.keeps_memory_limits:
        pytest.skip("no control groups (version 1) to write to: this SLURM keeps no memory limits")
    sweep = study.sweep("wide", WIDE)
    study.submit(sweep, mem_gib=1)
    study.wait_until_idle()
    (row,) = study.status().values()
    assert row["status"] == "oom" and row["error"] == "killed by the kernel: out of memory"
    study.submit(sweep, "--retry", "oom", "--mem-gib", "4")
    study.wait_until_idle()
    assert_same(study.store, computed_here(Study(study.sandbox, tmp_path_factory.mktemp("wide")), WIDE))
