"""What a page shows of a run that is opened: spec, loss over the steps, layers, the end of its log; as compact data."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorabench.report.aggregate import FAILED
from lorabench.report.labels import (
    capitalized,
    measure,
    measure_label,
    series_label,
    shown_factor,
    value_label,
    with_unit,
)
from lorabench.report.results import Results, grouped, whole_layers
from lorabench.report.update_table import METRICS
from lorabench.spec.measures import MEASURES
from lorabench.store.record import Status
from lorabench.terminal.text import visible

MOST_POINTS = 60
"""Of one run's curve."""
ALL_POINTS, ALL_LAYERS, ALL_LOGS = 150_000, 200_000, 1_000_000
"""Points, numbers and characters of all runs together: a page stays small, however many runs a sweep has."""
LOG_LINES, LOG_WIDTH = 12, 160
MOST_SETTINGS = 1000
"""Those that cost against quality is shown of, the first of the sweep."""
Data = dict[str, Any]


def run_details(results: Results) -> Data:
    """Columns over all runs of the sweep in its order, and by a run's place in it its curve, layers and log.

    `common` has the keys of the specs that are alike in all runs; of the `keys` that differ, `values` are the texts and
    `codes` their numbers for each run, -1 where it has no such key.
    """
    runs, name = results.runs, f"valid_{results.quality}"
    specs = [spec.flat for spec in results.sweep.runs]
    names = list(dict.fromkeys(key for spec in specs for key in spec))
    columns = {key: list(runs[key]) for key in names}
    texts = {
        key: [value_label(value) if key in spec else None for value, spec in zip(columns[key], specs, strict=True)]
        for key in names
    }
    several = [key for key in names if len({*texts[key]}) > 1]
    values = [[text for text in dict.fromkeys(texts[key]) if text is not None] for key in several]
    places = [{text: place for place, text in enumerate(known)} for known in values]
    return {
        "ids": list(runs.index),
        "status": list(runs["status"]),
        "common": {key: texts[key][0] for key in names if key not in several},
        "keys": several,
        "values": values,
        "codes": [
            [-1 if text is None else known[text] for text in texts[key]]
            for key, known in zip(several, places, strict=True)
        ],
        "quality": {
            "label": with_unit(name),
            "values": _numbers(shown_factor(name) * runs[name]) if name in runs else [],
        },
        "curves": _curves(results),
        "layers": _layers(results),
        "logs": _logs(results),
    }


def cost_against_quality(results: Results) -> Data:
    """A point a setting that is compared: the means of every measure that costs or tells quality, over its seeds.

    `measures` are `{name, label, more}`, `more` whether more is better; `points` `{name, values}`.
    """
    done = results.selection.done
    groups = grouped(done, results.settings)[:MOST_SETTINGS]
    names = [name for name in MEASURES if name in done and MEASURES[name].higher_is_better is not None]
    names += [name for name in done if name.startswith("test_mean_")]
    places = {run_id: place for place, (_, runs) in enumerate(groups) for run_id in runs.index}
    kept = done.loc[list(places)]
    by_seed = kept[names].groupby([list(places.values()), kept["seed"].to_numpy()]).mean()
    means = by_seed.groupby(level=0).mean() * [shown_factor(name) for name in names]
    names = [name for name in names if means[name].nunique() > 1]
    return {
        "measures": [
            {"name": name, "label": capitalized(with_unit(name)), "more": bool(measure(name).higher_is_better)}
            for name in names
        ],
        "quality": f"valid_{results.quality}",
        "points": [
            {
                "name": series_label(results.settings, setting),
                "run": str(runs.index[0]),
                "values": _numbers(row),
            }
            for (setting, runs), row in zip(groups, means[names].to_numpy(float), strict=True)
        ],
    }


def _curves(results: Results) -> Data:
    """`grids` are the steps at which curves were sampled; of a run, which of them, its losses there, and
    `[step, value]` of what was evaluated meanwhile."""
    frame, name = results.steps, f"valid_{results.quality}"
    each = min(MOST_POINTS, ALL_POINTS // max(1, len(results.runs)))
    grids: dict[tuple[int, ...], int] = {}
    found: dict[int, list[Any]] = {}
    if frame.empty or "loss" not in frame or each < 2:
        return {"grids": [], "runs": {}, "label": ""}
    ids = frame["run_id"].astype("category").cat
    places = results.runs.index.get_indexer(list(ids.categories))[ids.codes]
    steps, losses = frame["step"].to_numpy(), frame["loss"].to_numpy(float)
    marks = frame[name].to_numpy(float) if name in frame else np.full(len(frame), np.nan)
    for place, rows in _by_place(places, np.isfinite(losses)).items():
        kept = rows[np.unique(np.linspace(0, len(rows) - 1, min(each, len(rows))).round().astype(int))]
        grid = grids.setdefault(tuple(steps[kept].tolist()), len(grids))
        found[place] = [grid, _numbers(losses[kept]), []]
    for place, rows in _by_place(places, np.isfinite(marks)).items():
        if place in found:
            found[place][2] = [[int(steps[row]), _short(marks[row])] for row in rows[-each:]]
    return {"grids": [list(steps) for steps in grids], "runs": found, "label": with_unit(name)}


def _by_place(places: np.ndarray, keep: np.ndarray) -> dict[int, np.ndarray]:
    """A run's place -> its rows, of those that are to be kept, in order."""
    rows = np.flatnonzero(keep)
    rows = rows[np.argsort(places[rows], kind="stable")]
    ends = np.flatnonzero(np.diff(places[rows])) + 1
    return {int(places[chunk[0]]): chunk for chunk in np.split(rows, ends) if len(chunk)}


def _layers(results: Results) -> Data:
    """Metrics of ΔW, one number a layer: of a run, `[layer, number, ...]` a layer."""
    heads: list[str] = []
    tables: list[pd.Series] = []
    for metric in METRICS:
        analysis, _, name = metric.partition(".")
        frame = results.analyses.get(analysis, pd.DataFrame())
        frame = frame[frame["metric"] == name] if len(frame) else frame
        if len(frame):
            rows = whole_layers(frame.astype({"layer": str, "run_id": str}))
            heads.append(capitalized(measure_label(metric)))
            tables.append(rows.groupby(["run_id", "layer"], sort=False)["value"].mean().rename(len(tables)))
    if not tables:
        return {"heads": [], "names": [], "runs": {}}
    table = pd.concat(tables, axis=1)
    names = list(dict.fromkeys(layer for _, layer in table.index))
    places = {layer: place for place, layer in enumerate(names)}
    found: dict[int, list[Any]] = {}
    if table.size <= ALL_LAYERS:
        for (run_id, layer), row in zip(table.index, table.to_numpy(float), strict=True):
            lines = found.setdefault(int(results.runs.index.get_loc(run_id)), [])
            lines.append([places[layer], *map(_short, row)])
    return {"heads": heads, "names": names if found else [], "runs": found, "left_out": not found}


def _logs(results: Results) -> dict[int, str]:
    """The ends of the logs, those of runs that have failed first, as long as there is room."""
    if results.root is None:
        return {}
    room = ALL_LOGS
    found: dict[int, str] = {}
    ids, status = list(results.runs.index), list(results.runs["status"])
    for place in sorted(range(len(ids)), key=lambda place: status[place] not in FAILED):
        if status[place] != Status.MISSING and room > 0:
            text = _tail(results.root / "runs" / ids[place] / "log.txt")
            room -= len(text)
            found |= {place: text} if text else {}
    return found


def _tail(file: Path) -> str:
    """The last lines of a log, each as it was last written; a bar that was drawn over itself counts once."""
    with contextlib.suppress(OSError), open(file, "rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(0, handle.tell() - 8192))
        lines = handle.read().decode(errors="replace").split("\n")
        last = [visible(line.rstrip("\r").rpartition("\r")[2]) for line in lines if line.strip()]
        return "\n".join(line[:LOG_WIDTH] for line in last[-LOG_LINES:])
    return ""


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [_short(value) for value in values]


def _short(value: float | None) -> float | None:
    """Four significant digits; None where it is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
