"""What all analyses have found of one run or one pair, in one file: ten small ones take ten times as long.

    results/runs/<run_id>/analyses.zip      results/pairs/<run_a>--<run_b>.zip

A zip archive, nothing in it packed, of an Arrow stream <analysis>.arrow each, which bears its key: where one analysis
has a new version, the others stay as they are. Two processes that write one file at a time both leave a whole one, in
which what the other has found may be lacking, and is made again. Before, each analysis had a parquet file of its own
(`Job.old_file`): those are still read.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from lorabench.analysis.jobs import Job
from lorabench.analysis.tidy import KEY, clear_errors, read_table, to_table

GROUP = 8192
"""Rows of neighbouring layers that are written as one."""
MIN_PACKED = 1024
"""Rows from which on they are packed: it takes five times as long, and of small files a disk has whole blocks."""
UNREADABLE = (OSError, zipfile.BadZipFile, ValueError, EOFError, RuntimeError, pa.ArrowException)
"""What comes of a file that is not whole, or is something else."""


def read_tables(jobs: Iterable[Job]) -> dict[Job, pa.Table]:
    """The tables of those jobs that have one which was made with their key; what cannot be read counts as none."""
    of_file: defaultdict[Path, list[Job]] = defaultdict(list)
    for job in jobs:
        of_file[job.file].append(job)
    found: dict[Job, pa.Table] = {}
    for file, group in of_file.items():
        streams = _streams(file, {_member(job) for job in group})
        for job in group:
            table = from_stream(streams.get(_member(job), b""), job.key)
            if table is None and job.old_file.parent.is_dir():
                table = read_table(job.old_file, job.key)
            if table is not None:
                found[job] = table
    return found


def write_streams(streams: dict[Job, bytes], temporary: Path) -> None:
    """Put the streams of jobs of one file into it, by way of `temporary`, beside those of other analyses there.

    Raises InputError where it cannot be written.
    """
    file = next(iter(streams)).file
    mine = {_member(job): content for job, content in streams.items()}
    with clear_errors(file), contextlib.ExitStack() as stack:
        file.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(temporary.unlink, missing_ok=True)
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, content in sorted((_streams(file) | mine).items()):
                archive.writestr(zipfile.ZipInfo(name), content)
        os.replace(temporary, file)


def to_stream(key: str, tables: Iterable[pa.Table]) -> bytes:
    """Tables of one set of columns as one Arrow stream that bears the key; of none, a table without columns."""
    sink = pa.BufferOutputStream()
    writer: pa.RecordBatchStreamWriter | None = None
    for group in _groups(tables):
        if writer is None:
            packing = "zstd" if sum(map(len, group)) >= MIN_PACKED else None
            schema = group[0].schema.with_metadata({KEY: key.encode()})
            writer = pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression=packing))
        like = [each if each.schema.equals(schema) else each.cast(schema) for each in group]
        writer.write_table(like[0] if len(like) == 1 else pa.concat_tables(like).unify_dictionaries().combine_chunks())
    assert writer is not None
    writer.close()
    return sink.getvalue().to_pybytes()


def from_stream(content: bytes, key: str) -> pa.Table | None:
    """The table, where the stream bears this key and is whole."""
    with contextlib.suppress(*UNREADABLE), pa.ipc.open_stream(content) as reader:
        if (reader.schema.metadata or {}).get(KEY) == key.encode():
            return reader.read_all().replace_schema_metadata().unify_dictionaries()
    return None


def _groups(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Neighbouring tables with GROUP rows or more between them; one empty table where there is none."""
    waiting: list[pa.Table] = []
    empty = True
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= GROUP:
            yield waiting
            waiting, empty = [], False
    if waiting or empty:
        yield waiting or [to_table([], {})]


def _streams(file: Path, names: set[str] | None = None) -> dict[str, bytes]:
    """What is whole of a file's streams, by name: of all, or of these."""
    found: dict[str, bytes] = {}
    if not file.is_file():  # a pipe would be waited for without end
        return found
    with contextlib.suppress(*UNREADABLE), zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if names is None or name in names:
                with contextlib.suppress(*UNREADABLE):
                    found[name] = archive.read(name)
    return found


def _member(job: Job) -> str:
    return f"{job.analysis.name}.arrow"
