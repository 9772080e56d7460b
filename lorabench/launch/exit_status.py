"""How a run's processes ended, and the record of a run that could not write its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorabench.config.quote import message
from lorabench.spec.run_spec import RunSpec
from lorabench.store.crash_record import settle
from lorabench.store.record import Status
from lorabench.store.store import RunState, Store


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Of one process; of several, those of all ranks together say what a run has failed of."""

    code: int | None
    """Exit code; minus the signal's number where one ended it; None where nobody knows (its machine is gone)."""
    rank: int = 0
    stopped: bool = False
    """Whether who had started it ended it, for another rank had ended."""
    orphaned: bool = False
    """Whether its fork server had died before it, so that nobody knows its exit code."""
    out_of_memory: bool = False
    """Whether the kernel has counted a kill for want of memory."""
    failure: tuple[str, str, bool] | None = None
    """Status and error that it reported, and whether it only missed another rank."""
    last_line: str = ""
    """The line of its log that says best why it died."""

    @property
    def is_consequence(self) -> bool:
        return self.stopped or bool(self.failure and self.failure[2])

    def cause(self) -> tuple[Status, str]:
        """Why it ended without a final record."""
        code = self.code
        if code is None:
            return Status.CANCELLED, "its machine does not answer any more; run again to resume"
        if self.out_of_memory and (code == -signal.SIGKILL or self.orphaned):
            return Status.OOM, "killed by the kernel: out of memory"
        if self.failure:
            return Status(self.failure[0]), self.failure[1]
        if self.orphaned:
            return Status.CANCELLED, "its fork server died, and then it did; run again to resume"
        if code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            return Status.CANCELLED, f"killed by signal {-code}; run again to resume"
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == 0:
            ending = "ended without a result"
        return Status.FAILED, f"{ending}: {self.last_line}" if self.last_line else ending

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> Ending:
        return cls(**table | {"failure": tuple(table["failure"]) if table["failure"] else None})


def common_cause(endings: Sequence[Ending]) -> tuple[Status, str]:
    """Why a run ended without a final record: what happened to one rank, not what it then did to the others."""
    bad = [each for each in endings if each.code != 0] or list(endings)
    causes = [each for each in bad if not each.is_consequence] or bad
    first = min(causes, key=lambda each: (each.cause()[0] != Status.OOM, each.code is not None, each.failure is None))
    status, text = first.cause()
    is_shared = len(endings) == 1 or all(each.cause() == (status, text) for each in endings)
    return status, text if is_shared else f"rank {first.rank}: {text}"


def write_ending(store: Store, spec: RunSpec, status: Status, error: str) -> RunState:
    """Write the record that a run could not write itself, unless another worker has it by now."""
    try:
        return settle(store, store.state(spec.id, spec), status, error)
    except OSError as problem:
        error = f"{error} (and its record could not be written: {problem.strerror})"
    return RunState(run_id=spec.id, status=status, spec=spec.to_json(), error=error)


def record_stamp(store: Store, spec: RunSpec) -> int | None:
    """Tells a record from the one that an earlier attempt left; None where there is none."""
    with contextlib.suppress(OSError):
        return (store.folder(spec.id) / "record.json").stat().st_mtime_ns
    return None


def crash_line(log: Path) -> str:
    """The line of a log that says best why its process died: where it crashed, else the last line."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
        text = file.read().decode("utf-8", "replace")
        crash = re.findall(r"\(most recent call first\):\n\s*(.+)", text)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return message(crash[-1] if crash else lines[-1] if lines else "")
    return ""
