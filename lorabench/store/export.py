"""Runs as other tools keep them: one run of theirs a run of ours, with its spec, its curves and its measures.

`exporters/` has a file for each tool: `LIBRARY` is what it imports, `PACKAGE` what pip calls that (both None where it
needs none), and `write(runs, folder)` writes. Names are ours: the keys of sweep files, the columns of `steps.jsonl`,
the measures of records.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.spec.run_spec import flatten
from lorabench.store.record import STEPS_FILE, Status
from lorabench.store.steps import Live, read_steps
from lorabench.store.store import RunState, Store

UNENDED = (Status.MISSING, Status.PENDING, Status.RUNNING, Status.INTERRUPTED, Status.CORRUPT)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A run that has ended, however it has."""

    run_id: str
    project: str
    """The sweep's name; that of the results folder where no sweep is asked for."""
    status: Status
    config: dict[str, Any]
    """The flat spec: str, int, float, bool, None and lists."""
    rows: list[dict[str, float]]
    """A row a step, with what was evaluated after it."""
    measures: dict[str, float]
    started: float
    """Unix time."""
    finished: float

    @property
    def plain(self) -> dict[str, str | int | float]:
        """`config` for tools that know texts and numbers alone: all else as JSON has it."""
        return {
            key: value if type(value) in (str, int, float) else json.dumps(value) for key, value in self.config.items()
        }


def exporter(name: str, flag: str) -> ModuleType:
    """The tool's file. InputError, which begins with `flag`, where its library is not installed."""
    module = importlib.import_module(f"lorabench.store.exporters.{name}")
    if module.LIBRARY and importlib.util.find_spec(module.LIBRARY) is None:
        raise InputError(f"{flag} {name}: needs a library that is not installed: `pip install {module.PACKAGE}`")
    return module


def tools() -> list[str]:
    return plugins.names("exporters")


def folder(store: Store, name: str) -> Path:
    """Where a tool's files go unless it is said otherwise."""
    return store.root / "exports" / name


def exported(store: Store, states: Iterable[RunState], project: str, tell: Callable[[str], None]) -> Iterator[Exported]:
    """The runs that have ended; a log of steps that is not what it was is told, and left out."""
    for state in states:
        if state.record is None or state.status in UNENDED:
            continue
        record, rows = state.record, []
        try:
            rows = read_steps(store.folder(state.run_id) / STEPS_FILE, record.steps_sha256)
        except (OSError, InputError) as error:
            tell(f"{state.run_id}: without its curves: {getattr(error, 'strerror', None) or error}")
        times = [datetime.fromisoformat(time).timestamp() for time in (record.started, record.finished) if time]
        yield Exported(
            run_id=state.run_id,
            project=project,
            status=state.status,
            config=flatten(state.spec),
            rows=rows,
            measures=record.measures,
            started=times[0] if times else 0.0,
            finished=times[-1] if times else 0.0,
        )


def open_live(name: str | None, store: Store, run_id: str) -> Live | None:
    """What shows a run that is being trained in another tool; None where none is asked for."""
    if name is None:
        return None
    live: Live = exporter(name, "--live").Live(folder(store, name) / run_id)
    return live
