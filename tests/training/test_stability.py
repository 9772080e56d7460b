"""Which training is called unstable: series whose answer is known, and how often noise alone is."""

import dataclasses
import math

import numpy as np
import pytest

from lorabench.config.decode import decode
from lorabench.spec.run_spec import RunSpec
from lorabench.store.claim import Hold
from lorabench.store.record import STEPS_FILE, RunRecord, Status
from lorabench.store.steps import read_steps
from lorabench.store.store import RunState, Store
from lorabench.training import evaluation
from lorabench.training.execute import Options, execute
from lorabench.training.run import Attempt
from lorabench.training.stability import course, from_record, instability, judged
from tests.conftest import make_spec

TEXT = make_spec(steps=100)
STEPS = np.arange(100)
FALLS = 3.0 + np.exp(-STEPS / 20)
"""From 4 to 3 nats, as training goes."""


def verdict(values, spec=TEXT, starts=(4.0,), column="loss"):
    """The measure, of a log with these values; what is evaluated on the way is in it too."""
    rows = [{"step": step, column: value} for step, value in enumerate(values, 1)]
    return instability(spec, [*rows, {"step": 50, "valid_loss": 99.0}], starts)[0].get("unstable")


def noise(seed=0, size=100):
    return np.random.default_rng(seed).normal(0, 0.1, size)


@pytest.mark.parametrize("values, unstable", [
    (FALLS, False),
    (FALLS + noise(), False),
    (np.full(100, 4.0), False),
    (np.where(STEPS == 50, 9.0, FALLS), False),  # a single step
    (np.where(abs(STEPS - 50) < 3, FALLS + 0.5, FALLS), False),  # for five: it comes back, and is below the start
    (np.where(STEPS > 60, 3.6, FALLS) + noise(), True),  # it does not
    (np.where(STEPS > 60, FALLS + 0.1, FALLS), False),  # by less than what counts
    (np.where((STEPS > 20) & (STEPS < 50), 4.6, FALLS) + noise(), True),  # worse than untouched for long
    (4.0 + STEPS / 100, True),  # it only rises
    (np.where(STEPS > 60, 3.4, FALLS) + 10 * noise(), False),  # drowned in noise
])  # fmt: skip
def test_known_answers(values, unstable):
    assert verdict(values) == unstable
    assert verdict(values, make_spec(steps=100, method={"name": "full"})) == unstable


def test_it_says_how_far_and_where():
    values = np.where(STEPS > 60, 3.75, 3.0)
    _, notes = instability(TEXT, [{"loss": value} for value in values], [4.0])
    assert notes == {"unstable": "loss 19% worse at its end than at step 10"}
    values = np.where((STEPS >= 30) & (STEPS < 40), 5.0, 3.0)
    _, notes = instability(TEXT, [{"loss": value} for value in values], [4.0])
    assert notes == {"unstable": "loss 25% worse than at its start at step 40"}


def test_a_loss_below_that_of_the_untouched_base_has_not_climbed_above_its_start():
    """The first tenth of the steps has learned already: 2 nats of 4."""
    values = np.where((STEPS > 20) & (STEPS < 60), 3.0, 2.0) + noise()
    assert verdict(values) is not None and not verdict(values)
    assert verdict(values, starts=(None,)) == 1.0


def test_too_few_steps_and_a_log_that_lacks_some_tell_nothing():
    assert verdict(4.0 + STEPS[:6], make_spec(steps=6)) is None
    assert verdict(FALLS[:80]) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_with_what_is_no_number_tells_nothing(value):
    assert verdict(np.where(STEPS == 50, value, FALLS)) is None


def two_tasks():
    tasks = [{"name": "text", "data": data} for data in ("builtin:python-code", "builtin:english-docs")]
    return decode(RunSpec, {"method": {"name": "lora"}, "model": "builtin:tiny-llama", "tasks": tasks, "steps": 100})


@pytest.mark.parametrize("before, unstable", [(6.0, 0.0), (4.0, 1.0)])
def test_of_an_older_record_each_task_begins_where_its_matrix_says(before, unstable):
    """The second task's first batches are easy: that 5 nats are no climb from 4 is told by the matrix alone."""
    spec = two_tasks()
    second = np.where(STEPS < 10, 4.0, 3.5 + 2.5 * np.exp(-STEPS / 20))
    matrix = [[4.0, 9.0], [3.0, before], [3.0, 5.0]]
    record = RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE, sequence={"matrices": {"loss": matrix}})
    rows = [{"loss": value} for value in (*FALLS, *second)]
    assert from_record(spec, record, rows)[0]["unstable"] == unstable
    record.sequence["matrices"]["loss"] = [[], [3.0], []]  # as nobody writes it
    assert from_record(spec, record, rows)[0]["unstable"] == 1.0


def test_a_jump_where_a_task_begins_is_none():
    spec = two_tasks()
    second = FALLS + 2
    assert verdict([*FALLS, *second], spec, (4.0, 6.0)) == 0.0
    climbs = np.where(STEPS > 60, 5.9, second)
    assert verdict([*FALLS, *climbs], spec, (4.0, 6.0)) == 1.0
    _, notes = instability(spec, [{"loss": value} for value in (*FALLS, *climbs)], (4.0, 6.0))
    assert notes["unstable"].startswith("loss of task 2 ")


def test_of_grpo_the_reward_is_looked_at_for_its_loss_is_no_likelihood():
    task = {"name": "completion", "data": "x.jsonl", "prompt": "{q}", "response": "{a}"}
    task |= {"generate": {"metrics": ["exact_match"], "max_new_tokens": 4}}
    spec = make_spec(steps=100, batch_size=8, task=task, objective={"name": "grpo"})
    learns = 0.1 + 0.5 * (1 - np.exp(-STEPS / 20))
    for reward, unstable in ((learns, 0.0), (np.where(STEPS > 60, 0.2, learns), 1.0)):
        rows = [{"step": step, "loss": step, "reward": share} for step, share in enumerate(reward)]
        assert instability(spec, rows, [2.0])[0]["unstable"] == unstable


def quickstart(seed, learned=0.7, height=0.0):
    """A run of its length and noise, which may climb on the way: for a while as high as `height` above its course."""
    steps = np.arange(70)
    means = 3.8 - learned * (1 - np.exp(-steps / 14)) + height * np.exp(-(((steps - 20) / 10) ** 2))
    return course(means + 2.6 * noise(seed, 70), 3.8)


@pytest.mark.parametrize("learned, height, low, high", [(0.0, 0, 0, 0.002), (0.7, 0, 0, 0.001), (0.7, 2.0, 0.95, 1)])
def test_noise_is_seldom_called_unstable_and_a_climb_often(learned, height, low, high):
    found = [bool(quickstart(seed, learned, height).text) for seed in range(1000)]
    assert low <= sum(found) / len(found) <= high


def states(*courses):
    """Runs of one setting, a seed each, of which each was judged alone."""
    for seed, each in enumerate(courses):
        spec = make_spec(steps=70, seed=seed)
        measures = {
            "train_climb": each.climb,
            "train_climb_errors": each.climb_errors,
            "unstable": float(bool(each.text)),
        }
        record = RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE, measures=measures)
        yield RunState(run_id=spec.id, status=Status.DONE, spec=record.spec, record=record)


def test_what_all_seeds_do_is_told_where_none_tells_it_alone():
    climbs = [
        each for seed in range(200) if (each := quickstart(seed, height=1.2)).climb_errors > 1.6 and not each.text
    ][:5]
    steady = [quickstart(seed) for seed in range(5)]
    assert not any(each.text for each in (*climbs, *steady)) and len(climbs) == 5
    for runs, unstable in ((climbs, 1.0), (steady, 0.0), (climbs[:1], 0.0)):
        found = judged([*states(*runs)])
        assert {state.record.measures["unstable"] for state in found} == {unstable}
        assert all(("as in other seeds" in state.record.provenance.get("unstable", "")) == unstable for state in found)
    mixed = judged([*states(*climbs, steady[0])])
    assert [state.record.measures["unstable"] for state in mixed] == [1.0] * 5 + [0.0]


@pytest.mark.parametrize("learned, most", [(0.0, 0.03), (0.7, 0)])
def test_three_steady_seeds_are_seldom_called_unstable(learned, most):
    runs = [states(*(quickstart(3 * number + seed, learned) for seed in range(3))) for number in range(300)]
    found = [any(state.record.measures["unstable"] for state in judged([*three])) for three in runs]
    assert sum(found) / len(found) <= most


def test_runs_of_another_setting_are_no_seeds():
    first, second = states(
        *[each for seed in range(50) if (each := quickstart(seed, height=1.2)).climb_errors > 2.6][:2]
    )
    other = {**second.record.spec, "lr": 0.5}
    apart = dataclasses.replace(second, record=dataclasses.replace(second.record, spec=other))
    assert [state.record.measures["unstable"] for state in judged([first, apart])] == [
        state.record.measures["unstable"] for state in (first, second)
    ]


def test_a_run_says_what_it_is_doing_and_records_its_course(tmp_path, monkeypatch):
    """A learning rate that is far too high; what its log tells later is what the run has recorded itself."""
    said = []
    monkeypatch.setattr(Hold, "check", lambda hold: said.append(dict(hold.progress)))
    spec = make_spec(steps=20, eval_every=10, lr=0.5, schedule="constant")
    store = Store(tmp_path)
    assert execute(spec, store, Options(device="cpu", log_to_file=False, waiting=4)) == Status.DONE
    record = store.read(spec.id)
    assert record.measures["unstable"] == 1.0 and record.provenance["unstable"].startswith("loss ")
    rows = read_steps(store.folder(spec.id) / STEPS_FILE, record.steps_sha256)
    assert len(rows) == 20 and "valid_loss" in rows[9]
    measures, notes = from_record(spec, record, rows)
    assert measures.items() <= record.measures.items() and notes.items() <= record.provenance.items()
    assert {each["phase"] for each in said} >= {"train", "save"}
    assert all(each["waiting"] == 4 and each.get("evaluate_seconds", 1) > 0 for each in said)


def test_phases_come_in_their_order(tmp_path, monkeypatch):
    phases, real = [], evaluation.metrics_of

    def phase(attempt, name, **progress):
        phases.append(name)
        attempt.hold.progress |= {"phase": name} | progress
        holds.append(attempt.hold)

    def metrics_of(*arguments):
        phases.append((holds[-1].progress["phase"],))
        return real(*arguments)

    holds: list[Hold] = []
    monkeypatch.setattr(Attempt, "phase", phase)
    monkeypatch.setattr(evaluation, "metrics_of", metrics_of)
    assert execute(make_spec(eval_every=3), Store(tmp_path), Options(device="cpu", log_to_file=False)) == Status.DONE
    distinct = [name for name, before in zip(phases, [None, *phases], strict=False) if name != before]
    wanted = ["load", "evaluate base", ("evaluate base",), "train", ("evaluate",), "evaluate", ("evaluate",), "save"]
    assert distinct == wanted
