"""Runs into jobs, jobs into arrays: pure arithmetic on the plan's estimates."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run as packing sees it."""

    run_id: str
    seconds: float
    """What it is expected to take, all in all."""
    kind: Hashable = None
    """Runs of one kind share what a job has warmed up; only such are put into one job."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds a job. Runs are computed `at_once` side by side."""

    seconds: float
    """As long as the time limit can hold it: a job of several runs never takes longer, by its estimates."""
    target_seconds: float
    """As long as a job should take, where `cells` does not say how many runs it holds."""
    cells: int | None = None
    at_once: int = 1


def pack(cells: Sequence[Cell], limits: Limits) -> list[list[Cell]]:
    """Jobs of consecutive runs of a kind: every run once, in the order given within its kind.

    A run that by itself takes longer than a job may is alone in its job.
    """
    kinds: dict[Hashable, list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(cell.kind, []).append(cell)
    return [job for alike in kinds.values() for job in _consecutive(alike, limits)]


def _consecutive(cells: Sequence[Cell], limits: Limits) -> Iterator[list[Cell]]:
    bound = limits.seconds if limits.cells is not None else min(limits.seconds, limits.target_seconds)
    job: list[Cell] = []
    total = longest = 0.0
    for cell in cells:
        total, longest = total + cell.seconds, max(longest, cell.seconds)
        if job and (len(job) == limits.cells or makespan(total, longest, limits.at_once) > bound):
            yield job
            job, total, longest = [], cell.seconds, cell.seconds
        job.append(cell)
    if job:
        yield job


def makespan(total: float, longest: float, at_once: int) -> float:
    """Seconds that runs of so many seconds together take at most, begun in order as workers become free.

    R. L. Graham, Bounds for certain multiprocessing anomalies (1966): total / m + (1 - 1/m) · longest.
    """
    return total / at_once + (1 - 1 / at_once) * longest


def spread(cells: Sequence[Cell], num_jobs: int) -> list[list[Cell]]:
    """At most so many jobs with about as many runs each, dealt out in turn: where no time limit asks for more."""
    return [job for job in (list(cells[start::num_jobs]) for start in range(num_jobs)) if job]


def split(num_jobs: int, max_array: int) -> list[tuple[int, int]]:
    """(first job, number of jobs) of each array: `max_array` jobs at most, the last array has the rest."""
    return [(first, min(max_array, num_jobs - first)) for first in range(0, num_jobs, max_array)]


def share(parallel: int, num_arrays: int) -> list[int]:
    """How many jobs of each array may run at a time, so that together they are `parallel`; at least one of each."""
    each, rest = divmod(parallel, max(1, num_arrays))
    return [max(1, each + (index < rest)) for index in range(num_arrays)]
