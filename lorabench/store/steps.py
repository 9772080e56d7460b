"""`steps.jsonl`: the loss of every step and the metrics of every periodic evaluation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from lorabench.config.decode import InputError
from lorabench.config.durable import remove, write_bytes
from lorabench.config.json_file import read_bytes

MAX_BYTES = 2**30
"""Of a log: some ten million steps."""


class Live(Protocol):
    """What shows the rows of a log elsewhere while it is written."""

    def begin(self) -> None:
        """From the first row on, whatever was shown before."""

    def add(self, rows: Iterable[dict[str, float]]) -> None: ...


class StepLog:
    """Appends rows to `lines`, which checkpoints keep, and to a file, from which nothing is ever read back.

    So a resumed run has exactly the rows of an uninterrupted one, whatever has become of the file meanwhile. Without
    a file nothing is written, and no checkpoint is ever due: another rank sees to both.
    """

    def __init__(self, file: Path | None, lines: list[str], checkpoint_seconds: float, live: Live | None = None):
        self._file, self._lines, self._live = file, lines, live
        self._written = 0
        self._every = checkpoint_seconds
        self._last_checkpoint = time.monotonic()
        self._begin()
        self.flush()

    def step(self, row: dict[str, Any]) -> None:
        self._lines.append(json.dumps(row) + "\n")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._lines.append(json.dumps({"step": step} | metrics) + "\n")

    def flush(self) -> None:
        """Show what is pending to whoever follows the file."""
        if self._file is not None and self._written < len(self._lines):
            if not self._file.is_file():  # somebody has taken it away
                self._begin()
            with open(self._file, "a", encoding="utf-8") as handle:
                handle.writelines(self._lines[self._written :])
            if self._live is not None:
                self._live.add(map(json.loads, self._lines[self._written :]))
            self._written = len(self._lines)

    def _begin(self) -> None:
        if self._file is not None:
            remove(self._file)
            self._file.touch()
            if self._live is not None:
                self._live.begin()
        self._written = 0

    def checkpoint_due(self) -> bool:
        """Whether so many seconds have passed since this was last true."""
        if self._file is None or time.monotonic() - self._last_checkpoint < self._every:
            return False
        self._last_checkpoint = time.monotonic()
        return True


def write_steps(file: Path, lines: list[str]) -> str:
    """Write the log of a run that has ended whole and to last, whatever lies there; its SHA-256."""
    content = "".join(lines).encode()
    if file.is_dir():
        remove(file)
    write_bytes(file, content)
    return hashlib.sha256(content).hexdigest()


def read_steps(file: Path, digest: str | None = None) -> list[dict[str, float]]:
    """A row a step, with what was evaluated after it; of a log that is being written, its whole lines.

    InputError where it is no log of steps, or not the one with this SHA-256; OSError where there is none.
    """
    content = read_bytes(file, MAX_BYTES)
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise InputError(f"{file}: is not the log that the run's record tells of")
    lines = content[: content.rfind(b"\n") + 1].strip().replace(b"\n", b",")
    try:
        table = json.loads(b"[" + lines + b"]")
    except (ValueError, RecursionError):
        table = [None]
    if not all(isinstance(row, dict) and {*map(type, row.values())} <= {int, float} for row in table):
        raise InputError(f"{file}: is no log of steps")
    rows: dict[float, dict[str, float]] = {}
    for row in table:
        rows.setdefault(row.get("step", 0), {}).update(row)
    return [*rows.values()]
