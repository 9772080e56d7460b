"""What other processes do in the tests of the store; imports little, for each of them starts anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorabench.config.durable import write_bytes
from lorabench.store.claim import take


def race(root: str, rounds: int, barrier: Any, results: Any) -> None:
    """Try for the claim of every round at the same moment as the other processes; tell what was got."""
    got, holds = [], []
    for number in range(rounds):
        barrier.wait()
        hold = take(Path(root) / str(number))
        got.append(hold is not None)
        holds.append(hold)
    barrier.wait()  # nobody exits, and so nobody is dead, before all have tried
    results.put(got)


def write_often(file: str) -> None:
    for i in range(150):
        write_bytes(Path(file), str(i % 10).encode() * 200_000)
