"""Runs whose intruder dimensions have been scaled, as they were kept.

results/interventions/<id>/record.json      one a run, ε and k: {key: {run_id, files, epsilon, top, …},
                                            points: [{scaled, lambda, valid_loss, …}, …]}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.json_file import read_json
from lorabench.store.record import RunRecord

FOLDER = "interventions"
VERSION = 1
"""Part of every id: raise it when an intervention or its evaluation changes."""
Scaled = list[dict[str, Any]]


def read_interventions(root: Path, records: Mapping[str, RunRecord]) -> dict[str, Scaled]:
    """Run id -> its points, `epsilon` and `k` with each, of those of the runs that have any. What is damaged, of
    another version, or of a ΔW that the run no longer has is left out."""
    found: dict[str, Scaled] = {}
    for file in sorted((root / FOLDER).glob("*/record.json")):
        try:
            table: Any = read_json(file) or {}
            key = table["key"]
            record = records.get(key["run_id"])
            if record is None or key["version"] != VERSION or key["files"] != record.updates:
                continue
            about = {"epsilon": float(key["epsilon"]), "k": int(key["top"])}
            points = [{**about, **point, "scaled": str(point["scaled"])} for point in table["points"]]
            found.setdefault(record.run_id, []).extend(points)
        except (InputError, KeyError, TypeError, ValueError):
            continue
    return found
