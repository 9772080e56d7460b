"""What `lorabench transfer` prints: a row a kind of layer, losses on the new base, and remarks beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from lorabench.report.aggregate import number, plain
from lorabench.report.page import Part
from lorabench.terminal.text import TextTable

KEPT = "Medians over the n layers of a kind; in brackets: random updates with ΔW's singular values, moved likewise"
DISTILLED = "What the new adapter has learned from: made prompts that the discriminator takes for the task's"
SHARES = {"kept": "kept", "overlap_out": "overlap out", "overlap_in": "overlap in"}
MOST = 4
"""Layers that are named of those left out for one reason."""


def by_kind(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kind of layer, in their order, medians: ‖ΔW'‖ / ‖ΔW‖, and φ(r, r) of ΔW's directions before and after.

    None where no width is the same.
    """
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return [
        {
            "kind": kind,
            "num_layers": len(of_kind),
            "ranks": _ends(row["rank"] for row in of_kind),
            "num_vectors": _ends(count for row in of_kind for count in row["num_vectors"]),
            **{key: _middle(row[key] for row in of_kind) for key in (*SHARES, *(f"{key}_null" for key in SHARES))},
        }
        for kind, of_kind in kinds.items()
    ]


def kept_table(rows: Sequence[dict[str, Any]]) -> TextTable:
    """`by_kind`, with chance in brackets."""
    table = []
    for row in by_kind(rows):
        line = {"kind": row["kind"], "n": row["num_layers"], "rank": _span(row["ranks"])}
        line["vectors"] = _span(row["num_vectors"])
        for key, head in SHARES.items():
            line |= {head: _share(row[key]), _chance(head): _share(row[f"{key}_null"])}
        table.append(line)
    heads = ["kind", "n", "rank", "vectors", *(each for head in SHARES.values() for each in (head, _chance(head)))]
    return TextTable(title=KEPT, heads=heads, rows=table)


def distilled_table(told: dict[str, Any]) -> TextTable:
    """What `trans-lora` has distilled on."""
    accuracy = f"{number(100 * told['discriminator_accuracy'], 0)}%"
    low, high = (number(100 * end, 0) for end in told["discriminator_interval"])
    row = {
        "prompts made": told["prompts_made"],
        "without end": told["prompts_without_end"],
        "repeated": told["prompts_repeated"],
        "kept": told["prompts_kept"],
        "share": f"{number(100 * told['kept_share'], 0)}%",
        "discriminator is right": accuracy,
        "[95%]": f"[{low}, {high}]",
        "of": told["discriminator_held_out"],
        "steps": told["steps"],
    }
    return TextTable(title=DISTILLED, heads=[*row], rows=[row])


def losses_table(rows: Sequence[dict[str, Any]]) -> TextTable:
    """A row a model: its loss, its gain over its base, and that as a share of the reference's."""
    table = [
        {"model": row["evaluated"], "loss": plain(row["loss"]), "[95%]": _interval(row["loss_interval"])}
        | ({"gain": plain(row["gain"]), "gain [95%]": _interval(row["gain_interval"])} if "gain" in row else {})
        | (
            {
                "recovered": f"{number(100 * row['recovered'], 0)}%",
                "recovered [95%]": _interval([100 * end for end in row["recovered_interval"]], 0),
            }
            if "recovered" in row
            else {}
        )
        for row in rows
    ]
    heads = ["model", "loss", "[95%]", "gain", "gain [95%]", "recovered", "recovered [95%]"]
    title = "Loss on the validation split in nats; gain: below its own base; intervals: bootstrap over examples"
    return TextTable(title=title, heads=[head for head in heads if any(head in row for row in table)], rows=table)


def remarks(found: dict[str, Any]) -> list[str]:
    """Of layers that are not moved, of signs that nothing tells, and of what the share recovered is a share of."""
    reasons: dict[str, list[str]] = {}
    for layer, reason in found["left_out"].items():
        reasons.setdefault(reason, []).append(layer)
    lines = [
        f"left out: {', '.join(layers[:MOST])}{f', … ({len(layers)} in all)' if len(layers) > MOST else ''}: {reason}"
        for reason, layers in reasons.items()
    ]
    told = found.get("distilled")
    if told and told["prompts_kept"] < told["prompts_wanted"]:
        lines.append(f"only {told['prompts_kept']} of {told['prompts_wanted']} prompts that were wanted are kept")
    unknown = sum(not row["signs_known"] for row in found["layers"])
    if unknown:
        lines.append(
            f"{unknown} layers have no width in common with their partners: nothing tells the signs of the paired "
            "singular vectors, and those taken are a convention"
        )
    if found["losses"]:
        reference = next((row for row in found["losses"] if row.get("recovered") == 1), None)
        on = "the adapter trained on the new base" if reference else "the adapter on its old base"
        is_told = any("recovered" in row for row in found["losses"])
        lines.append(
            f"recovered: the share of the gain of {on}"
            if is_told
            else "recovered: not told, for the adapter that it is a share of has no gain at 95%, or other tokens"
        )
    return lines


def transfer_text(found: dict[str, Any]) -> str:
    return "\n\n".join(filter(None, [*(table.text for table in _tables(found)), "\n".join(remarks(found))]))


def transfer_part(found: dict[str, Any]) -> Part:
    """A page's section of one moved adapter."""
    return Part(title=f"{found['adapter']} on {found['to']}", tables=_tables(found), notes=remarks(found))


def _tables(found: dict[str, Any]) -> list[TextTable]:
    told = found.get("distilled")
    about = distilled_table(told) if told else kept_table(found["layers"])
    return [about, *([losses_table(found["losses"])] if found["losses"] else [])]


def _chance(head: str) -> str:
    return f"({head.split()[-1]})"


def _middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ends(values: Iterable[int]) -> list[int]:
    known = [*values]
    return [min(known), max(known)]


def _span(ends: Sequence[int]) -> str:
    return "-".join(map(str, dict.fromkeys(ends)))


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _interval(ends: Sequence[float], decimals: int | None = None) -> str:
    low, high = (plain(end) if decimals is None else number(end, decimals) for end in ends)
    return f"[{low}, {high}]"
