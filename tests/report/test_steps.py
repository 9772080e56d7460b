"""The logs of runs as one frame, and as a table."""

import dataclasses
import json

import pandas as pd
import pytest

from lorabench.report.analysis_rows import long_tables
from lorabench.report.columns import columns_page
from lorabench.report.results import load_results
from lorabench.report.tables import write_tables
from lorabench.store.record import STEPS_FILE, Status
from lorabench.store.steps import write_steps
from lorabench.store.store import Store
from tests import synthetic
from tests.report.test_results import GRID

ROWS = [
    {"step": 1, "loss": 3.5, "grad_norm": 0.25, "lr": 0.5},
    {"step": 2, "loss": 3.25, "grad_norm": 0.125, "lr": 0.25},
    {"step": 2, "valid_loss": 3.375},
]
"""Of which the last two are of one step."""


def log(store: Store, spec, rows=ROWS, status=Status.DONE) -> None:
    """A run with this log of its steps, and the record of it."""
    digest = write_steps(store.folder(spec.id) / STEPS_FILE, [json.dumps(row) + "\n" for row in rows])
    record = dataclasses.replace(synthetic.record(spec), status=status, error=None, steps_sha256=digest)
    store.write_spec(spec)
    store.write(record)


@pytest.fixture
def logged(tmp_path):
    """Full fine-tuning and LoRA with their logs, of which each has another length."""
    text = GRID + '[[grid]]\nmethod.name = "full"\nlr = 1e-3\n'
    store, sweep = Store(tmp_path), synthetic.read(text)
    for number, spec in enumerate(sweep.runs, 1):
        log(store, spec, ROWS if number % 2 else ROWS[:number] * (number < 3))
    return store, sweep


def test_every_step_has_a_row_with_its_run_and_what_was_evaluated_after_it(logged):
    store, sweep = logged
    results = load_results(store, sweep)
    keys = ["method.name", "method.rank", "lr", "seed"]
    assert list(results.steps) == ["run_id", *keys, "step", "loss", "grad_norm", "step_lr", "valid_loss"]
    for run_id in results.runs.index:
        lines = (store.folder(run_id) / STEPS_FILE).read_text().splitlines()
        mine = results.steps[results.steps["run_id"] == run_id]
        for key in keys:
            assert all(value == results.runs.loc[run_id, key] or pd.isna(value) for value in mine[key]), key
        found = [
            {name: value for name, value in row.items() if not pd.isna(value) and name not in ("run_id", *keys)}
            for row in mine.rename(columns={"step_lr": "lr_"}).to_dict("records")
        ]
        wanted: dict[int, dict] = {}
        for row in map(json.loads, lines):
            wanted.setdefault(row["step"], {}).update({"lr_" if k == "lr" else k: v for k, v in row.items()})
        assert found == list(wanted.values())


def test_what_is_no_whole_log_counts_as_none_and_so_does_that_of_a_run_that_goes_on(logged):
    store, sweep = logged
    cut, gone, odd, going, stopped, *others = sweep.runs[::2]
    (store.folder(gone.id) / STEPS_FILE).unlink()
    file = store.folder(cut.id) / STEPS_FILE
    file.write_bytes(file.read_bytes()[:-40])
    log(store, odd, [{"step": 1, "loss": [3.5]}])
    log(store, going, status=Status.RUNNING)
    log(store, stopped, status=Status.TIMEOUT)
    results = load_results(store, sweep)
    assert {spec.id for spec in (cut, gone, odd, going)}.isdisjoint(results.steps["run_id"])
    assert {spec.id for spec in (stopped, *others)} <= set(results.steps["run_id"])


def test_the_table_gives_back_the_frame_and_says_what_its_columns_are(logged, tmp_path):
    results = load_results(*logged)
    tables = long_tables(results)
    read = tables["steps"].to_pandas()
    for name in results.steps:
        own = results.steps[name]
        assert read[name].astype(object).where(read[name].notna()).equals(own.astype(object).where(own.notna())), name
    assert all(f"| `{name}` |" in columns_page(results, tables) for name in read)
    assert "| `step_lr` | the step's learning rate" in columns_page(results, tables)
    assert tmp_path / "t" / "steps.parquet" in write_tables(results, [], tmp_path / "t")
    assert "steps" not in long_tables(synthetic.shared())  # which has no logs


def test_another_log_is_another_report(logged):
    from lorabench.report.outputs import _digest

    store, sweep = logged
    before = _digest(load_results(store, sweep), [])
    assert before == _digest(load_results(store, sweep), [])
    log(store, sweep.runs[0], ROWS[:2])
    assert before != _digest(load_results(store, sweep), [])
