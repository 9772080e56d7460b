"""What the parts of a sweep may name: its runs' keys and their values, measures, and the places of a metric."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

from lorabench.config import plugins
from lorabench.config.decode import show
from lorabench.spec.analysis import COLUMNS, LAYERS, PAIRS
from lorabench.spec.claim import NULL, matches
from lorabench.spec.generate import METRICS
from lorabench.spec.measures import INTERVENED, MEASURES, Measure, find, of_sets
from lorabench.spec.run_spec import RunSpec, flatten, unflatten


def known_measures(runs: Sequence[RunSpec] = ()) -> Mapping[str, Measure]:
    """What a table can show: the measures of records, and each layer metric's mean (`spectrum.rank_90`).

    Metrics with several values a layer (over k, or a threshold) are none: their mean would say nothing.

    Of the metrics, only those that the tasks of `runs` report, those of sequences and of serving only where some run
    has them; all of them where no runs are given.
    """
    analyses: list[Any] = [plugins.plugin_class("analyses", name) for name in plugins.names("analyses")]
    if not runs:
        return _all_measures(tuple(analyses))
    absent = set() if any(run.tasks for run in runs) else {"sequence"}
    absent |= set() if any(run.serving for run in runs) else {"serving"}
    reports = {name for run in runs for name in (*run.stages[-1].reports, *run.objective.reports)}
    written = {name for run in runs for name in _written(run)}
    others = {split: other.reported for run in runs for task in run.stages for split, other in task.others.items()}
    if "retain" in others:
        reports |= {"retain_loss_before", "retain_loss_after"}
    retains = any(split.startswith("retain") for split in others)
    reports |= {"forgetting"} if retains else set()
    measures = {
        name: measure
        for name, measure in MEASURES.items()
        if retains or measure.group != "drift" or "_retain" not in name
        if measure.group != "metrics" or name in written or re.sub("^(base_)?(valid|test|train)_", "", name) in reports
        if measure.group not in absent
    }
    measures |= of_sets(others)
    moving = any(run.snapshot_every for run in runs)
    return measures | _layer_measures([a for a in analyses if moving or not a.is_over_training()])


def _written(run: RunSpec) -> Iterator[str]:
    """The measures of what a run's model writes, and its base, on the splits that it writes to."""
    generate = run.stages[-1].generation
    for split in generate.measured_splits if generate else ():
        for name in generate.reports if generate else ():
            short = "valid" if split == "validation" else split
            yield from (f"{short}_{name}", f"base_{short}_{name}")


@cache
def _all_measures(analyses: tuple[Any, ...]) -> Mapping[str, Measure]:
    """Asked for with each cell of a table."""
    return MappingProxyType(MEASURES | _layer_measures(analyses))


SCALED: tuple[str, ...] = ("scaled", "lambda", "epsilon", "k")
"""What tells evaluations of `lorabench intervene` apart: of what (`intruders`, `control`, `random`; `tuned`: the run as
it is), by how much, and what counts as an intruder."""


@cache
def places_of() -> dict[str, tuple[str, ...]]:
    """Metric of ΔW, and what chance gives for it -> the columns that tell its values apart: what `at` may name.

    So of the measures of runs whose intruder dimensions have been scaled.
    """
    scaled = [name for name in MEASURES if name == "forgetting" or name.startswith("valid_")]
    found = dict.fromkeys((f"{INTERVENED}{name}" for name in scaled), SCALED)
    for name in plugins.names("analyses"):
        analysis: Any = plugins.plugin_class("analyses", name)
        numbers = {*analysis.values, *(text for texts in analysis.values.values() for text in texts)}
        columns = [*LAYERS, *(PAIRS if analysis.is_of_pairs() else ()), *COLUMNS, *analysis.columns]
        columns = [key for key in columns if key not in {*numbers, "metric", "value", "null", "null_std"}]
        metrics = [*analysis.metrics, *analysis.values]
        found |= dict.fromkeys((f"{name}.{key}{end}" for key in metrics for end in ("", NULL)), tuple(columns))
    return found


def _layer_measures(analyses: Iterable[Any]) -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for analysis in analyses:
        name = plugins.plugin_name(analysis)
        units = dict.fromkeys(analysis.metrics, "") if analysis.needs == "layer" else analysis.per_layer
        found |= {f"{name}.{key}": Measure(units[key], None, analysis.metrics[key], name) for key in units}
    return found


def unknown_measures(values: list[str], known: Mapping[str, Any], where: str) -> list[str]:
    return [f"{where} = {show(value)}: {_why(value, known)}" for value in values if value not in known]


def _why(value: str, known: Mapping[str, Any]) -> str:
    found = find(value)
    is_written = any(metric in value for metric in METRICS) and found is not None
    if found is not None and value.startswith(("forgetting", "retain_", "drift_retain", "kl_retain")):
        return "is measured by no run of this sweep: give task.retain, the data that show what is forgotten"
    if found is not None and found.group == "serving":
        return "is measured by no run of this sweep: all of them have serving = false"
    return UNMEASURED if is_written else plugins.unknown("measure", value, list(known))


UNMEASURED = "is measured by no run of this sweep, or cannot be used here (answers: see task.generate.splits)"


def known_keys(runs: list[RunSpec]) -> list[str]:
    return list(dict.fromkeys(key for keys in dict.fromkeys(tuple(run.flat) for run in runs) for key in keys))


def unknown_keys(keys: list[str], known: list[str], where: str) -> list[str]:
    return [f"{where} = {show(key)}: {plugins.unknown('key', key, known)}" for key in keys if key not in known]


def unknown_runs(
    wanted: Mapping[str, Any], runs: Sequence[RunSpec], labels: Mapping[str, str], key: str, where: str
) -> list[str]:
    """Why `wanted`, the value of a field `key`, names none of the runs."""
    flat = flatten(dict(wanted))
    known = [*known_keys(list(runs)), *(["label"] if labels else [])]
    unknown = unknown_keys(list(flat), known, f"{where}{key}")
    if unknown or any(matches(run.flat | {"label": labels.get(run.id)}, flat) for run in runs):
        return unknown
    return [f"{where}{key} = {show(unflatten(flat))}: is no run of this sweep"]


def unknown_values(
    where: Mapping[str, Any], runs: Sequence[RunSpec], labels: Mapping[str, str], prefix: str
) -> list[str]:
    """Those of several values that are no run's, so that what they were to show would be missing without a word."""
    flats = [run.flat | {"label": labels.get(run.id)} for run in runs]
    flat = flatten(dict(where))
    if not any(matches(run, flat) for run in flats):
        return []  # told already
    listed = [(name, item) for name, items in flat.items() if isinstance(items, list) for item in items]
    strange = [(name, item) for name, item in listed if not any(matches(run, {name: item}) for run in flats)]
    return [f"{prefix}where.{name}: {show(item)} is no run's of this sweep" for name, item in strange]
