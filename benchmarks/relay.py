"""Contenders that take turns, a block of steps each, so that a machine's moods fall on all of them alike.

Each is a process of its own, as it is where it is used: what one sets in the process is not the others' too.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

PASSED_ON = "the baton is passed on"


def relay(commands: dict[str, list[str]]) -> dict[str, str]:
    """Run the commands to their ends, of which one computes at a time; the last line that each has printed.

    Each waits with `take_baton` before it begins and, with `pass_on`, between its blocks. Raises CalledProcessError.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    runners = {name: subprocess.Popen(command, text=True, **pipes) for name, command in commands.items()}  # type: ignore[call-overload]
    last: dict[str, str] = {}
    try:
        while len(last) < len(runners):
            for name in [name for name in runners if name not in last]:
                ended = _turn(runners[name])
                if ended is not None:
                    last[name] = ended
    finally:
        for runner in runners.values():
            runner.kill()
            runner.communicate()
    return last


def _turn(runner: subprocess.Popen[str]) -> str | None:
    """Let it go on until it passes the baton on, or is at its end: then its last line."""
    runner.stdin.write("\n")  # type: ignore[union-attr]
    runner.stdin.flush()  # type: ignore[union-attr]
    line = ""
    for line in runner.stdout:  # type: ignore[union-attr]
        if line.strip() == PASSED_ON:
            return None
    if runner.wait():
        raise subprocess.CalledProcessError(runner.returncode, runner.args)
    return line


def take_baton() -> None:
    sys.stdin.readline()


def pass_on() -> None:
    """Give the baton to the next and wait for it to come back."""
    print(PASSED_ON, flush=True)
    take_baton()


@dataclass
class Stopwatch:
    """Times whole blocks of steps, waiting for the device at their edges; the first block is for warming up."""

    block: int
    device: torch.device
    on_warm: Callable[[], None] = lambda: None
    """Called once, after the first block."""
    between: Callable[[], None] = lambda: None
    """Called after each block, off the clock."""
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
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
        self.between()
        self._begin = time.perf_counter(), time.process_time()
