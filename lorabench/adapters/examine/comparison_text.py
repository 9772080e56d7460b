"""`lorabench compare` for a terminal: 80 columns, plain characters, bold headings where the terminal has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorabench.adapters.examine.comparison import Row, mean_grid
from lorabench.adapters.examine.inspection import by_kind, significant
from lorabench.adapters.examine.inspection_text import heading, middle, short, wrapped
from lorabench.terminal.sketch import SHADES, shades
from lorabench.terminal.text import text_table

SIDES = ("input", "output")
MAX_CELLS = 16
COLUMNS = ("p × q", "φ(p, q)", "p-value", "corrected"), ("distance", "A in B", "B in A")
"""Of `measured`: all of them would not keep to the line."""


def comparison_text(found: dict[str, Any], bold: bool = False) -> str:
    """The summary of what `compare_adapters` gave; with `bold`, headings have escape codes."""
    rows = found["layers"]
    pairs = [*facts(found), *(("note", note) for note in [*found["notes"], *left_out(found)])]
    top = [line for name, text in pairs for line in wrapped(f"  {name:<8}", text)]
    parts = [(f"A = {found['a']['source']}\nB = {found['b']['source']}", "\n".join(top))]
    if rows:
        for side in SIDES:
            title = f"{side.capitalize()} side: medians by kind of layer, in brackets chance ± std"
            parts.append((title, "\n\n".join(_kinds(found, side, columns) for columns in COLUMNS)))
        parts.append(("Subspace similarity φ(i, j), mean over layers", "\n".join(_heat(rows))))
    return "\n\n".join(f"{heading(title, bold)}\n{body}" for title, body in parts)


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands at the top of the summary and of the page."""
    count = len({row["layer"] for row in found["layers"]})
    return [
        ("format", f"A {found['a']['format']}, B {found['b']['format']}"),
        ("layers", f"{count} compared; A has {found['a']['num_layers']}, B {found['b']['num_layers']}"),
    ]


def left_out(found: dict[str, Any]) -> list[str]:
    """What is not compared, and why."""
    shapes = [f"{each['layer']} ({_shape(each['a'])} and {_shape(each['b'])})" for each in found["different_shapes"]]
    groups = [
        ("Only in A", found["only_a"]),
        ("Only in B", found["only_b"]),
        ("Of different shapes", shapes),
        ("ΔW = 0 in A or B", found["unchanged"]),
    ]
    return [f"{reason}: {first_of(names)}." for reason, names in groups if names]


def _shape(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def first_of(names: list[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _kinds(found: dict[str, Any], side: str, columns: tuple[str, ...]) -> str:
    groups = by_kind([row for row in found["layers"] if row["side"] == side])
    table = [{"kind": short(kind), **measured(rows)} for kind, rows in groups.items()]
    return text_table(table, ["kind", *columns])


def measured(rows: list[Row]) -> dict[str, str]:
    """The medians of some rows of one side, with chance in brackets."""
    phi, chance, std = (middle((row[key][-1][-1] for row in rows), 2) for key in ("phi", "chance", "chance_std"))
    distance, mean = (middle(row[f"grassmann{key}"] for row in rows) for key in ("", "_chance"))
    spread = middle((row["grassmann_chance_std"] for row in rows), 2)
    return {
        "p × q": f"{middle(row['dim_a'] for row in rows)} × {middle(row['dim_b'] for row in rows)}",
        "φ(p, q)": f"{phi} ({chance} ± {std})",
        "p-value": middle((row["p_value"] for row in rows), 2),
        "corrected": middle((row["p_value_corrected"] for row in rows), 2),
        "distance": f"{distance} ({mean} ± {spread})",
        "A in B": _energy(rows, "a_in_b"),
        "B in A": _energy(rows, "b_in_a"),
    }


def _energy(rows: list[Row], key: str) -> str:
    shares = [row[f"energy_of_{key}"] for row in rows if row[f"energy_of_{key}"] is not None]
    if not shares:
        return ""
    chance, std = ([row[name][key] for row in rows] for name in ("energy_chance", "energy_chance_std"))
    return "{}% ({} ± {}%)".format(*(significant(100 * float(np.median(each)), 2) for each in (shares, chance, std)))


def _heat(rows: list[Row]) -> list[str]:
    """Both sides next to each other, in shades of the largest mean; of more than 16 directions means of neighbours."""
    grids = {side: np.nan_to_num(mean_grid([row for row in rows if row["side"] == side])) for side in SIDES}
    small = {side: _shrunk(grid) for side, grid in grids.items()}
    high = max(float(grid.max()) for grid in small.values()) or 1.0
    halves = [_half(side, small[side], grids[side].shape, high) for side in grids]
    left = max(len(line) for line in halves[0]) + 3
    joined = [f"{one:<{left}}{two}".rstrip() for one, two in zip(*halves, strict=True)]
    legend = "   ".join(f"{shade} {high * k / 4:.2g}" for k, shade in enumerate(SHADES) if k)
    return [*joined, f"     blank 0   {legend}"]


def _half(side: str, grid: np.ndarray, ends: tuple[int, ...], high: float) -> list[str]:
    p, q = ends
    marks = ["1" if i == 0 else str(p) if i == len(grid) - 1 else "" for i in range(len(grid))]
    lines = [f"{mark:>4} {line}" for mark, line in zip(marks, shades(grid.tolist(), high), strict=True)]
    return [f"     {side} side", f" i j 1{str(q).rjust(2 * grid.shape[1] - 1) if q > 1 else ''}", *lines]


def _shrunk(grid: np.ndarray) -> np.ndarray:
    """At most 16 × 16: means of neighbouring cells."""
    for axis in (0, 1):
        parts = np.array_split(grid, min(MAX_CELLS, grid.shape[axis]), axis=axis)
        grid = np.concatenate([part.mean(axis=axis, keepdims=True) for part in parts], axis=axis)
    return grid
