"""What there is to analyze: one analysis of one run or one pair is a job; `cache` keeps its rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorabench.analysis.bases import BaseKey
from lorabench.analysis.pairs import Pair
from lorabench.spec.analysis import Analysis
from lorabench.store.record import RunRecord
from lorabench.updates import formats

VERSION = 2
"""Part of every cache key: raise it when the engine's own columns change."""
UPDATES, SNAPSHOTS = "updates", "snapshots"
MAX_JOBS, MAX_BYTES = 500, 2**30
"""Of a batch, which is what is lost if it is interrupted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One analysis of one run or one pair, and the file that keeps it beside the others of that run or pair."""

    analysis: Analysis
    records: tuple[RunRecord, ...]
    root: Path

    @cached_property
    def runs(self) -> tuple[str, ...]:
        return tuple(record.run_id for record in self.records)

    @cached_property
    def file(self) -> Path:
        name = f"pairs/{'--'.join(self.runs)}" if len(self.runs) > 1 else f"runs/{self.runs[0]}/analyses"
        return self.root / f"{name}.zip"

    @property
    def old_file(self) -> Path:
        """Where it was kept while each job had a file of its own."""
        return self.file.with_suffix("") / f"{self.analysis.name}.parquet"

    @cached_property
    def key(self) -> str:
        """What the numbers depend on: the analysis's version, the content of the updates, and that of the base."""
        read = max(formats.version_of(record.spec["method"]) for record in self.records)
        versions = [VERSION, read, self.analysis.version]
        content: list[Any] = [files_of(record, self.folders) for record in self.records]
        if self.analysis.is_beside_base():
            content += [[asdict(BaseKey.of(record)), record.environment.get("model_sha256")] for record in self.records]
        return json.dumps([self.analysis.name, versions, content])

    @cached_property
    def digest(self) -> str:
        """The key in short."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:32]

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of a run that are read."""
        return (UPDATES, SNAPSHOTS) if self.analysis.is_over_training() else (UPDATES,)


def files_of(record: RunRecord, folders: tuple[str, ...] = (UPDATES,)) -> dict[str, str]:
    """The digests of the files that hold what a run learned."""
    return {path: digest for path, digest in sorted(record.files.items()) if path.split("/")[0] in folders}


def subjects(analysis: Analysis, records: dict[str, RunRecord], pairs: list[Pair]) -> list[tuple[str, ...]]:
    """The runs, or the pairs of runs, that an analysis is made of; each once."""
    if analysis.is_of_pairs():
        return list(dict.fromkeys((pair.run_a, pair.run_b) for pair in pairs if pair.order < analysis.max_pairs))
    if analysis.is_over_training():
        return [(run_id,) for run_id, record in records.items() if files_of(record, (SNAPSHOTS,))]
    return [(run_id,) for run_id in records]


def updates_bytes(root: Path, record: RunRecord) -> int:
    """Size of what a run has learned, on disk."""
    files = [root / "runs" / record.run_id / path for path in files_of(record)]
    return sum(file.stat().st_size for file in files if file.is_file())


def batches(jobs: list[Job]) -> Iterator[list[Job]]:
    """All jobs, those of a run side by side, its pairs with smaller runs after them; about MAX_JOBS or MAX_BYTES each.

    What one file keeps is in one batch. Jobs of a batch share what is read. Of runs that are compared across batches
    the smaller one is read again, so a full fine-tuning is decomposed once though many adapters are held against it.
    """
    records = {record.run_id: record for job in jobs for record in job.records}
    sizes = {run_id: updates_bytes(jobs[0].root, record) for run_id, record in records.items()}
    places = {run_id: place for place, run_id in enumerate(sorted(sizes, key=sizes.__getitem__))}
    newest = {job: max(job.runs, key=places.__getitem__) for job in jobs}
    batch: list[Job] = []
    size = 0
    for job in sorted(jobs, key=lambda job: (places[newest[job]], len(job.runs), job.runs)):
        begins = not batch or newest[job] != newest[batch[-1]]
        is_full = len(batch) >= MAX_JOBS and (begins or (len(job.runs) > 1 and job.runs != batch[-1].runs))
        if batch and (is_full or (begins and size >= MAX_BYTES)):
            yield batch
            batch, size, begins = [], 0, True
        size += sizes[newest[job]] if begins else 0
        batch.append(job)
    if batch:
        yield batch
