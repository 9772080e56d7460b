"""Jobs of this machine: submitit's local executor starts a process each, which outlives the one that submitted."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

CONTROLLER = "submitit.local._local"
"""The module of the process that starts a job's tasks and watches over them."""


def is_alive(pid: str, folder: Path) -> bool:
    """Whether the process is there, is this user's, and watches over a job in this submitit folder.

    The folder stands in its command line, which tells it from a later process with the same number.
    """
    with contextlib.suppress(OSError, ValueError):
        process = Path(f"/proc/{int(pid)}")
        command = (process / "cmdline").read_bytes().decode(errors="replace")
        is_own = process.stat().st_uid == os.geteuid()
        return is_own and CONTROLLER in command and str(folder.absolute()) in command
    return False


def cancel(pid: str, folder: Path) -> None:
    """Ask the job to end: the runs in it write their checkpoints.

    Where a profile has set-up lines the process is a shell, which would die alone: its child is told instead.
    """
    if not is_alive(pid, folder):
        return
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(next((child for child in children if is_alive(child, folder)), pid)), signal.SIGTERM)
