"""COLUMNS.md: what stands in each table, column by column; made from what measures and analyses say of themselves."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

import pyarrow as pa

from lorabench.config import plugins
from lorabench.report.results import Results
from lorabench.spec.analysis import COLUMNS
from lorabench.spec.known import known_measures
from lorabench.spec.measures import find
from lorabench.spec.run_spec import RunSpec

RUN = {
    "run_id": "the run: its method and the hash of all that can change its numbers",
    "label": "what the sweep calls the run's setting",
    "status": "how the run has ended: done, oom, timeout, diverged, failed, ...; or missing, running",
    "error": "what went wrong, its last line",
    "attempts": "how often the run was begun",
    "finished": "when it ended, UTC",
    "selected": "whether tables and figures compare the run: it has the best value of what [select] chooses",
}
STEPS = {
    "step": "optimizer steps so far, over all tasks of a sequence",
    "loss": "what the step was trained on; of GRPO no likelihood",
    "grad_norm": "norm of the gradient, before it was clipped",
    "step_lr": "the step's learning rate; `lr` is the schedule's peak",
}
PAIR = {
    "run_a": "the first run of the pair",
    "run_b": "the second",
    "axis": "the one axis in which they differ: a key of sweep files, or `method` or `task` as a whole",
    "value_a": "what the first run has there: the key's value, or what the method or task is called",
    "value_b": "what the second has",
}
PAIR_OF_SETTINGS = {key: text for key, text in PAIR.items() if key[:3] != "run"}
LAYER = {
    "layer": "name of the module whose weight was changed",
    "kind": "last part of it: what layers of one role share over the blocks",
    "depth": "number of the block, from 0; empty outside the blocks",
    "analysis": "the analysis that the row is of",
}
SUBSPACE = {
    "side": COLUMNS["side"],
    "i": "top directions of the first runs",
    "j": "top directions of the second runs",
    "phi": "subspace similarity φ(i, j), the mean over pairs and layers",
    "phi_min": "the smallest",
    "phi_max": "the largest",
    "chance": "mean of φ(i, j) over random subspaces",
    "chance_std": "its standard deviation",
    "num_layers": "distinct layers behind it",
    "num_pairs": "pairs of runs behind it",
}
SHEET = {
    "measure": "the measure, as in runs.csv",
    "unit": "of mean and interval; %: times 100",
    "mean": "over seeds; runs of one seed are averaged first",
    "half_width": "half of the two-sided 95% Student-t interval over seeds",
    "low": "its lower end",
    "high": "its upper end",
    "null": "what chance gives, where the measure is one of ΔW",
    "n": "runs behind the mean",
    "num_seeds": "distinct seeds behind it",
    "num_failed": "runs of the cell that have failed",
    "num_pending": "runs of the cell that are still to be done",
    "status": "`done`, or how many of the cell's runs stand otherwise, or were trained unstably",
    "best lr": "the value that [select] has chosen, of the key that it chooses",
    "edge": "whether that is the largest or smallest of those tried: a better one may lie beyond",
}
KEY = "key of sweep files"
_KEYS = {item.name for item in dataclasses.fields(RunSpec)}
SAMPLE = (
    "Of more than 64 pairs that differ in nothing but their seeds those with the smallest hash of their run ids are "
    "compared, a sample that nothing else decides; of an axis with very many pairs each analysis takes so many:"
)


def column_text(name: str, analyses: Iterable[str]) -> str:
    """What a column of a long table is; KeyError where nobody says."""
    side, _, key = name.partition(".")
    if side in ("a", "b") and key:
        return f"`{key}` of run_{side}"
    own = {column: text for analysis in analyses for column, text in _class(analysis).columns.items()}
    known = {**COLUMNS, **RUN, **PAIR, **LAYER, **own}
    return known[name] if name in known or (name not in _KEYS and "." not in name) else KEY


def step_text(name: str) -> str:
    """What a column of the table of steps is."""
    objectives: list[Any] = [plugins.plugin_class("objectives", each) for each in plugins.names("objectives")]
    known = {key: text for objective in objectives for key, text in objective.columns.items()} | STEPS | RUN
    measure = find(name)
    return known.get(name) or (measure.text if measure else KEY)


def columns_page(results: Results, tables: dict[str, pa.Table]) -> str:
    """The page for the tables that are written of these results."""
    lines = ["# Columns", "", "What is shown in % elsewhere is a share from 0 to 1 here.", ""]
    lines += ["## runs.csv", "", "One row a run of the sweep.", "", *_runs(results), ""]
    lines += ["## Other csv files", "", "A row a cell of the table, its keys first.", ""]
    lines += [*_rows(("column", "what it is"), SHEET.items()), ""]
    if "subspace" in tables:
        what = "A row a setting, pair of values and kind of layer, for i and j that are powers of two."
        lines += ["## subspace.csv", "", f"{what} A key in which the two runs differ is empty.", ""]
        lines += [*_rows(("column", "what it is"), (SUBSPACE | PAIR_OF_SETTINGS).items()), ""]
    for name, table in tables.items():
        found = sorted(set(table["analysis"].unique().to_pylist())) if "analysis" in table.column_names else []
        text = partial(column_text, analyses=found) if found else step_text
        texts = [(column, text(column)) for column in table.column_names]
        lines += [f"## {name}.parquet", "", *_rows(("column", "what it is"), texts), ""]
        for analysis in found:
            lines += [*_analysis(analysis), ""]
    return "\n".join(lines).rstrip() + "\n"


def _runs(results: Results) -> list[str]:
    rows = []
    for name in ["run_id", *results.runs.columns]:
        measure, metric = find(name), name.removesuffix(":null")
        if name.endswith(":na"):
            rows.append((name, "", f"whether {name.removesuffix(':na')} does not apply to the run's method"))
        elif measure:
            rows.append((name, measure.unit, measure.text))
        elif metric in known_measures():
            text = "mean over layers (and sides) of this metric"
            rows.append((name, "", f"{text}'s `null`" if metric != name else f"{text}: {known_measures()[name].text}"))
        else:
            rows.append((name, "", RUN.get(name, KEY)))
    return _rows(("column", "unit", "what it is"), rows)


def _analysis(name: str) -> list[str]:
    """What an analysis says of itself, and of each of its metrics."""
    cls = _class(name)
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    lines = [f"### {name}", "", module.partition("\n")[0], "", inspect.getdoc(cls) or ""]
    if cls.is_of_pairs():
        lines += ["", f"{SAMPLE} {cls.max_pairs}."]
    if cls.metrics:
        several = (
            {}
            if cls.needs == "layer" or cls.is_of_pairs()
            else dict.fromkeys(cls.metrics.keys() - cls.per_layer, " (several a layer)")
        )
        lines += ["", *_rows(("metric", "what it is"), [(m, t + several.get(m, "")) for m, t in cls.metrics.items()])]
    return lines


def _rows(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A GitHub table whose first column is code."""
    texts = [[f"`{first}`", *(text.replace("|", "\\|") for text in rest)] for first, *rest in rows]
    return [f"| {' | '.join(cells)} |" for cells in [list(heads), ["---"] * len(heads), *texts]]


def _class(name: str) -> Any:
    return plugins.plugin_class("analyses", name)
