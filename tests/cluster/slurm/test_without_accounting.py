"""A cluster that keeps no accounting and sends no signal of its own before it preempts: `sacct` fails there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sandbox import Sandbox, started
from tests.study import LONG, assert_same, slowed


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with started("--no-accounting", "--no-preempt-signal") as sandbox:
        yield sandbox


def test_what_a_killed_job_leaves_is_lost_and_submitted_again(study, long):
    sweep = study.sweep("long", LONG)
    with slowed(study.store):
        study.submit(sweep, cells_per_job=2)
        study.wait_until(study.running)
        study.kill_jobs()
        study.wait_until_idle(60)
    rows = study.status()
    assert "lost" in {row["status"] for row in rows.values()} <= {"lost", "cancelled"}
    assert all(row["error"] for row in rows.values())
    study.submit(sweep)
    study.wait_until_idle()
    assert_same(study.store, long)


def test_preempted_runs_are_requeued_and_go_on(study, long):
    with slowed(study.store):
        study.submit(study.sweep("long", LONG), cells_per_job=2)
        study.wait_until(study.running)
        study.sandbox.preempt()
        study.wait_until(lambda: [job for job in study.sandbox.queue() if job["state"] == "PENDING"], 60)
    study.wait_until_idle()
    assert_same(study.store, long)
    assert any(study.record(run_id).resumed_from_step for run_id in study.store.run_ids())


def test_cancelled_jobs_are_told_from_lost_ones(study, long):
    """By the runs' own records: scancel's signal lets them write one."""
    with slowed(study.store):
        study.submit(study.sweep("long", LONG), parallel=2)
        study.wait_until(study.running)
        study.sandbox.call("scancel", "--user=root")
        study.wait_until_idle(60)
    assert "cancelled" in study.statuses() and study.statuses() <= {"cancelled", "lost"}
