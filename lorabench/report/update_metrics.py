"""Rows of one metric of ΔW with the settings of their runs, and which of many settings a figure has room for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

RANK = "method.rank"
VALUE, NULL = "value", "value:null"
"""The columns of what `per_run` gives, as `aggregate.cell` reads them."""
_OUTPUT = (
    r"to_out(\.0)?|to_add_out|o_proj|out_proj|out_lin|wo|o|attn\.c_proj|attention\.output\.dense|attention\.dense|"
    r"attn\.Wo|dense"
)
"""What an attention's last matrix is called."""
How = Literal["mean", "sum", "geometric"]
NAMES = {
    "spectrum.relative_norm": "‖ΔW‖ / ‖W0‖",
    "spectrum.effective_rank_entropy": "Effective rank of ΔW (directions)",
    "spectrum.stable_rank": "Stable rank of ΔW (directions)",
    "spectrum.rank_50": "Rank 50% of ΔW (directions)",
    "spectrum.rank_90": "Rank 90% of ΔW (directions)",
    "spectrum.rank_95": "Rank 95% of ΔW (directions)",
    "spectrum.rank_99": "Rank 99% of ΔW (directions)",
    "alignment.amplification": "Amplification factor",
    "intruders.num_intruders": "Intruder dimensions a matrix",
    "accumulation.growth": "Intruder dimensions added a matrix",
    "drift.task": "Drift on the task, E‖ΔW h‖² / E‖W0 h‖²",
    "drift.retain": "Drift on what is retained, E‖ΔW h‖² / E‖W0 h‖²",
    "survival.survival": "φ(32, 32), W0 and W0 + ΔW",
}


def axis_label(value: str) -> str:
    """What a measure or metric is called on an axis, with its unit."""
    from lorabench.report.labels import capitalized, with_unit

    return NAMES.get(value) or capitalized(with_unit(value))


def rows_of(results: Any, analysis: str, runs: pd.DataFrame | None = None, kinds: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of an analysis that belong to `runs`, of these kinds of layers alone where any are given.

    Where no runs are given, to those that are compared and done; of pairs of runs, both of them.
    """
    import pandas as pd

    frame = results.analyses.get(analysis, pd.DataFrame())
    for column in ("run_id", "run_a", "run_b"):
        if column in frame:
            frame = frame[frame[column].isin((results.selection.done if runs is None else runs).index)]
    return frame[frame["kind"].isin(kinds)] if kinds and "kind" in frame else frame


def metric_rows(results: Any, value: str, runs: pd.DataFrame | None = None, kinds: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of `analysis.metric` (`rows_of`) inside the model's blocks, `run_id` as plain text."""
    analysis, _, metric = value.partition(".")
    frame = rows_of(results, analysis, runs, kinds)
    if frame.empty:
        return frame
    frame = frame[(frame["metric"] == metric) & frame["depth"].notna() & frame["value"].notna()]
    return frame.astype({"run_id": str, "kind": str, "depth": int, "value": float, "null": float})


def at_place(results: Any, value: str, at: Mapping[str, Any]) -> pd.Series:
    """By run id the mean of a metric over the rows that have these values in these columns: of layers inside the
    model's blocks that all runs have; of pairs by their first run. `value` may end in `:null`: what chance gives there;
    it may be a measure of runs whose intruder dimensions have been scaled.

    Empty where there are no such rows.
    """
    import pandas as pd

    from lorabench.config import plugins
    from lorabench.report.results import shared
    from lorabench.spec.claim import NULL
    from lorabench.spec.measures import INTERVENED

    if value.startswith(INTERVENED):
        scaled = [{"run_id": run, **each} for run in results.runs.index for each in results.interventions.get(run, ())]
        rows, column = _at(pd.DataFrame(scaled), at), value.removeprefix(INTERVENED)
        return rows.groupby("run_id")[column].mean() if column in rows else pd.Series(dtype=float)
    analysis, _, metric = value.removesuffix(NULL).partition(".")
    frame, known = rows_of(results, analysis), plugins.plugin_class("analyses", analysis)
    by_chance: Mapping[str, Sequence[str]] = known.values  # type: ignore[attr-defined]
    columns = (metric, by_chance[metric][0]) if metric in by_chance else (VALUE, "null")
    frame = frame if metric in by_chance or "metric" not in frame else frame[frame["metric"] == metric]
    frame = _at(frame, at)
    column, by = columns[value.endswith(NULL)], "run_id" if "run_id" in frame else "run_a"
    if column not in frame or frame.empty:
        return pd.Series(dtype=float)
    rows = shared(frame.rename(columns={by: "run_id"}))
    return rows[column].astype(float).groupby(rows["run_id"].astype(object), observed=True).mean()


def _at(frame: pd.DataFrame, at: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that have one of the values, in each of these columns."""
    import numpy as np
    import pandas as pd

    for key, wanted in at.items() if len(frame) else ():
        items = wanted if isinstance(wanted, list) else [wanted]
        found = frame[key] if key in frame else pd.Series(None, frame.index, dtype=object)
        if pd.api.types.is_float_dtype(found):
            kept = np.any([np.isclose(found, item) for item in items], axis=0)
        else:
            kept = found.isin(items).to_numpy()
        frame = frame[kept]
    return frame


def per_run(results: Any, rows: pd.DataFrame, keys: Sequence[str], how: How = "mean") -> pd.DataFrame:
    """A row a run and each value of `keys`, over the run's layers, with its setting, seed and status.

    In the sweep's order, by run id; a null that no layer has stays missing. `geometric` is for ratios, of which few
    large ones would make the arithmetic mean.
    """
    import numpy as np

    numbers = [name for name in (VALUE, "null", "num_degenerate") if name in rows]
    if how == "geometric":
        rows = rows.assign(value=np.log(rows[VALUE]), null=np.log(rows["null"]))
    groups = rows.groupby(["run_id", *keys], sort=True, observed=True)[numbers]
    found = groups.sum(min_count=1) if how == "sum" else groups.mean()
    found = np.exp(found) if how == "geometric" else found
    found = found.rename(columns={"null": NULL}).reset_index().set_index("run_id")
    columns = dict.fromkeys([*results.settings, "seed", "status"])
    return results.runs[list(columns)].join(found, how="inner")


def shown_settings(results: Any, runs: pd.DataFrame, most: int, ranks: int = 4) -> list[tuple[Any, ...]]:
    """At most `most` of the settings of `runs`, in the sweep's order.

    Of each method at most so many `ranks` that all methods have room, the largest and the smallest first; where even
    the largest ranks are too many, those that do best by the measure that the sweep selects by.
    """
    from lorabench.report.results import grouped

    settings = [values for values, _ in grouped(runs, results.settings)]
    while len(settings) > most and ranks and RANK in results.settings:
        settings = _thinned(settings, results.settings.index(RANK), ranks)
        ranks -= 1
    if len(settings) > most:
        groups = grouped(results.runs.loc[runs.index.unique()], results.settings)
        scores = {values: _score(results, chunk) for values, chunk in groups}
        best = sorted(settings, key=scores.__getitem__)[:most]
        settings = [values for values in settings if values in best]
    return settings


def _thinned(settings: list[tuple[Any, ...]], place: int, most: int) -> list[tuple[Any, ...]]:
    """Of settings that differ in the rank alone at most `most`, evenly from the largest down to the smallest."""
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for values in settings:
        groups.setdefault(values[:place] + values[place + 1 :], []).append(values)
    kept = []
    for members in groups.values():
        members = sorted(members, key=lambda values: -(values[place] or 0))
        steps = range(min(most, len(members)))
        kept += [members[round(i * (len(members) - 1) / max(1, len(steps) - 1))] for i in steps]
    return [values for values in settings if values in kept]


def _score(results: Any, runs: pd.DataFrame) -> float:
    """The mean of what the sweep selects by, smaller being better; infinite where no run has it."""
    from lorabench.report.labels import measure

    by = results.sweep.select.by if results.sweep.select else f"valid_{results.quality}"
    mean = float(runs[by].mean()) if by in runs else float("nan")
    return float("inf") if mean != mean else -mean if measure(by).higher_is_better else mean


def by_setting(results: Any, rows: pd.DataFrame, settings: Sequence[tuple[Any, ...]]) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each of the settings, with its label; no two labels are the same."""
    from lorabench.report.labels import distinct, series_label
    from lorabench.report.results import grouped

    found = dict(grouped(rows, results.settings))
    labels: dict[str, tuple[Any, ...]] = {}
    for values in settings:
        labels[distinct(series_label(results.settings, values), labels, " ({})")] = values
    return [(label, found[values]) for label, values in labels.items() if values in found]


_PLACES = ("down", "mid", "up", "single")


def ordered_kinds(kinds: Iterable[str]) -> list[str]:
    """As a block computes: query, key, value, output, then the feed-forward, its last matrix at the end.

    Of a denoiser those of the blocks on its way down first, then the middle one's, then those on its way up. A part of
    ΔW, `q_proj[sBA]`, stands after it.
    """
    from lorabench.models.targets import DOWN, KINDS

    patterns = [*KINDS.values(), _OUTPUT]

    def place(kind: str) -> tuple[int, int]:
        first = kind.partition(".")[0]
        return _PLACES.index(first) if first in _PLACES else 0, within(kind)

    def within(kind: str) -> int:
        if re.search(rf"(^|\.){DOWN}", kind):
            return len(patterns) + 1
        return next((i for i, names in enumerate(patterns) if re.search(rf"(^|\.)({names})$", kind)), len(patterns))

    split = {kind: kind.partition("[")[::2] for kind in kinds}
    wholes = sorted(dict.fromkeys(whole for whole, _ in split.values()), key=place)
    return sorted(split, key=lambda kind: (wholes.index(split[kind][0]), split[kind][1]))


def common_layers(rows: pd.DataFrame, key: str) -> pd.DataFrame:
    """The rows of the layers that all runs have, of these the ones with most values of `key`.

    So that a mean or sum is over the same layers along a curve: a small layer has no 32 directions.
    """
    from lorabench.report.results import shared

    rows = shared(rows)
    counts = rows.groupby("layer", observed=True)[key].nunique()
    return rows[rows["layer"].isin(counts.index[counts == counts.max()])]
