"""`lorabench inspect` for a terminal: 80 columns, plain characters, bold headings where the terminal has them."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable
from statistics import median
from typing import Any

import numpy as np

from lorabench.adapters.examine.inspection import (
    Row,
    by_kind,
    current_parameters,
    facts,
    ranks_text,
    significant,
    unfused,
)
from lorabench.linalg.nulls import null_spectra
from lorabench.terminal.sketch import bars, blocks
from lorabench.terminal.text import text_table

WIDTH = 80
FLOOR = 1e-6
"""Ratios of singular values below it are rounding of float32."""


def inspection_text(found: dict[str, Any], energy: float, bold: bool = False) -> str:
    """The summary of what `inspect_adapter` gave; with `bold`, headings have escape codes."""
    parts = [
        (found["source"], _facts(found)),
        ("Medians over the n layers of a kind; null: random updates of the same shapes", _kinds(found)),
        *_heats(found["layers"]),
        *_spectrum(found["layers"]),
        ("Ranks that keep ‖ΔW‖²", _advice(found, f"{100 * energy:g}")),
    ]
    return "\n\n".join(f"{heading(title, bold)}\n{body}" for title, body in parts)


def heading(text: str, bold: bool) -> str:
    return "\n".join(f"\033[1m{line}\033[0m" for line in text.splitlines()) if bold else text


def _facts(found: dict[str, Any]) -> str:
    pairs = [*facts(found), *(("note", note) for note in found["notes"])]
    return "\n".join(line for name, text in pairs for line in wrapped(f"  {name:<8}", text))


def wrapped(head: str, text: str) -> list[str]:
    """Lines of at most 80 columns; the text stands right of its head."""
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def _kinds(found: dict[str, Any]) -> str:
    table = []
    for kind, rows in by_kind(found["layers"]).items():
        table.append(
            {
                "kind": short(kind),
                "n": len(rows),
                "rank": ranks_text(rows).removeprefix("ranks ").removeprefix("rank "),
                "rank_90": middle(row["rank_90"] for row in rows),
                "(null)": middle(row["null"].get("rank_90") for row in rows),
                "eff. rank": middle(row["effective_rank_entropy"] for row in rows),
                "stable": middle(row["stable_rank"] for row in rows),
                "‖ΔW‖": middle(row["frobenius_norm"] for row in rows),
                "/ ‖W0‖": middle(row.get("relative_norm") for row in rows),
            }
        )
    columns = [name for name in table[0] if any(line[name] != "" for line in table)] if table else []
    return text_table(table, columns)


def short(kind: str) -> str:
    """At most 15 characters, so that a table keeps to the line: `…n.output.dense`, but `token_type_emb…`."""
    if len(kind) <= 15:
        return kind
    return f"…{kind[-14:]}" if "." in kind else f"{kind[:14]}…"


def middle(values: Iterable[float | None], digits: int = 3) -> str:
    """The median of those that are known; empty where none is."""
    known = [value for value in values if value is not None]
    return significant(median(known), digits) if known else ""


def _heats(rows: list[Row]) -> Iterable[tuple[str, str]]:
    """Kind of layer × depth, once for rank_90 and once for ‖ΔW‖."""
    depths = sorted({row["depth"] for row in rows if row["depth"] is not None})
    if len(depths) < 2:
        return
    for metric, title in (("rank_90", "rank_90"), ("frobenius_norm", "‖ΔW‖")):
        groups = by_kind([row for row in rows if row["depth"] is not None])
        means = [(short(kind), _over_depth(group, metric, depths)) for kind, group in groups.items()]
        known = [value for _, line in means for value in line if value is not None]
        if not known:
            continue
        name = max(len(kind) for kind, _ in means)
        lines = [f"{kind:<{name}}  {blocks(line, min(known), max(known))}" for kind, line in means]
        ends = f"▁ {min(known):.3g}   █ {max(known):.3g}"
        yield f"{title} by depth, from block {depths[0]} to {depths[-1]}   {ends}", "\n".join(lines)


def _over_depth(rows: list[Row], metric: str, depths: list[int]) -> list[float | None]:
    """The mean at each depth, of neighbouring depths where there are more than fit a line."""
    width = min(len(depths), WIDTH - 24)
    cells: list[list[float]] = [[] for _ in range(width)]
    for row in rows:
        if row[metric] is not None:
            cells[depths.index(row["depth"]) * width // len(depths)].append(row[metric])
    return [sum(cell) / len(cell) if cell else None for cell in cells]


def _spectrum(rows: list[Row]) -> Iterable[tuple[str, str]]:
    """Geometric mean over the layers that have the most usual number of singular values."""
    rows = [row for row in unfused(rows) if row["singular_values"][0] > 0]
    if not rows:
        return
    (size, count), *_ = Counter(len(row["singular_values"]) for row in rows).most_common()
    same = [row for row in rows if len(row["singular_values"]) == size]
    nulls = [null_spectra(*row["shape"], row["rank"]).mean(0)[:size] for row in same]
    values, marks = (_pooled(group) for group in ([row["singular_values"] for row in same], nulls))
    columns = np.unique(np.linspace(0, size - 1, min(size, WIDTH - 12)).round().astype(int))
    width = max(1, min(6, (WIDTH - 12) // len(columns)))
    lines = bars(values[columns].tolist(), marks[columns].tolist(), width=width)
    last = f"{size}".rjust(width * len(columns) - 1)
    of = f"all {count} layers" if count == len(rows) else f"the {count} of {len(rows)} layers that have {size} of them"
    title = "Singular values σᵢ / σ₁ (█) beside those of random updates (┄)"
    yield title, "\n".join([*lines, f"    i  1{last if size > 1 else ''}", f"       geometric mean of {of}"])


def _pooled(spectra: list[Any]) -> np.ndarray:
    ratios = np.array([np.maximum(np.asarray(S) / S[0], FLOOR) for S in spectra])
    return np.exp(np.log(ratios).mean(0))


def _advice(found: dict[str, Any], shown: str) -> str:
    now = current_parameters(found["layers"])
    table = [
        {
            "energy": f"{percent}%",
            "r": advice["r"],
            "exceptions": len(advice["rank_pattern"]),
            "parameters": f"{advice['num_parameters']:,}",
            "of now": f"{100 * advice['num_parameters'] / now:.0f}%" if now else "",
        }
        for percent, advice in found["rank_advice"].items()
    ]
    columns = ["energy", "r", "exceptions", "parameters", *(["of now"] if now else [])]
    head = f"To paste into a LoraConfig, {shown}% (α stays, so s = α / r differs by layer):"
    return "\n".join([text_table(table, columns), "", head, pasted(found["rank_advice"][shown])])


def pasted(advice: dict[str, Any], width: int = WIDTH) -> str:
    """`r=4, rank_pattern={…}` as Python and, but for `=`, JSON have it, broken between entries."""
    entries = [f"{json.dumps(key)}: {rank}," for key, rank in advice["rank_pattern"].items()]
    if not entries:
        return f"  r={advice['r']}, rank_pattern={{}}"
    lines = [f"  r={advice['r']}, rank_pattern={{", "   "]
    for entry in entries:
        if len(lines[-1]) + 1 + len(entry) > width and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {entry}"
    return "\n".join([*lines, "  }"])
