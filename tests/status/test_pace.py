"""What runs are doing and how long they will take, of claims and records whose times are known."""

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from lorabench.cluster.run_states import Standing
from lorabench.status.overview import status_text
from lorabench.status.pace import Usual, all_seconds_left, seconds_left, where_it_is
from lorabench.store.claim import take
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import RunState, Store
from tests.conftest import make_spec

PACE = {"step": 50, "steps": 200, "step_seconds_median": 0.5}


def standing(spec, status, measures=None, progress=None, began=0.0, folder=None):
    """A run that stands so; one with `progress` is worked on by this process, since `began` seconds ago."""
    started = (datetime.now(UTC) - timedelta(seconds=began)).isoformat()
    record = RunRecord(run_id=spec.id, spec=spec.to_json(), status=status, started=started, measures=measures or {})
    claim = None
    if progress is not None:
        with take(folder / spec.id, progress) as hold:
            claim = dataclasses.replace(hold._claim, progress=progress)
    return Standing(state=RunState(run_id=spec.id, status=status, spec=record.spec, record=record, claim=claim))


def done(seed, total, train, **changes):
    measures = {"total_seconds": total, "train_seconds": train}
    return standing(make_spec(seed=seed, steps=200, **changes), Status.DONE, measures)


@pytest.fixture
def running(tmp_path):
    def make(seed=0, progress=PACE, began=0.0, **changes):
        spec = make_spec(seed=seed, steps=200, **changes)
        return standing(spec, Status.RUNNING, None, progress, began, tmp_path)

    return make


def test_what_comes_beside_the_steps_is_that_of_the_runs_before_less_what_has_passed(running):
    usual = Usual.of([running(), done(1, 160, 100), done(2, 140, 100), done(3, 1000, 10, method={"name": "full"})])
    assert seconds_left(running(began=30), usual) == pytest.approx(75 + 50 - 5, abs=1)
    assert seconds_left(running(began=100), usual) == pytest.approx(75, abs=1)  # all has passed: more than usual
    assert seconds_left(running(progress={"phase": "load"}, began=30), usual) == pytest.approx(150 - 30, abs=1)


def test_of_another_kind_all_that_is_done_is_taken_and_of_none_the_base_s_evaluation(running):
    usual = Usual.of([running(), done(1, 160, 100), done(3, 80, 40, method={"name": "full"})])
    run = running(method={"name": "bitfit"}, began=25)
    assert seconds_left(run, usual) == pytest.approx(75 + (60 + 40) / 2, abs=1)
    nothing = Usual.of([])
    assert seconds_left(running(progress=PACE | {"evaluate_seconds": 8.0}), nothing) == 75 + 8
    assert seconds_left(running(progress={"phase": "load"}), nothing) is None
    assert seconds_left(done(1, 160, 100), usual) is None
    damaged = running(began=25)
    damaged.state.record.started = "yesterday"
    assert seconds_left(damaged, usual) == 75


def test_runs_not_begun_are_counted(running):
    before = [done(1, 160, 100), done(2, 160, 100)]
    two = [
        running(seed=3, began=25, progress=PACE | {"waiting": 7}),
        running(seed=4, began=25, progress=PACE | {"waiting": 6}),
    ]
    usual, each = Usual.of([*before, *two]), 75 + 60
    assert all_seconds_left([*before, *two], usual) == pytest.approx((6 * 160 + 2 * each) / 2, abs=1)
    missing = [standing(make_spec(seed=seed), Status.MISSING) for seed in range(10, 20)]
    assert all_seconds_left([*before, *two, *missing], usual) == pytest.approx((10 * 160 + 2 * each) / 2, abs=1)
    assert all_seconds_left(before, usual) is None and all_seconds_left(two, Usual.of([])) is None


def test_status_and_logs_say_what_a_run_is_doing(running, tmp_path):
    progress = PACE | {"phase": "generate", "done": 3, "of": 20, "loss": 2.34567}
    text = status_text(Store(tmp_path), [running(progress=progress)])
    assert "writing answers 3/20" in text and "2.346" in text and "50/200" in text
    line = where_it_is(running(seed=1, progress=PACE | {"phase": "evaluate base"}))
    assert line == "step 50/200, evaluating the base, 1 min 15 s left"
    assert where_it_is(done(1, 160, 100)) == ""


def test_unstable_runs_are_named(tmp_path):
    steady, climbs = done(1, 160, 100), done(2, 160, 100)
    climbs.state.record.measures["unstable"] = 1.0
    climbs.state.record.provenance["unstable"] = "loss 20% worse at its end than at step 40"
    lines = status_text(Store(tmp_path), [steady, climbs]).splitlines()
    noted = {line.split()[0]: "unstable: loss 20% worse" in line for line in lines if line.startswith("lora-")}
    assert noted == {steady.run_id: False, climbs.run_id: True}
