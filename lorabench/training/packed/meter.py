"""What a run costs that is computed with others: its share of what they take together.

Time is its own where the run does something for itself, and an equal share of a pass that all are in; so the times of
a pack's runs add up to the wall time. Memory and energy are equal shares of the whole process's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lorabench.training.meter import EnergyCounter, Meter

if TYPE_CHECKING:
    import torch
    from torch import nn


class Shares:
    """The time and memory of a pack, dealt out to the runs that are in it."""

    def __init__(self, device: torch.device, size: int):
        self.whole, self.size = Meter(device, 0), size
        """Meter of the process, and how many runs share it now."""
        self.peaks: dict[str, float] = {}

    def deal(self) -> None:
        """The process's peaks so far, shared out among those that are in the pack now."""
        for key, value in self.whole.peaks.items():
            self.peaks[key] = max(self.peaks.get(key, 0.0), value / self.size)
        self.whole.peaks.clear()


class Clock:
    """The time that counts as one run's."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def __call__(self) -> float:
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What happens inside is the run's alone."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self.seconds, self._since = self(), None


class SharedMeter(Meter):
    """A run's meter in a pack; peaks are the pack's to measure, and live tensors nobody's."""

    def __init__(self, device: torch.device, steps: int, shares: Shares, clock: Clock):
        self.shares, self.clock_of_run = shares, clock
        super().__init__(device, steps)
        self._energy = _SharedEnergy(device, shares.size)

    def set_baseline(self) -> None:
        self.baseline_gib = self.shares.whole.baseline_gib / self.shares.size

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.shares.size > 1:
            yield
        else:  # the others have ended
            with super().phase(name):
                yield

    @contextlib.contextmanager
    def live_tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        yield

    def release(self, *, collect: bool = True) -> None:
        """Nothing: what a run gives back, the others use."""

    @property
    def state(self) -> dict[str, Any]:
        self._take_peaks()
        return super().state

    def memory(self) -> tuple[dict[str, float], str]:
        self._take_peaks()
        measures, source = super().memory()
        return measures, f"its share of a pack's: {source}"

    def _take_peaks(self) -> None:
        self.restore_peaks({"peaks": self.shares.peaks})

    def _wall(self) -> float:
        return self.clock_of_run()

    def _now(self) -> Any:
        return (super()._now(), self.shares.size)

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type == "cuda":  # events stand before and after the whole pass
            return super()._between(start[0], end[0]) / end[1]
        return super()._between(start[0], end[0])


class _SharedEnergy(EnergyCounter):
    def __init__(self, device: torch.device, size: int):
        super().__init__(device)
        self._size = size

    def joules(self) -> float:
        return super().joules() / self._size
