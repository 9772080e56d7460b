"""Contenders that take turns, a block of steps each, so that a machine's moods fall on all of them alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


class Relay:
    """A baton that goes round: of the threads of `run`, only the one that holds it computes."""

    def __init__(self) -> None:
        self._ring: list[str] = []
        self._condition = threading.Condition()
        self._errors: list[BaseException] = []

    def run(self, jobs: dict[str, Callable[[], None]], threads: int) -> None:
        """Run the jobs to their ends, in turns; raises what the first of them to fail has raised."""
        self._ring = list(jobs)
        workers = [threading.Thread(target=self._work, args=(name, job, threads)) for name, job in jobs.items()]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self._errors:
            raise self._errors[0]

    def pass_on(self) -> None:
        """Give the baton to the next and wait for it to come back."""
        with self._condition:
            name = self._ring[0]
            self._ring.append(self._ring.pop(0))
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._ring[0] == name)

    def _work(self, name: str, job: Callable[[], None], threads: int) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._ring[0] == name)
        torch.set_num_threads(threads)  # OpenMP keeps this for each thread
        try:
            job()
        except BaseException as error:
            self._errors.append(error)
        finally:
            with self._condition:
                self._ring.remove(name)
                self._condition.notify_all()


@dataclass
class Stopwatch:
    """Times whole blocks of steps, waiting for the device at their edges; the first block is for warming up."""

    block: int
    device: torch.device
    relay: Relay | None = None
    on_warm: Callable[[], None] = lambda: None
    """Called once, after the first block."""
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of this process, in which nobody else computes meanwhile."""
    _begin: tuple[float, float] | None = None

    def tick(self) -> None:
        """Call at the end of each step."""
        self.steps += 1
        if self.steps % self.block:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self._begin:
            self.seconds.append(time.perf_counter() - self._begin[0])
            self.cpu_seconds.append(time.process_time() - self._begin[1])
        else:
            self.on_warm()
        if self.relay:
            self.relay.pass_on()
        self._begin = time.perf_counter(), time.process_time()
