"""`steps.jsonl`: the loss of every step and the metrics of every periodic evaluation."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class StepLog:
    """Appends rows; a resumed run drops the rows past its checkpoint and goes on.

    Without a file nothing is written, and no checkpoint is ever due: another rank sees to both.
    """

    def __init__(self, file: Path | None, resume_at: int, checkpoint_seconds: float):
        self._file = file
        self._rows: list[str] = []
        self._every = checkpoint_seconds
        self._last_checkpoint = time.monotonic()
        if file is None:
            return
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(_rows_until(file, resume_at)))
        os.replace(temporary, file)

    def step(self, row: dict[str, Any]) -> None:
        self._rows.append(json.dumps(row) + "\n")

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._rows.append(json.dumps({"step": step} | metrics) + "\n")

    def flush(self) -> None:
        """Write what is pending; steps of a checkpoint are always written before it."""
        if self._rows and self._file is not None:
            with open(self._file, "a") as handle:
                handle.writelines(self._rows)
        self._rows.clear()

    def checkpoint_due(self) -> bool:
        """Whether so many seconds have passed since this was last true."""
        if self._file is None or time.monotonic() - self._last_checkpoint < self._every:
            return False
        self._last_checkpoint = time.monotonic()
        return True


def _rows_until(file: Path, step: int) -> list[str]:
    """The lines up to a step. What a crash cut short is past the checkpoint: the lines before it were flushed first."""
    kept: list[str] = []
    if not step or not file.exists():
        return kept
    for line in file.read_text().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        kept.append(line)
    return kept
