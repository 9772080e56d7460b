"""Analyses of a sweep's runs: updates on disk -> tidy frames, cached by content.

    results/runs/<run_id>/analyses/<name>.parquet      results/pairs/<run_a>--<run_b>/<name>.parquet

Layers are streamed: memory holds one layer's thin SVD of each run that is compared with another, and the base's of
that layer; each SVD is computed once for all analyses.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from lorabench import formats, plugins
from lorabench.analysis import Analysis
from lorabench.base import Tuned
from lorabench.bases import FOLDER, BaseKey, Bases
from lorabench.decode import InputError
from lorabench.layer import LayerSVD
from lorabench.linalg import one_thread
from lorabench.pairs import Pair, find_pairs
from lorabench.readers._entry import Entry
from lorabench.record import RunRecord, Status, Store, file_digest
from lorabench.sweep import Sweep
from lorabench.tidy import TableWriter, read_table, to_frame, to_table

VERSION = 1
"""Part of every cache key: raise it when the engine's own columns change."""
UPDATES, SNAPSHOTS = "updates", "snapshots"
PAIR_AXES = ("method.rank", "seed")
LAYER_COLUMNS = ["layer", "kind", "depth"]
PAIR_COLUMNS = ["run_a", "run_b", "axis", "value_a", "value_b"]
MAX_FILES = 200
"""Written at a time: beyond, runs are read again rather than the limit of open files passed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One analysis of one run or one pair, and the file that keeps it."""

    analysis: Analysis
    records: tuple[RunRecord, ...]
    root: Path

    @cached_property
    def runs(self) -> tuple[str, ...]:
        return tuple(record.run_id for record in self.records)

    @cached_property
    def file(self) -> Path:
        folder = f"pairs/{'--'.join(self.runs)}" if len(self.runs) > 1 else f"runs/{self.runs[0]}/analyses"
        return self.root / folder / f"{self.analysis.name}.parquet"

    @cached_property
    def key(self) -> str:
        """What the numbers depend on: the analysis's version, the content of the updates, and that of the base."""
        versions = [VERSION, formats.VERSION, self.analysis.version]
        content: list[Any] = [files_of(record, self.folders) for record in self.records]
        if self.analysis.needs == "base":
            content += [[asdict(BaseKey.of(record)), record.environment.get("model_sha256")] for record in self.records]
        return json.dumps([self.analysis.name, versions, content])

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of a run that are read."""
        return (UPDATES, SNAPSHOTS) if self.analysis.needs == "trajectory" else (UPDATES,)


def analyze(
    store: Store,
    sweep: Sweep,
    selected: Collection[str] | None = None,
    *,
    pair_axes: tuple[str, ...] = PAIR_AXES,
    note: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, pd.DataFrame]:
    """A frame for every analysis: of each run that is done, and of the pairs that differ in one of `pair_axes`.

    Frames begin with `run_id`, or `run_a, run_b, axis, value_a, value_b`, then `layer, kind, depth`. `selected` are
    the runs to compare (see `find_pairs`). Runs without updates, and those whose files are not as their record says,
    are left out, each with a `note`. Cached results are only read.
    """
    records = _analyzable(store, sweep, note)
    pairs = list(find_pairs(sweep, records, pair_axes, selected))
    analyses = [cast(Analysis, plugins.example("analyses", name)) for name in plugins.names("analyses")]
    jobs = {(analysis.name, *runs): Job(analysis=analysis, records=tuple(records[r] for r in runs), root=store.root)
            for analysis in analyses for runs in _subjects(analysis, records, pairs)}  # fmt: skip
    tables = {name: read_table(job.file, job.key) for name, job in jobs.items()}
    failed = _compute(store, [job for name, job in jobs.items() if tables[name] is None], note)
    for name, job in jobs.items():
        if tables[name] is None and not failed & {*job.runs}:
            tables[name] = read_table(job.file, job.key)
    made = {name: table for name, table in tables.items() if table is not None and not failed & {*name[1:]}}
    return {analysis.name: _frame(analysis, made, pairs) for analysis in analyses}


def compare(
    store: Store, name: str, pairs: Sequence[tuple[RunRecord, RunRecord]], note: Callable[[str], None]
) -> pd.DataFrame:
    """One analysis of these pairs of runs, cached as `analyze` does; `run_a, run_b`, then `layer, kind, depth`."""
    analysis = cast(Analysis, plugins.example("analyses", name))
    jobs = [Job(analysis=analysis, records=pair, root=store.root) for pair in pairs]
    _compute(store, [job for job in jobs if read_table(job.file, job.key) is None], note)
    tables = [(job, read_table(job.file, job.key)) for job in jobs]
    parts = [({"run_a": job.runs[0], "run_b": job.runs[1]}, table) for job, table in tables if table is not None]
    return to_frame(parts, ["run_a", "run_b", *LAYER_COLUMNS])


def files_of(record: RunRecord, folders: tuple[str, ...] = (UPDATES,)) -> dict[str, str]:
    """The digests of the files that hold what a run learned."""
    return {path: digest for path, digest in sorted(record.files.items()) if path.split("/")[0] in folders}


def _analyzable(store: Store, sweep: Sweep, note: Callable[[str], None]) -> dict[str, RunRecord]:
    """The records of the runs that are done and have kept updates; one note for each reason to leave runs out."""
    records, others = {}, defaultdict(list)
    for state in store.states(list(sweep.runs)):
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


def _subjects(analysis: Analysis, records: dict[str, RunRecord], pairs: list[Pair]) -> list[tuple[str, ...]]:
    if analysis.needs == "pair":
        return [(pair.run_a, pair.run_b) for pair in pairs]
    if analysis.needs == "trajectory":
        return [(run_id,) for run_id, record in records.items() if files_of(record, (SNAPSHOTS,))]
    return [(run_id,) for run_id in records]


def _frame(analysis: Analysis, tables: dict[tuple[str, ...], pa.Table], pairs: list[Pair]) -> pd.DataFrame:
    if analysis.needs != "pair":
        parts = [({"run_id": name[1]}, table) for name, table in tables.items() if name[0] == analysis.name]
        return to_frame(parts, ["run_id", *LAYER_COLUMNS])
    named = [(pair, tables.get((analysis.name, pair.run_a, pair.run_b))) for pair in pairs]
    parts = [({c: getattr(pair, c) for c in PAIR_COLUMNS}, table) for pair, table in named if table is not None]
    numeric = all(type(before[c]) in (int, float) for before, _ in parts for c in ("value_a", "value_b"))
    if not numeric:  # one column, one type
        parts = [(before | {c: str(before[c]) for c in ("value_a", "value_b")}, table) for before, table in parts]
    return to_frame(parts, [*PAIR_COLUMNS, *LAYER_COLUMNS])


def _compute(store: Store, jobs: list[Job], note: Callable[[str], None]) -> set[str]:
    """Do the jobs and write their files. Returns the runs that could not be read."""
    failed: dict[str, str] = {}
    bases = Bases(store.root / FOLDER, note)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (jobs and console.is_terminal)) as progress:
        task = progress.add_task("analyzing", total=len(jobs))
        for jobs_together in _batches(jobs):
            batch = Batch(store, jobs_together, bases, failed)
            batch.compute(partial(progress.advance, task))
    for run_id, reason in failed.items():
        note(f"not analyzed (corrupt): {run_id}: {reason}")
    return set(failed)


class Batch:
    """Jobs that share runs: each layer of these is read once, and given to all analyses."""

    def __init__(self, store: Store, jobs: list[Job], bases: Bases, failed: dict[str, str]):
        self.store, self.bases, self.failed = store, bases, failed
        self.records = {record.run_id: record for job in jobs for record in job.records}
        self.moving = {job.records[0].run_id for job in jobs if job.analysis.needs == "trajectory"}
        self.jobs = [job for job in jobs if job.analysis.needs != "base" or bases.find(job.records[0]) is not None]

    def compute(self, advance: Callable[[float], None]) -> None:
        """Write the file of each job whose runs can all be read."""
        entries = {run_id: found for run_id in self.records if (found := self._open(run_id)) is not None}
        writers = {job: TableWriter(job.file, job.key) for job in self.jobs if entries.keys() >= {*job.runs}}
        needed = {run_id for job in writers for run_id in job.runs}
        parameters = sorted({parameter for run_id in needed for parameter in entries[run_id][-1][1]})
        try:
            for parameter in parameters:
                seen = {run_id: self._load(run_id, parameter, entries[run_id]) for run_id in needed}
                self._add(writers, {run_id: steps for run_id, steps in seen.items() if steps})
                advance(len(self.jobs) / len(parameters))
            for job, writer in writers.items():
                if not self.failed.keys() & {*job.runs}:
                    writer.commit()
        finally:
            for writer in writers.values():
                writer.abort()

    def _open(self, run_id: str) -> list[tuple[int | None, dict[str, Entry]]] | None:
        """The entries of the run's snapshots by step, where they are wanted, and of its end; None where damaged."""
        if run_id in self.failed:
            return None
        record, folder = self.records[run_id], self.store.folder(run_id)
        with _noting(run_id, self.failed):
            _verify(folder, files_of(record, (UPDATES, SNAPSHOTS) if run_id in self.moving else (UPDATES,)))
            steps = sorted({int(path.split("/")[1]) for path in files_of(record, (SNAPSHOTS,))})
            folders = [(step, folder / SNAPSHOTS / f"{step:06d}") for step in steps if run_id in self.moving]
            return [(step, formats.open_layers(at)) for step, at in [*folders, (None, folder / UPDATES)]]
        return None

    def _load(self, run_id: str, parameter: str, entries: list[tuple[int | None, dict[str, Entry]]]) -> list[LayerSVD]:
        """The layer after each step, the end last; empty where the run has not changed it, or is damaged."""
        if parameter not in entries[-1][1] or run_id in self.failed:
            return []
        with _noting(run_id, self.failed):
            loaded = [(step, formats.load_layer(found[parameter])) for step, found in entries if parameter in found]
            return [replace(layer, step=_last_step(self.records[run_id]) if step is None else step)
                    for step, layer in loaded]  # fmt: skip
        return []

    def _add(self, writers: dict[Job, TableWriter], seen: dict[str, list[LayerSVD]]) -> None:
        """The rows of one layer for every job whose runs all have it in the same shape."""
        tuned: dict[str, Tuned | None] = {}
        for job, writer in writers.items():
            if not {*job.runs} <= seen.keys() or len({seen[run_id][-1].shape for run_id in job.runs}) > 1:
                continue
            last = [seen[run_id][-1] for run_id in job.runs]
            (run_id, *_), needs = job.runs, job.analysis.needs
            given: list[Any] = seen[run_id] if needs == "trajectory" else last
            if needs == "base":
                if run_id not in tuned:
                    tuned[run_id] = self.bases.tuned(job.records[0], last[0])
                given = [tuned[run_id]]
            if given == [None] or (needs == "trajectory" and len(given) < 2):
                continue
            with one_thread():
                rows = job.analysis.compute(*given)
            if rows:
                writer.add(to_table(rows, {column: getattr(last[0], column) for column in LAYER_COLUMNS}))


def _last_step(record: RunRecord) -> int:
    spec = record.spec
    return spec["steps"] * len(spec.get("tasks") or [None])


def _verify(folder: Path, files: dict[str, str]) -> None:
    for path, digest in files.items():
        file = folder / path
        if not file.is_file():
            raise InputError(f"{file}: is missing")
        if file_digest(file) != digest:
            raise InputError(f"{file}: is not the file that the record describes (its SHA-256 differs)")


def _batches(jobs: list[Job]) -> Iterator[list[Job]]:
    """Jobs that share runs, directly or through others, together; at most MAX_FILES at a time."""
    root: dict[str, str] = {}

    def find(run_id: str) -> str:
        while root.setdefault(run_id, run_id) != run_id:
            root[run_id] = run_id = root[root[run_id]]
        return run_id

    for job in jobs:
        for run_id in job.runs:
            root[find(run_id)] = find(job.runs[0])
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(find(job.runs[0]), []).append(job)
    for group in groups.values():
        for start in range(0, len(group), MAX_FILES):
            yield group[start : start + MAX_FILES]


@contextlib.contextmanager
def _noting(run_id: str, failed: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        failed[run_id] = str(error)
