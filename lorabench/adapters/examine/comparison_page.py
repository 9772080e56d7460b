"""`lorabench compare --html`: one self-contained page about two adapters."""

from __future__ import annotations

from typing import Any

from lorabench.adapters.examine import comparison_figures
from lorabench.adapters.examine.comparison import Row
from lorabench.adapters.examine.comparison_text import facts, left_out, measured
from lorabench.adapters.examine.inspection import by_kind
from lorabench.report.page import drawn, fill

CAPTIONS = {
    "phi_grids": "Subspace similarity φ(i, j): the top i directions of A against the top j of B, the mean over the "
    "layers of a kind; right, what random subspaces of the same dimensions give.",
    "angles": "Principal angles between the two subspaces, the mean over the layers of a kind; dashed: random "
    "subspaces of the same dimensions.",
}
TITLES = {"input": "Input side: what the layers read", "output": "Output side: what the layers write"}


def comparison_page(found: dict[str, Any]) -> str:
    """The page of what `compare_adapters` gave."""
    rows = found["layers"]
    figures = {name: getattr(comparison_figures, name)(rows) for name in CAPTIONS} if rows else {}
    sides = [_side(title, [row for row in rows if row["side"] == side]) for side, title in TITLES.items()]
    return fill(
        "comparison.html.j2",
        a=found["a"],
        b=found["b"],
        header=[("A", found["a"]["source"]), ("B", found["b"]["source"]), *facts(found)],
        notes=[*found["notes"], *left_out(found)],
        sides=sides if rows else [],
        figures=[drawn(name, CAPTIONS[name], figure) for name, figure in figures.items()],
        layers=_table(["Layer", "Side"], [([row["layer"], row["side"]], [row]) for row in rows]),
    )


def _side(title: str, rows: list[Row]) -> dict[str, Any]:
    groups = [([kind, str(len(group))], group) for kind, group in by_kind(rows).items()]
    return {"title": title, **_table(["Kind", "Layers"], groups)}


def _table(first: list[str], groups: list[tuple[list[str], list[Row]]]) -> dict[str, Any]:
    lines = [(names, measured(rows)) for names, rows in groups]
    heads = list(lines[0][1]) if lines else []
    return {"heads": [*first, *heads], "rows": [[*names, *cells.values()] for names, cells in lines]}
