"""`lorabench inspect --html`: one self-contained page about an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from lorabench.adapters.examine import inspection_figures
from lorabench.adapters.examine.inspection import Row, by_kind, current_parameters, facts
from lorabench.adapters.examine.inspection_text import pasted
from lorabench.report.aggregate import plain
from lorabench.report.page import Drawn, drawn, fill

METRICS = {
    "rank_90": "rank_90",
    "effective_rank_entropy": "Effective rank",
    "stable_rank": "Stable rank",
    "frobenius_norm": "‖ΔW‖",
    "relative_norm": "‖ΔW‖ / ‖W0‖",
    "noise_floor": "Noise floor",
    "powerlaw_alpha": "α",
}
CAPTIONS = {
    "spectra": "Singular values relative to the largest, a line a layer, coloured by its block; the kinds with the "
    "largest ‖ΔW‖ first, nine at most. Dashed: random updates of the same shapes and ranks, beside which a decay is to "
    "be read.",
    "heat_maps": "Which blocks and which modules changed, and in how many directions. White: not changed. The mean "
    "where a block has several layers of one kind; layers outside the blocks are in the table alone.",
    "profiles": "The same over depth, for the kinds with the largest ‖ΔW‖, seven at most. Dashed: random updates.",
}
PAGE_WIDTH = 110


def inspection_page(found: dict[str, Any], energy: float) -> str:
    """The page of what `inspect_adapter` gave; the advice for `energy` stands open."""
    rows = found["layers"]
    metrics = {key: label for key, label in METRICS.items() if any(row.get(key) is not None for row in rows)}
    return fill(
        "inspection.html.j2",
        source=found["source"],
        header=facts(found),
        guessed=found["scale_source"] == "assumed",
        notes=found["notes"],
        kinds=_table(["Kind", "Layers", "Rank"], metrics, by_kind(rows).items()),
        figures=list(_figures(rows)),
        advice=_advice(found, f"{100 * energy:g}"),
        layers=_table(["Layer", "Shape", "Rank", "s"], metrics, ((row["layer"], [row]) for row in rows)),
    )


def _figures(rows: list[Row]) -> Iterator[Drawn]:
    for name, caption in CAPTIONS.items():
        figure = getattr(inspection_figures, name)(rows)
        if figure is not None:
            yield drawn(name, caption, figure)


def _table(first: list[str], metrics: dict[str, str], groups: Any) -> dict[str, Any]:
    """A line a group of layers: what `first` names, then medians with those of random updates in brackets."""
    lines = []
    for name, rows in groups:
        known = {
            "Layers": str(len(rows)),
            "Shape": " × ".join(map(str, rows[0]["shape"])),
            "Rank": _several(rows, "rank", "dense"),
            "s": _several(rows, "scale", "–"),
        }
        lines.append([name, *(known[head] for head in first[1:]), *(_metric(rows, key) for key in metrics)])
    return {"heads": [*first, *metrics.values()], "rows": lines}


def _several(rows: list[Row], key: str, missing: str) -> str:
    values = sorted({row[key] for row in rows if row[key] is not None})
    if not values:
        return missing
    return f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g} – {values[-1]:.4g}"


def _metric(rows: list[Row], key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    nulls, stds = ([row[name][key] for row in rows if key in row[name]] for name in ("null", "null_std"))
    if not values:
        return "–"
    spread = f" ± {median(stds):.2g}" if stds else ""
    return plain(median(values)) + (f" ({median(nulls):.3g}{spread})" if nulls else "")


def _advice(found: dict[str, Any], shown: str) -> list[dict[str, Any]]:
    now = current_parameters(found["layers"])
    return [
        {
            "percent": percent,
            "open": percent == shown,
            "r": advice["r"],
            "exceptions": len(advice["rank_pattern"]),
            "parameters": f"{advice['num_parameters']:,}",
            "share": f"{100 * advice['num_parameters'] / now:.0f}%" if now else "",
            "text": pasted(advice, PAGE_WIDTH),
        }
        for percent, advice in found["rank_advice"].items()
    ]
