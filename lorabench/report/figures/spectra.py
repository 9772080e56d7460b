"""Singular values of ΔW, normalized by the largest, beside those of a random update of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.labels import series_label
from lorabench.report.update_metrics import RANK, rows_of
from lorabench.spec.figure import Axes, Canvas, Figure, Frame

FLOOR = 1e-6
"""Ratios below it are rounding of float32, and are not drawn."""
MOST_POINTS = 150
"""Of one curve: more are not seen."""


@dataclass(frozen=True, kw_only=True)
class Spectra(Figure):
    """A panel a method and setting, darker with the rank; methods without a rank stand in every panel."""

    section: ClassVar[str] = "spectra"
    needs: ClassVar[str] = "runs with a ΔW"
    intervals: ClassVar[bool] = False

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> Canvas | None:
        import pandas as pd

        from lorabench.report import drawing
        from lorabench.report.figures._curves import alike
        from lorabench.report.results import grouped

        values = _values(results, self.kinds)
        if values.empty:
            return None
        keys = [key for key in results.settings if key != RANK]
        ranked, level = values[values[RANK].notna()], values[values[RANK].isna()]
        places = [(dict(zip(keys, place, strict=True)), chunk) for place, chunk in grouped(ranked, keys)]
        panels = {series_label(keys, [*place.values()], full=True): (place, chunk) for place, chunk in places}
        look, handles = drawing.setting_looks(results), {}
        with drawing.facets(panels or [""], self.width, height=2.6) as grid:
            grid.set(yscale="log")
            for axes, (place, chunk) in zip(grid.axes.flat, panels.values() or [({}, ranked)], strict=True):
                shown = pd.concat([chunk.sort_values(RANK), alike(level, place)])
                for setting, rows in grouped(shown, results.settings):
                    own = dict(zip(results.settings, setting, strict=True))
                    _draw_curve(axes, rows, look(own))
                    if (rank := own.pop(RANK, None)) is None:
                        handles[series_label(keys, [*own.values()])] = look(own)
                    else:  # with several panels, whose colours differ, the shade alone tells the rank
                        plain = drawing.Look(drawing.REFERENCE, "")
                        handles[f"rank {rank}"] = look.shade(plain if len(panels) > 1 else look(own), rank)
            drawing.powers_of_two(axes, values["index"])
            axes.set_ylim(max(1e-4, axes.get_ylim()[0]), 1.4)
            drawing.plain_logarithmic(axes.yaxis)
            grid.set_axis_labels("Index i", "σᵢ / σ₁")
            drawing.legend_below(grid.figure, handles, "Gaussian" if values["null_ratio"].notna().any() else None)
        return grid.figure

    def caption(self) -> str:
        return (
            f"Singular values of the update relative to the largest: geometric mean over layers{self.of_kinds} and "
            "seeds, band from the 10th to the 90th percentile, up to the length that all layers have. Dashed: random "
            "Gaussian updates of the same shapes and ranks, beside which a decay is to be read."
        )


EXAMPLE = Spectra()


def _values(results: Any, kinds: tuple[str, ...]) -> Frame:
    """The singular values of the selected runs in the layers that all of them have, with ratios to the first."""
    from lorabench.report.results import shared

    frame = rows_of(results, "singular_values", kinds=kinds)
    if frame.empty:
        return frame
    frame = shared(frame).astype({"index": int, "value": float, "null": float})
    first = frame.groupby(["run_id", "layer"], observed=True)[["value", "null"]].transform("max")
    frame["ratio"] = frame["value"] / first["value"]
    frame["null_ratio"] = (frame["null"] / first["null"]).clip(lower=FLOOR)
    frame = frame[frame["ratio"] > FLOOR].join(results.runs[results.settings], on="run_id")
    return frame.assign(**{RANK: frame.get(RANK)})


def _draw_curve(axes: Axes, rows: Frame, look: Any) -> None:
    """Up to where every layer has singular values: past it the mean would be over the larger ones alone."""
    import numpy as np

    from lorabench.report.figures._curves import draw_curve

    counts = rows.groupby("index").size()
    last = counts.index[counts == counts.max()].max()
    shown = np.geomspace(1, last, MOST_POINTS).round() if last > MOST_POINTS else range(last + 1)
    how: dict[str, Any] = {"errorbar": ("pi", 80), "err_kws": {"alpha": 0.15, "linewidth": 0}}
    draw_curve(axes, rows[rows["index"].isin(shown)], look, "index", "ratio", "null_ratio", **how)
