"""Runs, jobs, nodes and the controller that die: each run ends once, whole, and with the bits of a run left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from lorabench.spec.sweep import read_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute_pack
from tests.sandbox import Sandbox, send, started
from tests.study import BASE, LONG, Study, assert_same, attempts, slowed

PACKED = BASE + "steps = 40\n[[grid]]\nmethod.rank = [2, 4]\n"
"""Two runs of one pack."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with started() as sandbox:
        yield sandbox


def test_a_killed_run_is_told_and_the_others_of_its_job_go_on(study, long):
    sweep = study.sweep("long", LONG)
    with slowed(study.store):
        study.submit(sweep, cells_per_job=2)
        study.wait_until(study.running)
        (claim,) = [state.claim for state in study.store.states() if state.status == Status.RUNNING]
        os.kill(claim.pid, signal.SIGKILL)
    study.wait_until_idle()
    assert sorted(row["status"] for row in study.status().values()) == ["cancelled", "done"]
    study.submit(sweep)
    study.wait_until_idle()
    assert_same(study.store, long)


def test_a_killed_job_leaves_no_run_that_seems_to_go_on(study, long):
    sweep = study.sweep("long", LONG)
    with slowed(study.store):
        study.submit(sweep, cells_per_job=2)
        study.wait_until(study.running)
        study.kill_jobs()
        study.wait_until_idle(60)
    statuses = study.status()
    assert {row["status"] for row in statuses.values()} <= {"lost", "cancelled", "interrupted"}
    study.submit(sweep)
    study.wait_until_idle()
    assert_same(study.store, long)


def killed_between_checkpoints(study: Study) -> bool:
    """Whether the pack's process, which all of its runs have begun in, is killed: at a moment when they have
    checkpoints of one step, for the same pack goes on from there to the same bits."""
    claims = [state.claim for state in study.store.states() if state.status == Status.RUNNING]
    if len(claims) < 2 or not all(claim and claim.progress.get("step", 0) >= 2 for claim in claims):
        return False
    (pid,) = {claim.pid for claim in claims}
    send(pid, signal.SIGSTOP)
    files = [study.store.folder(run_id) / "checkpoint" / "state.pt" for run_id in study.store.run_ids()]
    steps = {torch.load(file)["step"] if file.exists() else None for file in files}
    is_between = len(steps) == 1 and None not in steps
    send(pid, signal.SIGKILL if is_between else signal.SIGCONT)
    return is_between


def test_a_killed_pack_goes_on_as_the_same_pack_to_the_same_bits(study, tmp_path):
    sweep = study.sweep("packed", PACKED)
    specs = read_sweep(sweep).runs
    whole = Store(tmp_path / "whole")
    assert set(execute_pack(specs, whole, Options(device="cpu"))) == {Status.DONE}
    with slowed(study.store):
        study.submit(sweep, cells_per_job=2, pack=2, checkpoint_seconds=0.1)
        study.wait_until(lambda: killed_between_checkpoints(study))
        study.wait_until_idle()
    assert study.statuses() == {"cancelled"}
    study.submit(sweep, cells_per_job=2, pack=2)
    study.wait_until_idle()
    assert_same(study.store, whole)
    assert set(attempts(study.store).values()) == {3}  # the killed one, who wrote down that it was, and the last
    for spec in specs:
        record = study.record(spec.id)
        assert record.environment["packed"] == 2 and record.resumed_from_step


def test_runs_of_a_node_that_dies_are_computed_on_another(study, long):
    with slowed(study.store):
        study.submit(study.sweep("long", LONG), cells_per_job=2, checkpoint_seconds=1)
        study.wait_until(study.running)
        (node,) = {job["node"] for job in study.sandbox.queue()}
        study.sandbox.fail_node(node)
        study.wait_until(lambda: study.status() and not study.running(), 30)
        study.wait_until(lambda: all(job["state"] == "PENDING" for job in study.sandbox.queue()), 60)
    study.wait_until_idle()
    assert_same(study.store, long)
    assert "NODE_FAIL" in study.sandbox.call("sacct", "-D", "-X", "-n", "-o", "state")
    study.sandbox.up()


def test_runs_go_on_without_their_controller_and_it_is_brought_back(study, long):
    """What is asked of it meanwhile ends in one message; what ended meanwhile is known once it is there again."""
    sweep = study.sweep("long", LONG)
    with slowed(study.store):
        study.submit(sweep, cells_per_job=2)
        study.wait_until(study.running)
        study.sandbox.fail_controller()
        assert study.statuses() <= {"running", "missing", "pending"}
        assert "Unable to contact" in study.talk or "not known" in study.talk
        study.submit(sweep, cells_per_job=2, code=2)
        assert "Traceback" not in study.talk
        study.lorabench("cancel", sweep, code=2)
        assert "Traceback" not in study.talk
    for run_id in long.run_ids():
        study.store.cancel_marker(run_id).unlink(missing_ok=True)
    study.sandbox.up()
    study.wait_until_idle()
    study.submit(sweep)
    study.wait_until_idle()
    assert_same(study.store, long)
    assert study.statuses() == {"done"}
