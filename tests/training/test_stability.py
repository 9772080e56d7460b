"""Which training is called unstable: series whose answer is known, and how often noise alone is."""

import numpy as np
import pytest

from lorabench.config.decode import decode
from lorabench.spec.run_spec import RunSpec
from lorabench.training.stability import instability, setback
from tests.conftest import make_spec

TEXT = make_spec(steps=100)
STEPS = np.arange(100)
FALLS = 3.0 + np.exp(-STEPS / 20)
"""From 4 to 3 nats, as training goes."""


def judged(values, spec=TEXT, starts=(4.0,), column="loss"):
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
    assert judged(values) == unstable
    assert judged(values, make_spec(steps=100, method={"name": "full"})) == unstable


def test_it_says_how_far_and_where():
    values = np.where(STEPS > 60, 3.75, 3.0)
    _, notes = instability(TEXT, [{"loss": value} for value in values], [4.0])
    assert notes == {"unstable": "loss 0.75 worse at its end than at step 10 (means over 10)"}
    values = np.where((STEPS >= 30) & (STEPS < 40), 5.0, 3.0)
    _, notes = instability(TEXT, [{"loss": value} for value in values], [4.0])
    assert notes == {"unstable": "loss 1 worse than at its start at step 40 (mean over 10)"}


def test_a_loss_below_that_of_the_untouched_base_has_not_climbed_above_its_start():
    """The first tenth of the steps has learned already: 2 nats of 4."""
    values = np.where((STEPS > 20) & (STEPS < 60), 3.0, 2.0) + noise()
    assert judged(values) is not None and not judged(values)
    assert judged(values, starts=(None,)) == 1.0


def test_too_few_steps_and_a_log_that_lacks_some_tell_nothing():
    assert judged(4.0 + STEPS[:6], make_spec(steps=6)) is None
    assert judged(FALLS[:80]) is None


def test_a_jump_where_a_task_begins_is_none():
    tasks = [{"name": "text", "data": data} for data in ("builtin:python-code", "builtin:english-docs")]
    spec = decode(RunSpec, {"method": {"name": "lora"}, "model": "builtin:tiny-llama", "tasks": tasks, "steps": 100})
    second = FALLS + 2
    assert judged([*FALLS, *second], spec, (4.0, 6.0)) == 0.0
    climbs = np.where(STEPS > 60, 5.9, second)
    assert judged([*FALLS, *climbs], spec, (4.0, 6.0)) == 1.0
    _, notes = instability(spec, [{"loss": value} for value in (*FALLS, *climbs)], (4.0, 6.0))
    assert notes["unstable"].startswith("loss of task 2 ")


def test_of_grpo_the_reward_is_looked_at_for_its_loss_is_no_likelihood():
    task = {"name": "completion", "data": "x.jsonl", "prompt": "{q}", "response": "{a}"}
    task |= {"generate": {"metrics": ["exact_match"], "max_new_tokens": 4}}
    spec = make_spec(steps=100, batch_size=8, task=task, objective={"name": "grpo"})
    learns = 0.1 + 0.5 * (1 - np.exp(-STEPS / 20))
    for reward, unstable in ((learns, 0.0), (np.where(STEPS > 60, 0.2, learns), 1.0)):
        rows = [{"step": step, "loss": step, "reward": share} for step, share in enumerate(reward)]
        assert instability(spec, rows, [2.0])[0] == {"unstable": unstable}


@pytest.mark.parametrize("learned, height, low, high", [(0.0, 0, 0, 0.1), (0.7, 0, 0, 0.01), (0.7, 1.2, 0.95, 1)])
def test_noise_is_seldom_called_unstable(learned, height, low, high):
    """Of 500 runs of the length and noise of the quickstart's: that learn nothing, that learn, and that climb on the
    way."""
    steps = np.arange(70)
    means = 3.8 - learned * (1 - np.exp(-steps / 14)) + height * np.exp(-(((steps - 20) / 10) ** 2))
    found = [setback(means + 2.6 * noise(seed, 70), 3.8) for seed in range(500)]
    assert low <= sum(map(bool, found)) / len(found) <= high
