"""`lorabench compare` of three or more adapters for a terminal: 80 columns, plain characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lorabench.adapters.examine.comparison_text import first_of
from lorabench.adapters.examine.ensemble import SIDES, Row
from lorabench.adapters.examine.inspection import by_kind
from lorabench.adapters.examine.inspection_text import heading, middle, short, wrapped
from lorabench.terminal.text import text_table

EXPLAINED, LEFT_OUT = "Energy that the best k directions hold", "Adapters left out in turn"


def ensemble_text(found: dict[str, Any], bold: bool = False) -> str:
    """The summary of what `compare_many` gave; with `bold`, headings have escape codes."""
    rows = found["layers"]
    pairs = [*facts(found), *(("note", note) for note in notes(found))]
    top = [line for name, text in pairs for line in wrapped(f"  {name:<8}", text)]
    parts = [(f"{len(found['adapters'])} adapters", "\n".join(top))]
    for side in SIDES if rows else ():
        groups = by_kind([row for row in rows if row["side"] == side])
        title = f"{side.capitalize()} side: medians by kind of layer, in brackets chance"
        held = [{"kind": short(kind), **_held(group)} for kind, group in groups.items()]
        tested = [{"kind": short(kind), **tested_cells(group)} for kind, group in groups.items()]
        body = [f"{EXPLAINED}:", text_table(held, list(held[0])), "", f"{LEFT_OUT}, k directions of the others:"]
        heads = [head for head in tested[0] if any(row[head] for row in tested)]
        parts.append((title, "\n".join([*body, text_table(tested, heads)])))
    return "\n\n".join(f"{heading(title, bold)}\n{body}" for title, body in parts)


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands at the top of the summary and of the page."""
    rows = found["layers"]
    names = [each["source"] for each in found["adapters"]]
    tested = sorted({row["num_left_out"] for row in rows})
    pairs = [("names", first_of(names)), ("layers", f"{len({row['layer'] for row in rows})} that all have")]
    return pairs + ([("tested", f"{'-'.join(map(str, tested))} of them are left out in turn")] if tested else [])


def notes(found: dict[str, Any]) -> list[str]:
    """What is not compared, and what the numbers may come from."""
    groups = [
        ("Not in all, or not in one shape", found["not_in_all"]),
        ("Unchanged in all but one", found["unchanged"]),
    ]
    said = [f"{reason}: {first_of(names)}." for reason, names in groups if names]
    starts = [row["factor_cosine"] for row in found["layers"] if row["side"] == "input"]
    alike = [cosine for cosine in starts if cosine is not None and cosine > 0.5]
    if len(alike) > len(starts) / 2:
        said.append(
            f"The factors A are alike (mean cosine {middle(alike, 2)}): the adapters seem to have begun at one random "
            "A, and then share input directions whatever they have learned."
        )
    return said


def points(row: Row) -> list[int]:
    """The numbers of directions that are shown: 1, k, and the last."""
    return sorted({1, min(row["k"], len(row["explained"])), len(row["explained"])})


def _held(rows: Sequence[Row]) -> dict[str, str]:
    shown = points(min(rows, key=lambda row: len(row["explained"])))
    cells = {
        f"k = {k}": percent([row["explained"][k - 1] for row in rows], [row["explained_chance"][k - 1] for row in rows])
        for k in shown
    }
    return {"adapters": middle(row["num_adapters"] for row in rows)} | cells


def tested_cells(rows: Sequence[Row]) -> dict[str, str]:
    """The medians of some rows of one side."""
    chance = [row["chance"] for row in rows]
    return {
        "k": middle(row["k"] for row in rows),
        "of the others": percent([row["left_out"] for row in rows], chance),
        "of their mean": percent([row["mean_directions"] for row in rows], chance),
        "beyond the mean": percent([row["beyond_mean"] for row in rows], chance),
        "mean adapter": percent([row["mean_adapter"] for row in rows], [row["mean_adapter_chance"] for row in rows]),
        "cos A" if rows[0]["side"] == "input" else "cos B": middle((row["factor_cosine"] for row in rows), 2),
    }


def percent(values: Iterable[float | None], chance: Iterable[float]) -> str:
    """`43% (1.2%)`; empty where there is none."""
    some = [100 * value for value in values if value is not None]
    return f"{middle(some, 2)}% ({middle((100 * value for value in chance), 2)}%)" if some else ""
