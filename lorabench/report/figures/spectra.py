"""Singular values of ΔW, normalized by the largest, beside those of a random update of the same shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

    from lorabench.report.drawing import Look

RANK = "method.rank"
FLOOR = 1e-6
"""Ratios below it are rounding of float32, and are not drawn."""


@dataclass(frozen=True, kw_only=True)
class Spectra(Figure):
    """A panel a method and setting, darker with the rank; methods without a rank stand in every panel."""

    section: ClassVar[str] = "spectra"
    intervals: ClassVar[bool] = False

    kinds: tuple[str, ...] = ()
    """Kinds of layers to average over, such as `q_proj` (empty: every layer that all these runs have)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.labels import series_label
        from lorabench.report.results import grouped

        values = _values(results, self.kinds)
        if values.empty:
            return None
        keys = [key for key in results.settings if key != RANK]
        has_rank = values[RANK].notna() if RANK in values else values["ratio"].isna()
        ranked, level = values[has_rank], values[~has_rank]
        panels = {series_label(keys, place, full=True): (place, chunk) for place, chunk in grouped(ranked, keys)}
        panels = panels or {"": ((), ranked)}
        look = drawing.setting_looks(results)
        handles: dict[str, Any] = {}
        with drawing.style():
            grid = drawing.facets(panels, self.width, height=2.6)
            for title, axes in grid.axes_dict.items():
                place, chunk = panels[title]
                for (rank,), rows in sorted(grouped(chunk, [RANK]) if len(chunk) else [], key=lambda item: item[0]):
                    own = look(dict(zip(keys, place, strict=True)) | {RANK: rank})
                    _curve(axes, rows, own)
                    handles[f"rank {rank}"] = own.handle
                    if len(panels) > 1:  # whose colours differ: the shade alone tells the rank
                        handles[f"rank {rank}"] = drawing.Look(look.shade(drawing.REFERENCE, rank), "").handle
                for setting, rows in grouped(_same_base(level, keys, place), keys):
                    own = look(dict(zip(keys, setting, strict=True)))
                    _curve(axes, rows, own)
                    handles[series_label(keys, setting)] = own.handle
            drawing.powers_of_two(axes, [2**k for k in range(int(values["index"].max()).bit_length())])
            axes.set_yscale("log")
            axes.set_ylim(max(1e-4, axes.get_ylim()[0]), 1.4)
            drawing.plain_logarithmic(axes.yaxis)
            grid.set_axis_labels("Index i", "σᵢ / σ₁")
            if values["null_ratio"].notna().any():
                handles |= drawing.null_handle("Gaussian")
            drawing.legend_below(grid.figure, handles)
        return grid.figure

    def caption(self) -> str:
        return (
            f"Singular values of the update relative to the largest: geometric mean over layers{self.of_kinds} and "
            "seeds, band from the 10th to the 90th percentile, up to the length that all layers have. Dashed: random "
            "Gaussian updates of the same shapes and ranks, beside which a decay is to be read."
        )


EXAMPLE = Spectra()


def _values(results: Any, kinds: tuple[str, ...]) -> pd.DataFrame:
    """The singular values of the selected runs in the layers that all of them have, with ratios to the first."""
    import pandas as pd

    from lorabench.report.results import selected, shared
    from lorabench.report.update_metrics import chosen

    runs = selected(results).done
    frame = chosen(results.analyses.get("singular_values", pd.DataFrame()), runs, kinds)
    if frame.empty:
        return frame
    frame = shared(frame).astype({"index": int, "value": float, "null": float})
    first = frame.groupby(["run_id", "layer"], observed=True)[["value", "null"]].transform("max")
    frame["ratio"] = frame["value"] / first["value"]
    frame["null_ratio"] = frame["null"] / first["null"]
    return frame[frame["ratio"] > FLOOR].join(runs[results.settings], on="run_id")


def _same_base(level: pd.DataFrame, keys: list[str], place: tuple[Any, ...]) -> pd.DataFrame:
    """What has no rank, for a panel: the same in every key that it has, method and quantization apart."""
    from lorabench.report.results import kept_rows

    for key, value in zip(keys, place, strict=False):
        if key not in ("method.name", "quantization"):
            level = kept_rows(level, (item is None or item == value for item in level[key]))
    return level


def _curve(axes: Axes, values: pd.DataFrame, look: Look) -> None:
    """One series up to where every layer has singular values: past it the mean would be over the larger ones alone."""
    import numpy as np
    import seaborn as sns

    from lorabench.report.figures._curves import draw_null, thinned

    counts = values.groupby("index").size()
    index = thinned([i for i in counts.index if i <= counts.index[counts == counts.max()].max()])
    logs = values[values["index"].isin(index)].assign(
        ratio=lambda rows: np.log(rows["ratio"].clip(lower=FLOOR)),
        null_ratio=lambda rows: np.log(rows["null_ratio"].clip(lower=FLOOR)),
    )
    sns.lineplot(
        logs, x="index", y="ratio", ax=axes, legend=False, color=look.color, linestyle=look.dashes, marker=look.marker,
        markersize=3.6, markeredgecolor=look.color, zorder=3, err_kws={"alpha": 0.15, "linewidth": 0},
        markevery=[int(np.searchsorted(index, 2**k)) for k in range(12) if 2**k <= index[-1]],
        estimator=lambda found: np.exp(found.mean()), errorbar=lambda found: tuple(np.exp(found.quantile([0.1, 0.9]))),
    )  # fmt: skip
    draw_null(axes, np.exp(logs.dropna(subset=["null_ratio"]).groupby("index")["null_ratio"].mean()), look.color)
