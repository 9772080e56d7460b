"""Jobs of this machine: submitit's local executor starts a process each, which outlives the one that submitted."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def is_alive(pid: str, folder: Path) -> bool:
    """Whether the process is there, and is the one that watches over a job in this submitit folder.

    The folder stands in its command line, which tells it from a later process with the same number.
    """
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{int(pid)}/cmdline").read_bytes().decode(errors="replace")
        return str(folder.absolute()) in command
    return False


def cancel(pid: str, folder: Path) -> None:
    """Ask the job to end: the runs in it write their checkpoints."""
    if is_alive(pid, folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGTERM)
