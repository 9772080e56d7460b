"""Whether runs that name the same data had the same: a file can be changed under its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lorabench.config.quote import PATH, clip

if TYPE_CHECKING:
    from lorabench.spec.task import Task

SHOWN = 3
CHOOSE = ("data_revision", "columns", "label")
"""Fields of a task that, beside its source, say which rows it has."""


def named(tasks: Iterable[Task], fingerprints: dict[str, str]) -> dict[str, str]:
    """What a run's tasks call each of their data sets -> its fingerprint; `fingerprints` is the record's, by role."""
    found = {}
    stages = list(tasks)
    for number, task in enumerate(stages, 1):
        for role, source in task.sources().items():
            fingerprint = fingerprints.get(f"{role} {number}" if len(stages) > 1 else role)
            also: list[Any] = [getattr(task, key, None) for key in CHOOSE] if role == "task" else []
            if fingerprint:
                found[", ".join([source, *(str(value) for value in also if value)])] = fingerprint
    return found


def changed(runs: Iterable[tuple[str, dict[str, str]]]) -> list[str]:
    """A sentence for each name under which the runs (id, what `named` gives) had different data."""
    by_name: dict[str, dict[str, list[str]]] = {}
    for run_id, found in runs:
        for name, fingerprint in found.items():
            by_name.setdefault(name, {}).setdefault(fingerprint, []).append(run_id)
    return [
        f"The data {clip(name, PATH)} are not the same in all runs, for they were changed under their name: one "
        f"content in {'; another in '.join(map(_some, groups.values()))}. Means over these runs mix them."
        for name, groups in by_name.items()
        if len(groups) > 1
    ]


def _some(run_ids: list[str]) -> str:
    rest = f" and {len(run_ids) - SHOWN} more" if len(run_ids) > SHOWN else ""
    return ", ".join(run_ids[:SHOWN]) + rest
