"""What an untouched base does on the data of a run, kept once for all runs of the store that have the two in common."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config import json_file
from lorabench.config.decode import InputError
from lorabench.config.durable import make_folder, write_json

SHELF = ".bases"


@dataclass(frozen=True, kw_only=True)
class BaseResult:
    """The validation metrics of each task, and what goes into the record, by names in MEASURES."""

    row: list[dict[str, float]]
    metrics: dict[str, float]


def result_file(runs: Path, content: dict[str, Any]) -> Path:
    """Where a result of this content lies below the store's folder of runs."""
    text = json.dumps(content, sort_keys=True, default=str)
    return runs / SHELF / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read_result(file: Path) -> BaseResult | None:
    """None where there is none, or none that is whole: it is measured anew."""
    try:
        return json_file.read(BaseResult, file)
    except InputError:
        return None


def write_result(file: Path, result: BaseResult) -> None:
    make_folder(file.parent)
    write_json(file, dataclasses.asdict(result))
