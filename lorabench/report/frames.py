"""A sweep's results as frames in long form, for a person's own pandas: the sweep's keys are columns of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from pandas.api.types import union_categoricals

from lorabench.config import plugins
from lorabench.report.results import Results, is_number, selected
from lorabench.store.record import Status

SPECTRA = "singular_values"
"""The analysis that has a frame of its own."""
FIRST = ["run_id", "run_a", "run_b", "axis", "value_a", "value_b"]
LAST = ["layer", "kind", "depth", "analysis", "metric", "side", "step", "index", "k", "value", "null", "null_std"]


def runs_frame(results: Results) -> pd.DataFrame:
    """A row a run, in the sweep's order: the keys of its spec, `status`, `selected` (whether tables compare it), and
    each measure of its record. Numbers are numbers, and texts categories in the sweep's order."""
    runs = results.runs[[name for name in results.runs if not name.endswith(":na")]]
    specs = {name for run in results.sweep.runs for name in run.flat} | {"label"}
    frame = pd.DataFrame({name: _typed(runs[name]) if name in specs else runs[name] for name in runs})
    frame["status"] = pd.Categorical(runs["status"], [str(status) for status in Status], ordered=True)
    chosen = set(selected(results).run_ids)
    frame.insert(frame.columns.get_loc("status") + 1, "selected", [run_id in chosen for run_id in runs.index])
    return frame


def steps_frame(results: Results) -> pd.DataFrame:
    """A row a run and step, of the runs that have ended: `loss`, `grad_norm`, `step_lr` and what else was logged."""
    return _with_keys(results, results.steps.drop(columns=results.setting_keys), "run_id")


def spectra_frame(results: Results) -> pd.DataFrame:
    """A row a singular value of ΔW: `index` from 1, `value`, and `null`, the mean of random updates of that norm."""
    return _with_keys(results, results.analyses[SPECTRA], "run_id")


def metrics_frame(results: Results) -> pd.DataFrame:
    """A row a metric of a layer of a run: `analysis`, `metric`, `value` and what chance gives (`null`); the columns
    that tell several values of a metric apart (`side`, `k`, `epsilon`, `step`) are empty where it has but one."""
    return _with_keys(results, _joined(results, ("layer", "base", "trajectory", "base_trajectory")), "run_id")


def pairs_frame(results: Results) -> pd.DataFrame:
    """A row a metric of a layer of two runs that differ in `axis`; the sweep's keys are those of run `a`."""
    return _with_keys(results, _joined(results, ("pair", "base_pair")), "run_a")


def keys_of(results: Results) -> pd.DataFrame:
    """By run id, the keys that tell the sweep's runs apart."""
    names = list(dict.fromkeys([*results.settings, "method.name", *results.keys]))
    return pd.DataFrame({name: _typed(results.runs[name]) for name in names})


def _with_keys(results: Results, frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The rows with the keys of the run in column `by`, run ids in the sweep's order."""
    keys = keys_of(results)
    places = keys.index.get_indexer(frame[by].astype(object))
    known = keys.iloc[places].set_axis(frame.index)
    first = {name: _ordered(frame[name], keys.index) for name in FIRST if name in frame and name.startswith("run_")}
    frame = frame.assign(**first)
    head = [name for name in FIRST if name in frame]
    tail = [name for name in frame if name not in FIRST]
    tail.sort(key=lambda name: LAST.index(name) if name in LAST else LAST.index("step"))
    return pd.concat([frame[head], known, frame[tail]], axis=1)


def _joined(results: Results, needs: Sequence[str]) -> pd.DataFrame:
    """The frames of the analyses of such needs one below the other."""
    frames: list[pd.DataFrame] = []
    for name, frame in results.analyses.items():
        analysis: Any = plugins.plugin_class("analyses", name)
        if analysis.needs in needs and name != SPECTRA and (len(frame) or not frames):
            frames += [part.assign(analysis=name) for part in _long(frame, analysis.values)]
    frames = [frame for frame in frames if len(frame)] or frames[:1]
    for column in {column for frame in frames for column in frame if _is_text(frame[column])}:
        having = [frame for frame in frames if column in frame]
        words = union_categoricals([frame[column].astype("category") for frame in having]).categories
        for place, frame in enumerate(frames):
            texts = frame[column] if column in frame else pd.Series(None, frame.index, dtype=object)
            frames[place] = frame.assign(**{column: pd.Categorical(texts, words)})
    return pd.concat(frames, ignore_index=True)


def _long(frame: pd.DataFrame, values: dict[str, Sequence[str]]) -> list[pd.DataFrame]:
    """The frame with columns `metric`, `value`, `null` and `null_std` in the place of one column a metric."""
    if not values or frame.empty:
        return [frame]
    others = [name for name in frame if name not in values and not any(name in names for names in values.values())]
    return [
        frame[others].assign(
            metric=metric, value=frame[metric], **dict(zip(("null", "null_std"), map(frame.get, names), strict=False))
        )
        for metric, names in values.items()
    ]


def _is_text(column: pd.Series) -> bool:
    return isinstance(column.dtype, pd.CategoricalDtype) or not pd.api.types.is_numeric_dtype(column)


def _typed(column: pd.Series) -> pd.Series:
    """Numbers as numbers, NaN where there is none; texts as categories in order of appearance; all else as it is."""
    known = column.dropna()
    if len(known) and all(isinstance(value, bool) for value in known) and len(known) == len(column):
        return column.astype(bool)
    if all(map(is_number, known)):
        return pd.to_numeric(column)
    return _ordered(column, dict.fromkeys(known)) if all(isinstance(value, str) for value in known) else column


def _ordered(column: pd.Series, values: Iterable[Any]) -> pd.Series:
    """As categories in this order; "object" ones, for pandas' own texts compare with no other."""
    kind = pd.CategoricalDtype(pd.Index([*values], dtype=object), ordered=True)
    return column.astype(object).astype(kind)
