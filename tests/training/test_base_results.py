"""A base is evaluated once for all runs of a store that have it and their data in common; the numbers are the same."""

from __future__ import annotations

import json

import pytest

from lorabench.spec.run_spec import RunSpec
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.training import evaluation
from lorabench.training.execute import Options, execute
from tests.conftest import make_spec

TASK = {"name": "text", "max_train": 16, "max_eval": 4, "retain": "builtin:english-docs"}
BASE = ("base_valid_loss", "retain_loss_before")


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that have been evaluated, before and after training."""
    found: list[str] = []
    real = evaluation.metrics_of

    def noting(model, spec, examples, split, *rest):
        found.append(split)
        return real(model, spec, examples, split, *rest)

    monkeypatch.setattr(evaluation, "metrics_of", noting)
    return found


def run(store: Store, **changes: object) -> tuple[RunSpec, RunRecord]:
    spec = make_spec(**({"task": TASK, "steps": 2} | changes))
    store.write_spec(spec)
    assert execute(spec, store, Options(device="cpu")) == Status.DONE
    return spec, store.read(spec.id)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"seed": 1}),
        ({}, {"method": {"name": "full"}, "lr": 1e-3}),
        ({"method": {"name": "prompt", "num_tokens": 2}}, {"method": {"name": "ia3"}}),
        ({"quantization": "nf4"}, {"quantization": "nf4", "method": {"name": "lora", "rank": 4}}),
    ],
)
def test_the_second_run_takes_what_the_first_has_measured(first, second, tmp_path, evaluated):
    together, apart = Store(tmp_path / "together"), Store(tmp_path / "apart")
    _, one = run(together, **first)
    assert len(evaluated) == 5 and "base_valid_loss" not in one.provenance
    evaluated.clear()
    _, two = run(together, **second)
    assert len(evaluated) == 3 and "earlier run" in two.provenance["base_valid_loss"]
    _, alone = run(apart, **second)
    measured = [name for name in alone.measures if name.startswith(("valid_", "test_", "base_", "retain_", "forget"))]
    assert {name: two.measures[name] for name in measured} == {name: alone.measures[name] for name in measured}
    assert two.files == alone.files and {*BASE} <= {*measured}


@pytest.mark.parametrize(
    "second",
    [
        {"task": TASK | {"max_eval": 3}},
        {"task": TASK | {"retain": "builtin:python-code"}},
        {"seq_len": 16},
        {"batch_size": 4},
        {"quantization": "nf4"},
        {"dtype": "bfloat16"},
        {"method": {"name": "lora", "rank": 2, "init": "pissa"}},
    ],
    ids=str,
)
def test_what_is_not_the_same_is_measured(second, tmp_path, evaluated):
    """Also where a method changes the base's own bits before it is trained."""
    store = Store(tmp_path)
    run(store)
    evaluated.clear()
    _, record = run(store, **second)
    assert len(evaluated) == 5 and "base_valid_loss" not in record.provenance


def test_a_new_head_is_each_seed_s_own(tmp_path, evaluated, labelled, tiny_bases):
    store = Store(tmp_path)
    task = {"name": "classification", "data": labelled, "max_train": 16, "max_eval": 4}
    changes = {"task": task, "model": tiny_bases["bert"]}
    _, first = run(store, **changes)
    _, second = run(store, **changes, seed=1)
    _, third = run(store, **changes, lr=1e-3)
    assert first.measures["base_valid_loss"] != second.measures["base_valid_loss"]
    assert first.measures["base_valid_loss"] == third.measures["base_valid_loss"]
    assert [bool(each.provenance.get("base_valid_loss")) for each in (first, second, third)] == [False, False, True]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"row": 3, "metrics": {}}', '{"row": [], "metrics": {"a": "b"}}'])
def test_a_damaged_result_is_measured_anew(damage, tmp_path, evaluated):
    store = Store(tmp_path)
    _, first = run(store)
    (file,) = (tmp_path / "runs" / ".bases").iterdir()
    whole = file.read_bytes()
    file.write_text(damage)
    evaluated.clear()
    _, second = run(store, seed=1)
    assert len(evaluated) == 5 and file.read_bytes() == whole
    assert (
        first.measures["base_valid_loss"] == second.measures["base_valid_loss"] == json.loads(whole)["metrics"][BASE[0]]
    )
    assert store.run_ids() == sorted((first.run_id, second.run_id))


def test_answers_of_the_base_are_written_once(tmp_path, monkeypatch):
    from lorabench.training import generation

    calls: list[int] = []
    real = generation._generate
    monkeypatch.setattr(generation, "_generate", lambda *rest: calls.append(1) or real(*rest))
    task = {"name": "completion", "data": "builtin:arithmetic", "max_train": 16, "max_eval": 4}
    task["generate"] = {"max_new_tokens": 3, "answer": r"=(-?\d+)"}
    store = Store(tmp_path)
    for seed, count in ((0, 2), (1, 1)):
        calls.clear()
        run(store, task=task, seed=seed)
        assert len(calls) == count
