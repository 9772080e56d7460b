"""Tables and figures of some of a sweep's runs, and what is never compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lorabench.config.decode import InputError
from lorabench.report.comparisons import compare, outcome
from lorabench.report.drawing import setting_looks
from lorabench.report.results import Results, load_results
from lorabench.report.tables import build_tables
from lorabench.spec.sweep import Table, parse_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests import synthetic
from tests.conftest import TOY

FULL = {"method": {"name": "full"}}
TWO_TASKS = [
    {"task": {"name": "text", "data": data}, "method": {"name": name}}
    for data in ("builtin:python-code", "builtin:english-docs")
    for name in ("lora", "full")
]


@pytest.fixture(scope="module")
def results() -> Results:
    return synthetic.shared()


def test_a_part_has_its_runs_and_is_drawn_as_in_the_whole(results: Results) -> None:
    part = results.of(FULL)
    assert set(part.runs["method.name"]) == {"full"} and set(results.runs["method.name"]) == {"full", "lora"}
    assert {*part.settings} < {*results.settings}  # what they have in common tells them apart no more
    for name, frame in part.analyses.items():
        columns = [column for column in ("run_id", "run_a", "run_b") if column in frame]
        assert {*frame[columns].to_numpy().ravel()} <= {*part.runs.index}, name
    look, of_part = setting_looks(results), setting_looks(part)
    own, first = part.runs.iloc[0], results.runs.iloc[0]
    assert of_part(own[part.settings]) == look(own[results.settings]) != look(first[results.settings])
    assert results.of({}) is results


def test_a_table_shows_the_runs_that_it_names(results: Results) -> None:
    tables = parse_sweep({
        "base": TOY, "grid": [{"method": {"name": "lora"}}, FULL],
        "table": [{"rows": ["method.name"], "value": "valid_loss", "where": FULL, "name": "one"},
                  {"rows": ["method.name"], "value": "valid_loss", "name": "all"}],
    }).tables  # fmt: skip
    one, every = build_tables(with_tables(results, tables))[-2:]
    assert [row[0] for row in one.rows] == ["full"] and [row[0] for row in every.rows] == ["lora", "full"]
    assert one.rows[0] in every.rows
    assert one.notes[0] == "Of the runs with full alone." and not any("alone" in note for note in every.notes)


def with_tables(results: Results, tables: tuple[Table, ...]) -> Results:
    return dataclasses.replace(results, sweep=dataclasses.replace(results.sweep, tables=tables))


@pytest.mark.parametrize("block", ["table", "figure"])
def test_who_is_named_must_be_there(block: str) -> None:
    own = {"table": {"rows": ["seed"], "value": "valid_loss"}, "figure": {"name": "rank_quality"}}[block]
    unknown = {"seed": 5}, {"lrr": 1}, {"seed": [0, 5]}
    told = "is no run of this sweep", "unknown key 'lrr'", r"where\.seed: 5 is no run's of this sweep"
    for where, words in zip(unknown, told, strict=True):
        with pytest.raises(InputError, match=words) as raised:
            parse_sweep({"base": TOY, "grid": [FULL], block: [own | {"where": where}]})
        assert raised.value.problems[0].startswith(f"{block} 1: where")


def test_what_is_measured_on_other_data_is_never_compared(tmp_path: Path) -> None:
    """Whichever task is the easier one would have won."""
    sweep = parse_sweep({"base": {"model": TOY["model"], "seed": [0, 1, 2]}, "grid": TWO_TASKS})
    results = load_results(Store(tmp_path), sweep)
    losses = [
        (1.0 if "english" in run.task.data else 3.0) + 0.5 * (run.method.name == "lora") + 0.01 * run.seed
        for run in sweep.runs
    ]
    results = dataclasses.replace(results, runs=results.runs.assign(valid_loss=losses, status=Status.DONE))
    assert {*results.by_task} == {"builtin:python-code", "builtin:english-docs"}
    for task, part in results.by_task.items():
        found = compare(part, part.selection)
        assert found and found.num_pairs == 1 and found.best.name == "full", task
    told = outcome(results)
    assert told and [row[:2] for row in told.sheet.rows] == [
        [task, name] for task in results.by_task for name in ("full", "lora")
    ]
    best = [line for line in told.sentences if "Best is" in line]
    assert [line.partition(": ")[0] for line in best] == [*results.by_task]
