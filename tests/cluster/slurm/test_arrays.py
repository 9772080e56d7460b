"""Sweeps on a real SLURM, left alone: arrays, jobs of several runs, overlapping submits, ranks, cancelling."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sandbox import Sandbox, started
from tests.study import BASE, LONG, SHORT, Study, assert_same, attempts, computed_here, slowed


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with started() as sandbox:
        yield sandbox


def test_an_array_larger_than_its_parallelism(study, short):
    sweep = study.sweep("short", SHORT)
    study.submit(sweep, "--dry-run", parallel=2)
    assert not study.sandbox.queue()
    study.submit(sweep, parallel=2, gpus=1, device="cpu")
    assert len(study.sandbox.queue()) == 3
    assert study.statuses() <= {"pending", "running"}
    at_once = []

    def is_over() -> bool:
        jobs = study.sandbox.queue()
        at_once.append(sum(job["state"] == "RUNNING" for job in jobs))
        return not jobs

    study.wait_until(is_over)
    assert max(at_once) == 2
    assert_same(study.store, short)
    assert set(attempts(study.store).values()) == {1}
    study.submit(sweep)
    assert not study.sandbox.queue()  # all is done: nothing is submitted


def test_several_runs_share_a_job(study, short):
    study.submit(study.sweep("short", SHORT), cells_per_job=2)
    jobs = {row["queue"]["job_id"] for row in study.status().values()}
    assert len(jobs) == 2 and len(study.sandbox.queue()) == 2
    study.wait_until_idle()
    assert_same(study.store, short)
    assert set(attempts(study.store).values()) == {1}
    assert study.statuses() == {"done"}
    run_id = study.store.run_ids()[0]
    log = (study.store.folder(run_id) / "log.txt").read_text()
    assert log.strip() and log.strip() in study.lorabench("logs", run_id)


def test_two_submits_of_overlapping_sweeps_at_once_compute_each_run_once(study, short):
    sweeps = [
        study.sweep("narrow", BASE + "steps = 12\n[[grid]]\nmethod.rank = [1, 2]\n"),
        study.sweep("wide", BASE + "steps = 12\n[[grid]]\nmethod.rank = [2, 4]\n"),
    ]
    profile = study.profile()
    processes = [study.start("submit", sweep, "--cluster", profile) for sweep in sweeps]
    assert [(process.communicate(timeout=120), process.returncode)[1] for process in processes] == [0, 0]
    assert len(study.sandbox.queue()) <= 3
    study.wait_until_idle()
    assert_same(study.store, short)
    assert set(attempts(study.store).values()) == {1}


def test_two_tasks_on_two_nodes_train_one_run(study, tmp_path_factory):
    """As two processes on one machine do it, bit for bit; and as one process does it, up to rounding."""
    text = BASE.replace("dropout = 0.1", "rank = 2") + "steps = 12\n"
    sweep = study.sweep("ranks", text)
    study.submit(sweep, nodes=2, ranks_per_node=1)
    study.wait_until_idle()
    together, alone = (
        computed_here(Study(study.sandbox, tmp_path_factory.mktemp("here")), text, processes) for processes in (2, 1)
    )
    assert_same(study.store, together)
    (run_id,) = study.store.run_ids()
    assert study.record(run_id).attempts == 1
    measures, expected = study.record(run_id).measures, alone.read(run_id).measures
    assert measures["valid_loss"] != expected["valid_loss"]  # else one rank has done it all
    assert measures["valid_loss"] == pytest.approx(expected["valid_loss"], rel=1e-4)


def test_cancelled_runs_stop_with_a_checkpoint_and_go_on_when_submitted_again(study, long):
    sweep = study.sweep("long", LONG)
    with slowed(study.store):
        study.submit(sweep, parallel=1)
        study.wait_until(study.running)
        study.lorabench("cancel", sweep)
        study.wait_until_idle(60)
    assert study.statuses() == {"cancelled"}
    study.submit(sweep)
    study.wait_until_idle()
    assert_same(study.store, long)
    assert sorted(attempts(study.store).values()) == [1, 2]
    assert any(study.record(run_id).resumed_from_step for run_id in study.store.run_ids())
