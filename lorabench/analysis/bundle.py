"""What one analysis has found of all of a sweep's runs or pairs, in one file: thousands of small ones take minutes.

    results/<sweep>/.analyses/<name>.parquet

A copy for quick reading, with the digest of each job's key. The jobs' own files, which all sweeps share, stay.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from lorabench.analysis.jobs import Job
from lorabench.analysis.tidy import concatenate, read_keyed, to_table, write_table

FOLDER = ".analyses"
MIN_JOBS = 100
"""Of fewer there is no bundle: their own files are read as quickly."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """`table` holds the rows of one job after another; `places` says by digest where: first row and number."""

    table: pa.Table = field(default_factory=lambda: to_table([], {}))
    places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __contains__(self, job: Job) -> bool:
        return job.digest in self.places


@dataclass(frozen=True, kw_only=True, eq=False)
class Gathered:
    """The rows of some jobs, one job after another, and how many each has."""

    jobs: list[Job]
    table: pa.Table
    counts: list[int]


def read_bundle(file: Path) -> Bundle:
    """Empty where there is none that can be read."""
    found = read_keyed(file)
    if found is None:
        return Bundle()
    places, start = {}, 0
    try:
        for digest, count in json.loads(found[0]):
            places[digest] = start, count
            start += count
    except (ValueError, TypeError):  # not what `write_bundle` wrote
        return Bundle()
    return Bundle(table=found[1], places=places) if start == len(found[1]) else Bundle()


def gather(jobs: list[Job], bundle: Bundle, own: dict[Job, pa.Table]) -> Gathered:
    """The rows of each job that is in the bundle, or has a table of its `own`; the others are left out."""
    pieces: list[pa.Table | tuple[int, int]] = []
    kept, counts = [], []
    for job in jobs:
        if job in bundle:
            start, count = bundle.places[job.digest]
            if pieces and isinstance(pieces[-1], tuple) and pieces[-1][1] == start:
                pieces[-1] = pieces[-1][0], start + count  # neighbours there and here
            else:
                pieces.append((start, start + count))
        elif job in own:
            count = len(own[job])
            pieces.append(own[job])
        else:
            continue
        kept.append(job)
        counts.append(count)
    tables = [bundle.table.slice(p[0], p[1] - p[0]) if isinstance(p, tuple) else p for p in pieces]
    tables = [table for table in tables if len(table)] or [to_table([], {})]
    return Gathered(jobs=kept, table=concatenate(tables), counts=counts)


def write_bundle(file: Path, gathered: Gathered, before: Bundle) -> None:
    """Write what was gathered, where that is worth a file and is not what it holds already."""
    digests = [job.digest for job in gathered.jobs]
    if len(digests) >= MIN_JOBS and digests != list(before.places):
        key = json.dumps(list(zip(digests, gathered.counts, strict=True)))
        write_table(file, key, gathered.table)
