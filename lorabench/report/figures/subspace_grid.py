"""Subspace similarity φ(i, j) between two ranks or two seeds, as in figures 3 and 4 of the LoRA paper."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any, ClassVar, Literal

from lorabench.report.labels import series_label, value_label
from lorabench.report.update_metrics import RANK, rows_of
from lorabench.spec.figure import Canvas, Figure, Frame

MAX_ROWS = 4
FIRST_KINDS = ("q_proj", "v_proj", "query", "value", "c_attn")


@dataclass(frozen=True, kw_only=True)
class SubspaceGrid(Figure):
    """A row a setting, a panel a kind of layer, and chance at the right on the same colours."""

    section: ClassVar[str] = "pairs"
    needs: ClassVar[str] = "two runs with a ΔW of which only the rank or the seed differs"
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

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report.figures._heat import draw_similarities
        from lorabench.report.results import grouped

        frame = self._pairs(results)
        kinds = self.kinds or _default_kinds(frame)
        frame = frame[frame["kind"].isin(kinds)] if kinds else frame.iloc[:0]
        if frame.empty:
            return None
        keys = [key for key in results.settings if key in frame and key != self.between and frame[key].nunique() > 1]
        rows = {series_label(keys, place, full=True): chunk for place, chunk in grouped(frame, keys)[:MAX_ROWS]}
        panels = {}
        for title, chunk in rows.items():
            for kind in kinds:
                panels[f"{kind}, {title}" if title else kind] = _table(chunk[chunk["kind"] == kind], "phi")
            panels[f"chance, {title}" if len(rows) > 1 else "chance"] = _table(chunk, "chance")
        labels = self._axis_labels(next(iter(rows.values())))
        return draw_similarities(panels, len(kinds) + 1, labels, f"φ(i, j), {self.side} side", self.width)

    def _pairs(self, results: Any) -> Frame:
        """The rows of the wanted pairs, with the spec columns of their first run."""
        frame = rows_of(results, "subspace")
        if frame.empty:
            return frame
        frame = frame[(frame["axis"] == self.between) & (frame["side"] == self.side)]
        frame = frame if self.depth is None else frame[frame["depth"] == self.depth]
        frame = frame.join(results.runs[results.settings], on="run_a")
        pair = self.pair
        if self.between == RANK and not frame.empty:
            pair = pair or _nearest_pair(frame)
        elif RANK in frame and frame[RANK].notna().any():
            frame = frame[frame[RANK] == (self.rank or max(frame[RANK].dropna()))]
        if pair:
            frame = frame[(frame["value_a"] == pair[0]) & (frame["value_b"] == pair[1])]
        return frame

    def _axis_labels(self, frame: Frame) -> tuple[str, str]:
        if self.between == RANK:
            a, b = (value_label(min(frame[column])) for column in ("value_a", "value_b"))
            return f"i (rank {a})", f"j (rank {b})"
        rank = frame[RANK].iloc[0] if RANK in frame else None
        of = "" if rank is None else f", rank {value_label(rank)}"
        return f"i (one seed{of})", f"j (another seed{of})"

    def caption(self) -> str:
        where = f"layer {self.depth}" if self.depth is not None else "the mean over layers"
        which = "two ranks of one seed" if self.between == RANK else "two seeds of one rank"
        vectors = "right" if self.side == "input" else "left"
        others = " Drawn are two kinds of layers, query and value where there are such; subspace.csv has all."
        return (
            f"Subspace similarity φ(i, j) of the updates of {which}: the top i {vectors} singular vectors ({self.side} "
            f"side) of the first against the top j of the second, {where} and seeds; 1 is the same subspace, 0 an "
            "orthogonal one (Hu et al. 2021, equation 4). Colours end at the largest value shown. Chance: what random "
            f"subspaces of the same dimension give, max(i, j) / d.{'' if self.kinds else others}"
        )


EXAMPLE = SubspaceGrid()


def _nearest_pair(frame: Frame) -> tuple[int, int] | None:
    """Of the pairs of ranks with a smaller first, the one nearest to 8 and 64 (of equal ones the larger)."""
    pairs = {(a, b) for a, b in zip(frame["value_a"], frame["value_b"], strict=True) if a < b}
    return min(pairs, key=lambda p: (abs(log2(p[0] / 8)) + abs(log2(p[1] / 64)), -p[0], -p[1]), default=None)


def _default_kinds(frame: Frame) -> tuple[str, ...]:
    found = list(dict.fromkeys(frame.get("kind", ())))
    return tuple([kind for kind in FIRST_KINDS if kind in found] or found)[:2]


def _table(frame: Frame, column: str) -> Frame:
    """The mean over layers and pairs, i by j."""
    return frame.groupby(["i", "j"])[column].mean().unstack("j")
