"""Plain tables: `runs.csv`, a row a run with its spec and measures, and `steps.csv`, a row a run and step."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorabench.store.export import Exported

LIBRARY = PACKAGE = None


def write(runs: Iterable[Exported], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = list(runs)
    _write(folder / "runs.csv", [_about(run) | run.config | run.measures for run in found])
    _write(folder / "steps.csv", [{"run_id": run.run_id} | row for run in found for row in run.rows])


def _about(run: Exported) -> dict[str, Any]:
    return {"run_id": run.run_id, "project": run.project, "status": str(run.status)}


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Lists and truth values as JSON has them; an empty cell is None, or what a run does not have."""
    columns = dict.fromkeys(key for row in rows for key in row)
    with open(file, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(columns))
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (bool, list, dict)) else value
