"""Runs evaluated along W0 + λ ΔW, as they were kept.

results/paths/<id>/record.json      one a run: {key: {run_id, files, …}, points: [{lambda, valid_loss, …}, …]}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.json_file import read_json
from lorabench.store.record import RunRecord

FOLDER = "paths"
VERSION = 1
"""Part of every id: raise it when what is evaluated changes."""
Points = list[dict[str, float]]


def read_paths(root: Path, records: Mapping[str, RunRecord]) -> dict[str, Points]:
    """Run id -> its points by λ, of those of the runs that have any. What is damaged, of another version, or of a ΔW
    that the run no longer has is left out."""
    found: dict[str, Points] = {}
    for file in sorted((root / FOLDER).glob("*/record.json")):
        try:
            table: Any = read_json(file) or {}
            key, points = table["key"], table["points"]
            record = records.get(key["run_id"])
            if record is None or key["version"] != VERSION or key["files"] != record.updates:
                continue
            known = {float(each["lambda"]): each for each in found.get(record.run_id, [])}
            known |= {float(each["lambda"]): each for each in points}
            found[record.run_id] = [known[scale] for scale in sorted(known)]
        except (InputError, KeyError, TypeError, ValueError):
            continue
    return found
