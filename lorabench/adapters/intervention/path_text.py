"""What was measured along W0 + λ ΔW, as a table a run."""

from __future__ import annotations

from typing import Any

from lorabench.report.aggregate import plain
from lorabench.report.labels import measure, shown_factor
from lorabench.terminal.text import TextTable

SHOWN = ("valid_loss", "valid_accuracy", "valid_token_accuracy", "retain_loss", "forgetting")
ABOUT = "W0 + λ ΔW: λ = 0 is the untouched base, λ = 1 the run's own model; one run a table, in float32."


def table(record: dict[str, Any]) -> TextTable:
    points = record["points"]
    heads = {name: f"{name} ({measure(name).unit})" if measure(name).unit == "%" else name
             for name in SHOWN if all(name in point for point in points)}  # fmt: skip
    rows = [
        {"λ": f"{point['lambda']:g}"} | {head: plain(shown_factor(name) * point[name]) for name, head in heads.items()}
        for point in points
    ]
    return TextTable(title=record["key"]["run_id"], heads=["λ", *heads.values()], rows=rows)
