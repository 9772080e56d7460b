"""Analyses of a sweep's runs: updates on disk -> tidy frames, cached by content. See `jobs`, `batch` and `bundle`."""

from __future__ import annotations

import contextlib
import fcntl
import math
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch

from lorabench.analysis import batch, bundle
from lorabench.analysis.bases import FOLDER, Bases
from lorabench.analysis.batch import LAYER_COLUMNS, Outcome, Part
from lorabench.analysis.bundle import Gathered
from lorabench.analysis.cache import read_tables
from lorabench.analysis.jobs import Job, batches, files_of, subjects, updates_bytes
from lorabench.analysis.pairs import PAIR_AXES, Pair, find_pairs
from lorabench.analysis.tidy import to_frame
from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.config.quote import blame
from lorabench.processes.machine import available_cores
from lorabench.processes.share import WorkerFailed, share
from lorabench.spec.analysis import Analysis
from lorabench.spec.sweep import Sweep
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import RunState, Store
from lorabench.terminal.text import progress_bar, talk

__all__ = ["PAIR_AXES", "analyze", "files_of"]

PAIR_COLUMNS = ["run_a", "run_b", "axis", "value_a", "value_b"]
PARTS_A_WORKER = 4
"""So that the last ones to finish have little left to wait for."""
LITTLE_JOBS, LITTLE_BYTES = 500, 2**28
"""Less than both of these is done before other processes have started."""
PRELOAD = ("pandas", "torch", "lorabench.analysis.analyze")


def analyze(
    store: Store,
    sweep: Sweep,
    selected: Collection[str] | None = None,
    *,
    pair_axes: tuple[str, ...] = PAIR_AXES,
    workers: int | None = 1,
    states: Iterable[RunState] | None = None,
    note: Callable[[str], None] = talk,
    unread: Callable[[dict[str, str]], None] = lambda _: None,
    broken: Callable[[dict[str, str]], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """A frame for every analysis: of each run that is done, and of the pairs that differ in one of `pair_axes`.

    Frames begin with `run_id`, or `run_a, run_b, axis, value_a, value_b`, then `layer, kind, depth`. `selected` are
    the runs to compare (see `find_pairs`). Runs without updates, and those whose files are not as their record says,
    are left out, each with a `note`; `unread` is given those of which ΔW could not be read, with the reason. Cached
    results are only read.

    `workers` processes share what is to compute (None: one a core, where there is much); the frames are the same
    whatever their number, but for the last digits of dense ΔW of 1024² and more, whose SVD may use several threads.
    `states`: how the sweep's runs stand, where that is known. `broken` is given the analyses that raised, with what;
    the rest is kept. Where it is not asked for, that is raised at the end as WorkerFailed.
    """
    records = _analyzable(store.states(list(sweep.runs)) if states is None else states, note)
    pairs = list(find_pairs(sweep, records, pair_axes, selected))
    analyses = [cast(Analysis, plugins.example("analyses", name)) for name in plugins.names("analyses")]
    wanted = {
        analysis.name: [Job(analysis=analysis, records=tuple(records[run_id] for run_id in runs), root=store.root)
                        for runs in subjects(analysis, records, pairs)]
        for analysis in analyses
    }  # fmt: skip
    _note_samples(analyses, pairs, note)
    files = {name: store.root / sweep.name / bundle.FOLDER / f"{name}.parquet" for name in wanted}
    bundles = {name: bundle.read_bundle(file) for name, file in files.items()}
    others = [job for name, jobs in wanted.items() for job in jobs if job not in bundles[name]]
    own = read_tables(others)
    missing = [job for job in others if job not in own]
    failed = _compute(store, missing, note, workers, broken)
    unread(failed)
    own |= read_tables(missing)
    frames = {}
    for analysis in analyses:
        name, before = analysis.name, bundles.pop(analysis.name)
        tables = {job: own.pop(job) for job in wanted[name] if job in own}
        kept = [job for job in wanted[name] if not failed.keys() & {*job.runs}]
        gathered = bundle.gather(kept, before, tables)
        bundle.write_bundle(files[name], gathered, before)
        frames[name] = _frame(analysis, gathered, pairs)
    return frames


def compare(
    store: Store, name: str, pairs: Sequence[tuple[RunRecord, RunRecord]], note: Callable[[str], None]
) -> pd.DataFrame:
    """One analysis of these pairs of runs, cached as `analyze` does; `run_a, run_b`, then `layer, kind, depth`."""
    analysis = cast(Analysis, plugins.example("analyses", name))
    jobs = [Job(analysis=analysis, records=pair, root=store.root) for pair in pairs]
    own = read_tables(jobs)
    missing = [job for job in jobs if job not in own]
    _compute(store, missing, note)
    gathered = bundle.gather(jobs, bundle.Bundle(), own | read_tables(missing))
    if not len(gathered.table):
        return pd.DataFrame(columns=["run_a", "run_b", *LAYER_COLUMNS])
    runs = {column: [job.runs[side] for job in gathered.jobs] for side, column in enumerate(("run_a", "run_b"))}
    return analysis.over_layers(to_frame(gathered.table, gathered.counts, runs))


def _analyzable(states: Iterable[RunState], note: Callable[[str], None]) -> dict[str, RunRecord]:
    """The records of the runs that are done and have kept updates; one note for each reason to leave runs out."""
    records, others = {}, defaultdict(list)
    for state in states:
        if state.status != Status.DONE or state.record is None:
            others[str(state.status)].append(state.run_id)
        elif not files_of(state.record):
            others["done, but nothing kept"].append(state.run_id)
        else:
            records[state.run_id] = state.record
    for reason, run_ids in others.items():
        more = f" and {len(run_ids) - 3} more" if len(run_ids) > 3 else ""
        note(f"not analyzed ({reason}): {', '.join(run_ids[:3])}{more}")
    return records


def _note_samples(analyses: list[Analysis], pairs: list[Pair], note: Callable[[str], None]) -> None:
    """Say where an analysis is made of some of the pairs alone."""
    counts = Counter(pair.axis for pair in pairs)
    for analysis in analyses if pairs else []:
        for axis, count in counts.items():
            if analysis.is_of_pairs() and count > analysis.max_pairs:
                note(f"{analysis.name}: of a sample of {analysis.max_pairs} of the {count} pairs along {axis}")


def _frame(analysis: Analysis, gathered: Gathered, pairs: list[Pair]) -> pd.DataFrame:
    if not analysis.is_of_pairs():
        before: dict[str, list[Any]] = {"run_id": [job.runs[0] for job in gathered.jobs]}
    else:
        named: dict[tuple[str, ...], Pair] = {(pair.run_a, pair.run_b): pair for pair in pairs}
        before = {column: [getattr(named[job.runs], column) for job in gathered.jobs] for column in PAIR_COLUMNS}
    if not len(gathered.table):
        return pd.DataFrame(columns=[*before, *LAYER_COLUMNS])
    return analysis.over_layers(to_frame(gathered.table, gathered.counts, before))


def _compute(
    store: Store,
    jobs: list[Job],
    note: Callable[[str], None],
    workers: int | None = 1,
    broken: Callable[[dict[str, str]], None] | None = None,
) -> dict[str, str]:
    """Do the jobs and write their files. The runs that could not be read, with the reason."""
    if not jobs:
        return {}
    groups = list(batches(jobs))
    most = _num_workers(jobs, workers)
    num_parts = 1 if most == 1 else math.ceil(PARTS_A_WORKER * most / len(groups))
    results: dict[tuple[int, int], Outcome] = {}
    errors: list[Exception] = []
    with _scratch(store.root) as scratch, progress_bar("analyzing", len(jobs)) as advance:
        parts = [Part(jobs=group, number=number, part=part, num_parts=num_parts, scratch=scratch)
                 for number, group in enumerate(groups) for part in range(num_parts)]  # fmt: skip
        do = _Do(cache=store.root / FOLDER, threads=max(1, available_cores() // most) if most > 1 else None)
        with contextlib.closing(_results(do, parts, most, advance)) as found:
            for place, result in found:
                part = parts[place]
                if isinstance(result, InputError):
                    raise result
                if isinstance(result, Exception):
                    errors.append(result)
                    continue
                results[part.number, part.part] = result
                of_batch = [results.get((part.number, other)) for other in range(num_parts)]
                if all(of_batch):
                    batch.commit(part, cast(list[Outcome], of_batch))
    outcomes = [results[place] for place in sorted(results)]
    raised = _raised(outcomes, errors)
    if raised and broken is None:
        raise WorkerFailed("\n".join([*(f"{name}: {text}" for name, text in raised.items()), "the rest is kept"]))
    if broken is not None:
        broken(raised)
    return _account(outcomes, note)


def _raised(outcomes: list[Outcome], errors: list[Exception]) -> dict[str, str]:
    """What raised, by analysis; what ended a whole part of them, as `analyses`."""
    found: dict[str, str] = {}
    for outcome in outcomes:
        found = outcome.broken | found
    texts = dict.fromkeys(str(e).strip() if isinstance(e, WorkerFailed) else blame(e) for e in errors)
    if texts:
        last = "; ".join(text.splitlines()[-1] for text in texts)
        found["analyses"] = f"{last}; {len(errors)} parts of the analyses were not computed"
    return found


def _account(outcomes: list[Outcome], note: Callable[[str], None]) -> dict[str, str]:
    """Tell what went wrong with the runs, each thing once."""
    for text in dict.fromkeys(text for outcome in outcomes for text in outcome.notes):
        note(text)
    failed: dict[str, str] = {}
    for outcome in outcomes:
        failed = outcome.failed | failed
    for run_id, reason in failed.items():
        note(f"not analyzed (corrupt): {run_id}: {reason}")
    return failed


def _results(
    do: _Do, parts: list[Part], workers: int, advance: Callable[[float], None]
) -> Generator[tuple[int, Outcome | Exception]]:
    """Each part's place and its outcome, as they are done: here, or in so many other processes."""
    if workers > 1:
        yield from share(do, parts, workers, PRELOAD, parts[0].scratch / "log.txt", advance)
        return
    for place, part in enumerate(parts):
        try:
            yield place, do(part, advance)
        except InputError:
            raise
        except Exception as error:  # raised at the end: the other parts are done first
            yield place, error


@dataclass(frozen=True, kw_only=True)
class _Do:
    """Computes a part, in whichever process it is called."""

    cache: Path
    threads: int | None
    """That torch may use for a large dense ΔW: this process's share of the cores (None: as it is)."""

    def __call__(self, part: Part, advance: Callable[[float], None]) -> Outcome:
        if self.threads:
            torch.set_num_threads(self.threads)
        outcome = batch.compute(part, self._bases, advance)
        return replace(outcome, notes=[*self._notes])

    @cached_property
    def _bases(self) -> Bases:
        """The bases that this process has opened."""
        return Bases(self.cache, self._notes.append)

    @cached_property
    def _notes(self) -> list[str]:
        return []


def _num_workers(jobs: list[Job], workers: int | None) -> int:
    """As many as asked; one where nothing was asked and there is little to do."""
    if workers is not None:
        return workers
    if len(jobs) < LITTLE_JOBS:
        records = {record.run_id: record for job in jobs for record in job.records}
        if sum(updates_bytes(jobs[0].root, record) for record in records.values()) < LITTLE_BYTES:
            return 1
    return available_cores()


@contextlib.contextmanager
def _scratch(root: Path) -> Iterator[Path]:
    """A folder for what is not whole yet; gone at the end. Those of processes that were killed go too."""
    for folder in root.glob(".analyze-*"):
        with contextlib.suppress(OSError), open(folder / "lock") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".analyze-", dir=root))
    except OSError as error:
        raise InputError(f"{root}: cannot be written: {error.strerror}") from None
    with open(folder / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
