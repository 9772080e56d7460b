"""What one file keeps of a run: each analysis by its own key, whole or not at all, beside files of before."""

import zipfile
from dataclasses import dataclass

import numpy as np
import pytest

from lorabench.analysis import cache
from lorabench.analysis.cache import from_stream, read_tables, to_stream, write_streams
from lorabench.analysis.tidy import concatenate, to_table, write_table
from lorabench.config.decode import InputError


@dataclass(frozen=True)
class Named:
    name: str


class Job:
    """As much of a job as is asked for here."""

    def __init__(self, folder, name, version=1):
        self.analysis, self.key = Named(name), f"{name} {version}"
        self.file, self.old_file = folder / "run" / "analyses.zip", folder / "run" / "analyses" / f"{name}.parquet"


def rows(n):
    return [{"side": "input", "i": np.arange(n, dtype=np.int16), "phi": np.linspace(0, 1, n), "null": None}]


@pytest.mark.parametrize("sizes", [[], [0], [2], [2, 3], [cache.MIN_PACKED], [5, cache.GROUP, 3], 2 * [cache.GROUP]])
def test_a_stream_gives_back_its_tables_for_its_key_only(sizes):
    """Also where layers have other words, and numbers that others lack, in groups of their own."""
    tables = [to_table(rows(n), {"layer": f"of {n}", "depth": n if n == 5 else None}) for n in sizes]
    content = to_stream("key 1", iter(tables))
    found, want = from_stream(content, "key 1"), concatenate(tables or [to_table([], {})])
    assert found.combine_chunks().equals(want.combine_chunks()) and not found.schema.metadata
    assert from_stream(content, "key 2") is from_stream(content[: len(content) // 2], "key 1") is None


def test_large_tables_are_packed():
    size, table = cache.GROUP, to_table(rows(cache.GROUP), {"layer": "q", "depth": 1})
    assert len(to_stream("k", [table])) < 0.6 * table.nbytes and table.nbytes > 20 * size


def write(folder, *jobs, size=2):
    write_streams({job: to_stream(job.key, [to_table(rows(size), {})]) for job in jobs}, folder / "new")


def test_a_new_version_of_one_analysis_leaves_the_others_as_they_are(tmp_path):
    one, two, three = (Job(tmp_path, name) for name in ("one", "two", "three"))
    write(tmp_path, two, one)
    before = one.file.read_bytes()
    newer = Job(tmp_path, "two", 2)
    assert read_tables([one, newer]).keys() == {one}
    write(tmp_path, newer, three, size=4)
    found = read_tables([one, two, newer, three])
    assert {job.key: len(table) for job, table in found.items()} == {"one 1": 2, "two 2": 4, "three 1": 4}
    write(tmp_path, three)
    write(tmp_path, two)
    with zipfile.ZipFile(one.file) as archive:
        assert archive.namelist() == ["one.arrow", "three.arrow", "two.arrow"] and archive.testzip() is None
    one.file.unlink()
    write(tmp_path, one, two)
    assert one.file.read_bytes() == before and [*one.file.parent.iterdir()] == [one.file], "no order, no time, no rest"


def test_files_of_before_are_read_where_there_is_nothing_newer(tmp_path):
    one, two = Job(tmp_path, "one"), Job(tmp_path, "two")
    for job in (one, two):
        write_table(job.old_file, job.key, to_table(rows(3), {}))
    assert {len(table) for table in read_tables([one, two]).values()} == {3}
    write(tmp_path, two)
    assert [len(table) for table in read_tables([one, two]).values()] == [3, 2]
    assert not read_tables([Job(tmp_path, "one", 2)])


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_what_is_not_whole_counts_as_none_and_is_written_anew(tmp_path, kept):
    one, two = Job(tmp_path, "one"), Job(tmp_path, "two")
    write(tmp_path, one, two)
    content = one.file.read_bytes()
    one.file.write_bytes(content[: int(kept * len(content))])
    assert not read_tables([one, two])
    write(tmp_path, one)
    assert read_tables([one, two]).keys() == {one}


def test_one_stream_that_was_damaged_takes_no_other_with_it(tmp_path):
    one, two = Job(tmp_path, "one"), Job(tmp_path, "two")
    write(tmp_path, one, two)
    content = bytearray(one.file.read_bytes())
    content[content.index(b"two 1")] ^= 1
    one.file.write_bytes(content)
    assert read_tables([one, two]).keys() == {one}
    write(tmp_path, Job(tmp_path, "three"))
    with zipfile.ZipFile(one.file) as archive:
        assert archive.namelist() == ["one.arrow", "three.arrow"]


def test_what_fails_on_the_way_leaves_what_was_there(tmp_path, monkeypatch):
    one = Job(tmp_path, "one")
    write(tmp_path, one)
    before = one.file.read_bytes()
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match=r"analyses\.zip: cannot be written: .*No space left"):
        write(tmp_path, Job(tmp_path, "two"))
    assert one.file.read_bytes() == before and not (tmp_path / "new").exists()
