import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from lorabench.analysis import tidy
from lorabench.analysis.tidy import Spool, concatenate, read_keyed, read_table, to_frame, to_table, write_table
from lorabench.config.decode import InputError


def rows(n, side="input"):
    return [{"side": side, "i": np.arange(n, dtype=np.int16), "phi": np.linspace(0, 1, n), "size": n, "null": None}]


def test_a_row_of_arrays_stands_for_many():
    scalars = [{"metric": "a", "value": 1, "null": None}, {"metric": "b", "value": 2.5, "null": 3.0}]
    frame = to_table([*rows(3), *rows(2, "output")], {"layer": "q", "depth": None}).to_pandas()
    expected = pd.DataFrame({"side": 3 * ["input"] + 2 * ["output"], "i": [0, 1, 2, 0, 1], "size": [3, 3, 3, 2, 2]})
    for column in expected:
        assert list(frame[column]) == list(expected[column])
    assert list(frame["phi"]) == [0, 0.5, 1, 0, 1] and set(frame["layer"]) == {"q"}
    assert frame[["depth", "null"]].isna().all().all() and list(frame)[:2] == ["layer", "depth"]
    assert list(to_table(scalars, {}).to_pandas()["value"]) == [1, 2.5]


@pytest.mark.parametrize("sizes", [[], [2], [5, 9, 3]])
def test_what_is_written_is_read_with_the_same_key_only(tmp_path, sizes):
    file = tmp_path / "deep" / "t.parquet"
    tables = [to_table(rows(n), {"layer": f"of {n}", "depth": n if n == 5 else None}) for n in sizes]
    written = concatenate(tables or [to_table([], {})])
    write_table(file, "key 1", written)
    assert [path.name for path in file.parent.iterdir()] == ["t.parquet"]
    table = read_table(file, "key 1")
    assert written.equals(table) and written.schema.equals(table.schema, check_metadata=True)
    assert len(table) == sum(sizes) and read_table(file, "key 2") is None
    assert read_table(tmp_path / "none.parquet", "key 1") is None
    key, again = read_keyed(file)
    assert key == "key 1" and again.equals(table)
    if sizes:
        frame = to_frame(concatenate([table, table]), [len(table)] * 2, {"run": ["x", "y"], "value": [3, "4"]})
        assert list(frame)[:2] == ["run", "value"] and len(frame) == 2 * sum(sizes)
        assert set(zip(frame["run"], frame["value"], strict=True)) == {("x", 3), ("y", "4")}
        assert frame.groupby(["run", "layer"], observed=True)["i"].count().to_dict() == {
            (run, f"of {n}"): n for run in "xy" for n in sizes
        }


def test_a_table_that_fails_on_the_way_leaves_what_was_there(tmp_path):
    file = tmp_path / "t.parquet"
    write_table(file, "1", to_table(rows(2), {}))
    with pytest.raises(pa.ArrowNotImplementedError):
        write_table(file, "2", pa.table({"no column of parquet": pa.array([], pa.month_day_nano_interval())}))
    assert len(read_table(file, "1")) == 2 and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("sizes", [[], [2, 3], [tidy._ROW_GROUP - 1, 1, 4]])
def test_a_spool_gives_back_its_rows_here_and_elsewhere(tmp_path, sizes):
    """What is written of them does not depend on who has made them, nor on how many layers are made into one table."""
    places = [{"layer": f"of {n}", "depth": n if n > 2 else None} for n in sizes]
    want = [to_table(rows(n), place) for n, place in zip(sizes, places, strict=True)]
    spool = Spool(tmp_path / "s")
    for n, place in zip(sizes, places, strict=True):
        spool.add(rows(n), place)
    same = concatenate(want).combine_chunks() if want else None
    for found in (spool, Spool(tmp_path / "s")):
        got = [*found.tables()]
        assert concatenate(got).combine_chunks().equals(same) if want else not got
        spool.save()
    spool.remove()
    assert not list(spool.tables()) and not list(tmp_path.iterdir())


def test_layers_that_give_other_columns_are_tables_of_their_own(tmp_path):
    spool = Spool(tmp_path / "s")
    one = [{"metric": "a", "value": 1.5}]
    for given, place in ((one, {"kind": "q"}), (one, {"kind": "v"}), (rows(2), {"kind": "q"}), (one, {"kind": None})):
        spool.add(given, place)
    assert [len(table) for table in spool.tables()] == [2, 2, 1]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/t\.parquet: cannot be written"):
        write_table(tmp_path / "file" / "t.parquet", "k", to_table([], {}))
