"""`lorabench compare --html` of three or more adapters: one self-contained page."""

from __future__ import annotations

from typing import Any

from lorabench.adapters.examine import ensemble_figures
from lorabench.adapters.examine.ensemble import SIDES, Row
from lorabench.adapters.examine.ensemble_text import facts, notes, percent, tested_cells
from lorabench.adapters.examine.inspection import by_kind
from lorabench.report.page import Part, drawn, parts_page
from lorabench.terminal.text import TextTable

CAPTIONS = {
    "explained_energy": "Share of the adapters' energy, each of norm 1, in the best k directions of all of them; the "
    "mean over the layers of a kind. Dashed: updates of the same singular values in random directions.",
    "left_out_energy": "Share of a left-out adapter's energy in the top k directions of the others, of the others' "
    "mean, and of the others once the part along their mean is taken from all; the mean over the layers of a kind. A "
    "dash is k / d, what unrelated updates give.",
}
METHOD = [
    "Explained: the running sum of the eigenvalues of Σ ΔWᵀΔW (input side) or Σ ΔWΔWᵀ (output side), each ΔW of norm "
    "1 (Kaushik et al. 2025, arXiv 2512.05117). Chance keeps each adapter's singular values, and draws its directions.",
    "Left out: k is the rank of one adapter. Of the others: their top k directions. Of their mean: the top k "
    "directions of the mean adapter. Mean adapter: cos² of ΔW and the others' mean, what that one matrix explains. "
    "Beyond the mean: after a multiple of the mean is taken from all; no more than chance, and the mean explains it.",
    "Scales play no part. cos A, cos B: mean cosine of every two adapters' factors; near 1 they stand near one start.",
]


def ensemble_page(found: dict[str, Any]) -> str:
    """The page of what `compare_many` gave."""
    rows = found["layers"]
    figures = [drawn(name, text, getattr(ensemble_figures, name)(rows)) for name, text in CAPTIONS.items() if rows]
    names = [{"number": i, "adapter": each["source"], "format": each["format"], "layers": each["num_layers"]}
             for i, each in enumerate(found["adapters"], 1)]  # fmt: skip
    parts = [
        Part(
            title="Do they share a subspace?",
            tables=[_by_kind(rows, side) for side in SIDES if rows],
            figures=figures,
            notes=[*notes(found), *METHOD],
        ),
        Part(title="Layers", tables=[_by_layer(rows)] if rows else []),
        Part(title="Adapters", tables=[TextTable(title="", heads=list(names[0]), rows=names)]),
    ]
    return parts_page(f"{len(names)} adapters", facts(found), parts)


def _by_kind(rows: list[Row], side: str) -> TextTable:
    groups = by_kind([row for row in rows if row["side"] == side])
    lines = [{"kind": kind, "layers": len(group), **_cells(group)} for kind, group in groups.items()]
    title = f"{side} side: medians over the layers of a kind, in brackets chance"
    return TextTable(title=title, heads=["kind", "layers", *_heads(rows)], rows=lines)


def _by_layer(rows: list[Row]) -> TextTable:
    lines = [{"layer": row["layer"], **_cells([row])} for row in rows]
    return TextTable(title="", heads=["layer", *_heads(rows)], rows=lines)


def _cells(rows: list[Row]) -> dict[str, str]:
    at = min(min(row["k"], len(row["explained"])) for row in rows)
    values = [[row[key][at - 1] for row in rows] for key in ("explained", "explained_chance")]
    cells = tested_cells(rows)
    cosine = next(cells.pop(name) for name in ("cos A", "cos B") if name in cells)
    return {"side": rows[0]["side"], "explained": percent(*values), **cells, "cos A or B": cosine}


def _heads(rows: list[Row]) -> list[str]:
    return list(_cells(rows[:1]))
