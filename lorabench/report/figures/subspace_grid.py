"""Subspace similarity φ(i, j) between two ranks or two seeds, as in figures 3 and 4 of the LoRA paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.figure import Figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as MatplotlibFigure

MAX_ROWS = 4
FIRST_KINDS = ("q_proj", "v_proj", "query", "value", "c_attn")


@dataclass(frozen=True, kw_only=True)
class SubspaceGrid(Figure):
    """A row a setting, a panel a kind of layer, and chance at the right on the same colours."""

    section: ClassVar[str] = "pairs"
    intervals: ClassVar[bool] = False

    between: Literal["method.rank", "seed"] = "method.rank"
    """Which axis the two runs differ in."""
    pair: tuple[int, int] | None = None
    """The two values (None: for ranks those nearest to the paper's 8 and 64, for seeds the mean over all pairs)."""
    rank: int | None = None
    """Between seeds: of which rank (None: the largest)."""
    kinds: tuple[str, ...] = ()
    """Kinds of layers, such as `q_proj` (empty: query and value, or else the first two)."""
    depth: int | None = None
    """Of which layer, counted from the input (None: the mean over all)."""
    side: Literal["input", "output"] = "input"
    """Right singular vectors (the layer's input) or left ones (its output)."""

    def draw(self, results: Any) -> MatplotlibFigure | None:
        from lorabench.report import drawing
        from lorabench.report.figures._heat import cell_room, draw_bar, draw_table, fitting, from_zero

        frame = _pairs(results, self)
        if frame.empty:
            return None
        kinds = self.kinds or _default_kinds(frame)
        frame = frame[frame["kind"].isin(kinds)]
        rows = _rows(frame, results, self.between)
        if frame.empty or not rows:
            return None
        panels = {}
        for title, chunk in rows:
            for kind in kinds:
                panels[f"{kind}, {title}" if title else kind] = _table(chunk[chunk["kind"] == kind], "phi")
            panels[f"chance, {title}" if len(rows) > 1 else "chance"] = _table(chunk, "chance")
        marks = [sorted({mark for table in panels.values() for mark in table.axes[axis]}) for axis in (0, 1)]
        tables = {title: table.reindex(index=marks[0], columns=marks[1]) for title, table in panels.items()}
        colors = from_zero(tables.values(), most=1.0)
        with drawing.style("white"):
            grid = drawing.facets(tables, self.width, height=1.75, columns=len(kinds) + 1)
            texts = fitting(list(tables.values()), cell_room(grid, 1.75))
            for (title, axes), text in zip(grid.axes_dict.items(), texts, strict=True):
                draw_table(axes, tables[title], colors, text)
            grid.set_axis_labels(*reversed(_axis_labels(rows[0][1], self.between)))
            side = "input side" if self.side == "input" else "output side"
            draw_bar(grid.axes.flat, colors, f"φ(i, j), {side}", aspect=18 * len(rows))
        return grid.figure

    def caption(self) -> str:
        where = f"layer {self.depth}" if self.depth is not None else "the mean over layers"
        which = "two ranks of one seed" if self.between == "method.rank" else "two seeds of one rank"
        vectors = (
            "right singular vectors (input side)" if self.side == "input" else "left singular vectors (output side)"
        )
        return (
            f"Subspace similarity φ(i, j) of the updates of {which}: the top i {vectors} of the first against the top "
            f"j of the second, {where} and seeds; 1 is the same subspace, 0 an orthogonal one (Hu et al. 2021, "
            "equation 4). Colours end at the largest value shown. Chance: what random subspaces of the same dimension "
            "give, max(i, j) / d."
        )


EXAMPLE = SubspaceGrid()


def _pairs(results: Any, figure: SubspaceGrid) -> pd.DataFrame:
    """The rows of the wanted pairs, with the spec columns of their first run."""
    import pandas as pd

    from lorabench.report.results import selected

    frame = results.analyses.get("subspace", pd.DataFrame())
    if frame.empty:
        return frame
    runs = selected(results).done
    frame = frame[(frame["axis"] == figure.between) & (frame["side"] == figure.side)]
    frame = frame[frame["run_a"].isin(runs.index) & frame["run_b"].isin(runs.index)]
    if figure.depth is not None:
        frame = frame[frame["depth"] == figure.depth]
    frame = frame.join(runs[[key for key in results.settings if key in runs]], on="run_a")
    pair = figure.pair
    if figure.between == "method.rank" and not frame.empty:
        pair = pair or _nearest_pair(frame)
    elif "method.rank" in frame and frame["method.rank"].notna().any():
        ranks = frame["method.rank"].dropna()
        frame = frame[frame["method.rank"] == (figure.rank or max(ranks))]
    if pair:
        frame = frame[(frame["value_a"] == pair[0]) & (frame["value_b"] == pair[1])]
    return frame


def _nearest_pair(frame: pd.DataFrame) -> tuple[int, int] | None:
    """Of the pairs of ranks with a smaller first, the one nearest to 8 and 64 (of equal ones the larger)."""
    from math import log2

    pairs = {(a, b) for a, b in zip(frame["value_a"], frame["value_b"], strict=True) if a < b}
    return min(pairs, key=lambda p: (abs(log2(p[0] / 8)) + abs(log2(p[1] / 64)), -p[0], -p[1]), default=None)


def _default_kinds(frame: pd.DataFrame) -> tuple[str, ...]:
    found = list(dict.fromkeys(frame["kind"]))
    return tuple([kind for kind in FIRST_KINDS if kind in found] or found)[:2]


def _rows(frame: pd.DataFrame, results: Any, between: str) -> list[tuple[str, pd.DataFrame]]:
    """One row a setting, each with its title."""
    from lorabench.report.labels import series_label
    from lorabench.report.results import grouped

    keys = [key for key in results.settings if key in frame and key != between and frame[key].nunique() > 1]
    groups = list(grouped(frame, keys))[:MAX_ROWS]
    return [(series_label(keys, values, full=True), chunk) for values, chunk in groups]


def _axis_labels(frame: pd.DataFrame, between: str) -> tuple[str, str]:
    from lorabench.report.labels import value_label

    a, b = (sorted(set(frame[column])) for column in ("value_a", "value_b"))
    if between == "seed":
        rank = frame["method.rank"].iloc[0] if "method.rank" in frame else None
        of = f", rank {value_label(rank)}" if rank is not None else ""
        return f"i (one seed{of})", f"j (another seed{of})"
    return f"i (rank {value_label(a[0])})", f"j (rank {value_label(b[0])})"


def _table(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The mean over layers and pairs, i by j."""
    return frame.groupby(["i", "j"])[column].mean().unstack("j")
