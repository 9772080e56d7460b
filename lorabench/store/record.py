"""What a run leaves behind: its status, and its record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError
from lorabench.config.json_file import build, check_name, fit
from lorabench.config.quote import clip

if TYPE_CHECKING:
    from lorabench.spec.run_spec import RunSpec


class Status(StrEnum):
    """How a run stands.

    `interrupted` is never written: it is a `running` record whose worker is gone. Nor are `pending`, which waits in a
    cluster's queue, and `lost`, whose job went away without a result and without a reason that is the run's own.
    """

    MISSING = "missing"
    PENDING = "pending"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    LOST = "lost"
    DONE = "done"
    OOM = "oom"
    TIMEOUT = "timeout"
    DIVERGED = "diverged"
    FAILED = "failed"
    CANCELLED = "cancelled"
    CORRUPT = "corrupt"


STEPS_FILE = "steps.jsonl"


GENERATIONS_FILE = "generations.jsonl"
PICTURES_FILE = "pictures.png"


FAILURES = (Status.OOM, Status.TIMEOUT, Status.DIVERGED, Status.FAILED)
"""Ended without a result, and not tried again unless asked (`--retry`)."""


def now() -> str:
    """The time as records have it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(kw_only=True)
class RunRecord:
    """One run's result. `measures` holds the numbers by their names in MEASURES; what was not measured is absent."""

    run_id: str
    spec: dict[str, Any]
    status: Status
    error: str | None = None
    """The last line of what went wrong; the traceback is in `log.txt`."""
    started: str = ""
    """UTC, ISO 8601."""
    finished: str | None = None
    attempts: int = 1
    resumed_from_step: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    """Package versions, git commit and dirty flag, hardware, model and data fingerprints."""
    measures: dict[str, float] = field(default_factory=dict)
    sequence: dict[str, Any] = field(default_factory=dict)
    """Of a run over several tasks: `tasks`, their names, and `matrices`, metric -> [after i tasks][on task j]."""
    drift: dict[str, dict[str, float]] = field(default_factory=dict)
    """Layer -> `task`, `retain` and what chance gives for each (`lorabench.training.drift`); empty of older runs."""
    movement: dict[str, dict[str, float]] = field(default_factory=dict)
    """Layer -> how far its factors have moved (`lorabench.training.movement`); empty of older runs."""
    provenance: dict[str, str] = field(default_factory=dict)
    """How a measure was made where that can differ: `peak_gib: VmHWM, reset per phase`."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what was learned, by path below the run's folder: the analyses' cache key."""
    steps_sha256: str | None = None
    """Of the log of its steps; None of a run that did not end, or was made before this was kept."""
    generations_sha256: str | None = None
    """Of what it wrote; None of a run whose task has it write nothing."""
    pictures_sha256: str | None = None
    """Of what it drew; None of a run whose task has it draw nothing."""

    @classmethod
    def begun(cls, spec: RunSpec, attempts: int) -> RunRecord:
        """Of a run that begins now."""
        return cls(run_id=spec.id, spec=spec.to_json(), status=Status.RUNNING, started=now(), attempts=attempts)

    @property
    def updates(self) -> dict[str, str]:
        """Those of `files` that hold what was learned at the end, snapshots apart."""
        return {path: digest for path, digest in self.files.items() if path.startswith("updates/")}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of all that the run has left, by path below its folder."""
        others = {
            STEPS_FILE: self.steps_sha256,
            GENERATIONS_FILE: self.generations_sha256,
            PICTURES_FILE: self.pictures_sha256,
        }
        return self.files | {name: digest for name, digest in others.items() if digest}

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> RunRecord:
        """Raises InputError with every problem. A measure that is not finite, as of a run that diverged, is NaN."""
        measures = table.get("measures")
        known = measures if isinstance(measures, dict) else {}
        infinite = [key for key, value in known.items() if _is_infinite(value)]
        finite = {key: value for key, value in known.items() if key not in infinite}
        record = build(cls, table | {"measures": finite} if infinite else table)
        record.measures |= dict.fromkeys(infinite, math.nan)
        if problems := [*record._problems()]:
            raise InputError(problems)
        return record

    def _problems(self) -> Iterator[str]:
        """What the fields' types do not tell: names that would stand for something else, parts of other types."""
        for name in self.measures:
            if not name.isidentifier() or name in COLUMNS or name in self.spec or len(name) > MAX_NAME:
                yield f"measures.{clip(name)}: is no name of a measure"
            elif self.status == Status.DONE and name.endswith("_loss") and not math.isfinite(self.measures[name]):
                yield f"measures.{name} = {self.measures[name]}: must be finite in a run that is done"
        for path in self.files:
            try:
                check_name(path)
            except InputError as error:
                yield f"files: {error.problems[0]}"
        for part, hints in (("environment", _ENVIRONMENT), ("sequence", _SEQUENCE)):
            for key, value in getattr(self, part).items():
                try:
                    fit(hints.get(key, Any), value, f"{part}.{clip(key)}")
                except InputError as error:
                    yield from error.problems


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


COLUMNS = ("run_id", "label", "status", "error", "attempts", "finished", "selected")
"""Of tables of runs, beside the spec's keys and the measures."""


MAX_NAME = 100


_ENVIRONMENT: dict[str, Any] = {
    **dict.fromkeys(("packages", "git", "hardware", "data", "data_notes"), dict[str, Any]),
    **dict.fromkeys(("model_commit", "model_sha256"), str | None),
}


_SEQUENCE: dict[str, Any] = {"tasks": list[str], "matrices": dict[str, list[list[float]]]}
