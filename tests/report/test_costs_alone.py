"""What a sweep shows of memory and time is that of runs which had a process to themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lorabench.config.decode import InputError
from lorabench.report.figures.cost_quality import _points
from lorabench.report.results import load_results
from lorabench.report.tables import build_tables
from lorabench.spec.sweep import Sweep, parse_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests import synthetic
from tests.conftest import TOY

COST = [{"rows": ["method.name"], "value": ["peak_gib", "valid_loss"], "name": "cost"}]


def sweep(**more: object) -> Sweep:
    grid = [{"method": {"name": "lora", "rank": [1, 8]}}, {"method": {"name": "full"}}]
    return parse_sweep({"base": TOY | {"seed": [2, 0, 1]}, "grid": grid, **more})


@pytest.mark.parametrize(
    ("more", "num_alone"),
    [
        ({}, 0),
        ({"table": COST}, 3),
        ({"figure": [{"name": "cost_quality", "costs": ["tokens_per_second"]}]}, 3),
        ({"claim": [{"says": "so", "measure": "total_seconds", "at_most": 1}]}, 3),
        ({"claim": [{"says": "so", "measure": "peak_gib", "at_most": 1, "counted_on": "bert-base"}]}, 0),
        ({"table": COST, "select": {"cost": "shared"}}, 0),
        ({"select": {"cost": "alone"}}, 3),
    ],
)
def test_one_seed_of_each_setting_is_alone_where_costs_are_shown(more: dict, num_alone: int) -> None:
    found = sweep(**more)
    assert len(found.alone) == num_alone
    assert {run.seed for run in found.runs if run.id in found.alone} <= {0}


def test_a_word_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r'select\.cost = "some": unknown value'):
        sweep(select={"cost": "some"})


def test_costs_are_those_of_the_runs_alone(tmp_path: Path) -> None:
    """And all else is over all seeds."""
    store, own = Store(tmp_path), sweep(table=COST)
    for spec in own.runs:
        packed = {"packed": 4} if spec.method.name == "lora" and spec.seed else {}
        share = 0.25 if packed else 1.0
        record = synthetic.record(spec)
        store.write_spec(spec)
        store.write(dataclasses.replace(
            record, status=Status.DONE, error=None, environment={**record.environment, **packed},
            measures={"peak_gib": share, "valid_loss": 2.0 + spec.seed, "num_trainable": 10},
        ))  # fmt: skip
    results = load_results(store, own)
    assert set(results.runs["peak_gib"].dropna()) == {1.0}
    assert results.runs["peak_gib"].notna().sum() == 2 + 3 and results.runs["valid_loss"].notna().all()
    sheet = build_tables(results)[-1]
    assert any("5 of 9 runs that were computed alone" in note for note in sheet.notes)
    lora = next(row for row in sheet.rows if row[0] == "lora")
    assert lora[1].startswith("1") and "3" in lora[2]
    points = _points(results, results.selection.done, ("peak_gib",), "valid_loss")
    assert set(points["y"]) == {3.0} and set(points["x"]) == {1.0} and set(points["seeds"]) == {3}


def test_a_note_names_the_settings_whose_costs_are_shares(tmp_path: Path) -> None:
    """Where a table was asked for after they had all been computed in packs."""
    store, own = Store(tmp_path), sweep(table=COST)
    for spec in own.runs:
        packed = {"packed": 4} if spec.method.name == "lora" else {}
        record = synthetic.record(spec)
        store.write_spec(spec)
        store.write(dataclasses.replace(
            record, status=Status.DONE, error=None, environment={**record.environment, **packed},
            measures={"peak_gib": 1.0, "valid_loss": 2.0, "num_trainable": 10},
        ))  # fmt: skip
    (note,) = [note for note in build_tables(load_results(store, own))[-1].notes if "Packed" in note]
    assert "of 6 of 9 runs (lora, rank 1; lora, rank 8) a share" in note and "full" not in note
