"""What there is to analyze: one analysis of one run or one pair is a job, with a file that keeps its rows.

results/runs/<run_id>/analyses/<name>.parquet      results/pairs/<run_a>--<run_b>/<name>.parquet
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorabench import formats
from lorabench.analysis import Analysis
from lorabench.bases import BaseKey
from lorabench.pairs import Pair
from lorabench.record import RunRecord

VERSION = 1
"""Part of every cache key: raise it when the engine's own columns change."""
UPDATES, SNAPSHOTS = "updates", "snapshots"
MAX_JOBS = 500
"""In a batch: what a worker is given at a time, and what is lost if it is interrupted."""


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

    @cached_property
    def digest(self) -> str:
        """The key in short."""
        return hashlib.sha256(self.key.encode()).hexdigest()[:32]

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of a run that are read."""
        return (UPDATES, SNAPSHOTS) if self.analysis.needs == "trajectory" else (UPDATES,)


def files_of(record: RunRecord, folders: tuple[str, ...] = (UPDATES,)) -> dict[str, str]:
    """The digests of the files that hold what a run learned."""
    return {path: digest for path, digest in sorted(record.files.items()) if path.split("/")[0] in folders}


def subjects(analysis: Analysis, records: dict[str, RunRecord], pairs: list[Pair]) -> list[tuple[str, ...]]:
    """The runs, or the pairs of runs, that an analysis is made of; each once."""
    if analysis.needs == "pair":
        return list(dict.fromkeys((pair.run_a, pair.run_b) for pair in pairs if pair.order < analysis.max_pairs))
    if analysis.needs == "trajectory":
        return [(run_id,) for run_id, record in records.items() if files_of(record, (SNAPSHOTS,))]
    return [(run_id,) for run_id in records]


def batches(jobs: list[Job]) -> Iterator[list[Job]]:
    """All jobs, those of a run side by side and its pairs with earlier runs after them, about MAX_JOBS at a time.

    Jobs of a batch share what is read: cut into more, a run that many are compared with is read more often.
    """
    places = {
        run_id: place for place, run_id in enumerate(dict.fromkeys(run_id for job in jobs for run_id in job.runs))
    }
    order = sorted(jobs, key=lambda job: (max(places[run] for run in job.runs), len(job.runs), job.runs))
    batch: list[Job] = []
    for job in order:
        if len(batch) >= MAX_JOBS and (len(job.runs) > 1 or job.runs != batch[-1].runs):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch
