"""Packing against what it promises, for any grid; and against a simulation of workers that become free."""

import heapq
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.cluster.packing import Cell, Limits, makespan, pack, share, split, spread

SECONDS = st.floats(min_value=0.0, max_value=1e5, allow_nan=False)


@st.composite
def cells(draw: st.DrawFn) -> list[Cell]:
    rows = draw(st.lists(st.tuples(SECONDS, st.sampled_from("abc")), max_size=60))
    return [Cell(run_id=f"run-{i}", seconds=seconds, kind=kind) for i, (seconds, kind) in enumerate(rows)]


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    return Limits(
        seconds=draw(st.floats(min_value=1.0, max_value=1e5)),
        target_seconds=draw(st.floats(min_value=1.0, max_value=1e5)),
        cells=draw(st.none() | st.integers(1, 20)),
        at_once=draw(st.integers(1, 8)),
    )


def simulated(job: list[Cell], at_once: int) -> float:
    """When the last run ends, each begun in order by the first worker that is free."""
    free = [0.0] * at_once
    for cell in job:
        heapq.heappush(free, heapq.heappop(free) + cell.seconds)
    return max(free)


@given(cells(), limits())
def test_every_run_is_in_one_job_of_its_kind_in_order(found: list[Cell], bound: Limits) -> None:
    jobs = pack(found, bound)
    assert all(jobs)
    assert sorted(cell.run_id for job in jobs for cell in job) == sorted(cell.run_id for cell in found)
    for kind in "abc":
        own = [cell for job in jobs for cell in job if cell.kind == kind]
        assert own == [cell for cell in found if cell.kind == kind]
    assert all(len({cell.kind for cell in job}) == 1 for job in jobs)


@given(cells(), limits())
def test_no_job_of_several_runs_takes_longer_than_its_time_limit(found: list[Cell], bound: Limits) -> None:
    for job in pack(found, bound):
        assert len(job) <= (bound.cells or len(job))
        if len(job) > 1:
            most = bound.seconds if bound.cells else min(bound.seconds, bound.target_seconds)
            assert simulated(job, bound.at_once) <= most * (1 + 1e-9)


@given(cells(), limits())
def test_a_job_is_closed_only_when_the_next_run_would_not_fit(found: list[Cell], bound: Limits) -> None:
    jobs = pack(found, bound)
    for job, after in itertools.pairwise(jobs):
        if job[0].kind == after[0].kind:
            times = [cell.seconds for cell in [*job, after[0]]]
            most = bound.seconds if bound.cells else min(bound.seconds, bound.target_seconds)
            is_full = len(job) == bound.cells
            assert is_full or makespan(sum(times), max(times), bound.at_once) > most * (1 - 1e-9)


def test_a_number_of_runs_a_job_is_kept_exactly() -> None:
    found = [Cell(run_id=str(i), seconds=1.0) for i in range(10)]
    jobs = pack(found, Limits(seconds=1e6, target_seconds=1.0, cells=4))
    assert [len(job) for job in jobs] == [4, 4, 2]


@given(st.lists(SECONDS, min_size=1, max_size=30), st.integers(1, 8))
def test_the_makespan_is_never_exceeded_and_exact_with_one_worker(times: list[float], at_once: int) -> None:
    job = [Cell(run_id=str(i), seconds=seconds) for i, seconds in enumerate(times)]
    bound = makespan(sum(times), max(times), at_once)
    assert simulated(job, at_once) <= bound * (1 + 1e-9)
    assert makespan(sum(times), max(times), 1) == pytest.approx(simulated(job, 1))


@given(st.integers(1, 5000), st.integers(1, 1001), st.integers(1, 200))
def test_arrays_cover_all_jobs_below_the_limit_and_share_the_parallelism(jobs: int, limit: int, parallel: int) -> None:
    arrays = split(jobs, limit)
    assert [number for first, count in arrays for number in range(first, first + count)] == list(range(jobs))
    assert max(count for _, count in arrays) <= limit  # so the highest index is below MaxArraySize
    assert len(arrays) == -(-jobs // limit)
    shares = share(parallel, len(arrays))
    assert min(shares) >= 1
    assert sum(shares) == max(parallel, len(arrays))


@given(cells(), st.integers(1, 10))
def test_local_jobs_are_as_even_as_can_be(found: list[Cell], num_jobs: int) -> None:
    jobs = spread(found, num_jobs)
    assert sorted(cell.run_id for job in jobs for cell in job) == sorted(cell.run_id for cell in found)
    assert len(jobs) == min(num_jobs, len(found))
    assert not jobs or max(map(len, jobs)) - min(map(len, jobs)) <= 1
