"""Why a run ends before its last step."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorabench.processes.distributed import ALONE, World

CAUSES = {signal.SIGHUP: "the end of its launcher"}
"""Signals that a launcher's process hands on before the SIGTERM by which it asks a run to stop: the run has them
blocked, so that they wait in it, and tell why."""
MARKER_SECONDS = 3.0
"""Between two looks for a file: a shared file system is asked over the network."""


class Stopped(Exception):
    """Somebody asked the run to stop; its state is in the checkpoint."""


class Diverged(Exception):
    """The loss or the gradient became NaN or infinite."""


@dataclass
class Stop:
    """Why the run should end at the next step: None to go on."""

    reason: str | None = None
    deadline: float | None = None
    """On time.monotonic's clock."""
    marker: Path | None = None
    """A file that `lorabench cancel` makes: the run ends once it is there."""
    looked: float = -math.inf
    world: World = ALONE

    def check(self) -> None:
        """Raises Stopped, on all ranks at once where there are several."""
        self._look_for_marker()
        if self.deadline is not None and time.monotonic() > self.deadline and self.reason is None:
            self.reason = "timeout"
        if self.world.any(self.reason is not None):
            reasons = filter(None, self.world.gather(self.reason))
            self.reason = next(reasons)
            raise Stopped(self.reason)

    def _look_for_marker(self) -> None:
        now = time.monotonic()
        if self.marker is None or now < self.looked + MARKER_SECONDS:
            return
        self.looked = now
        if self.reason is None and self.marker.exists():
            self.reason = "lorabench cancel"


@contextlib.contextmanager
def stop_on_signals(*stops: Stop) -> Iterator[None]:
    """SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 (SLURM's warning) end the run at its next step; all of a process.

    In a process of a launcher's SIGTERM alone is heard; the signal that the launcher was given waits behind it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _frame: object) -> None:
        waiting = signal.sigpending() - {signal.SIGTERM}
        cause = next((kind for kind in (signal.SIGHUP, *kinds) if kind in waiting), signal.Signals(number))
        for stop in stops:
            stop.reason = stop.reason or CAUSES.get(cause, cause.name)

    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)
