"""Long tables and COLUMNS.md, of a small store that is analyzed in earnest: every analysis, on three kinds of runs."""

import dataclasses
import gzip
import io

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from lorabench.analysis.analyze import analyze
from lorabench.config import plugins
from lorabench.report import analysis_rows, columns
from lorabench.report.analysis_rows import LAST, files, long_tables
from lorabench.report.columns import column_text, columns_page
from lorabench.report.results import load_results
from lorabench.report.tables import build_tables, subspace_table, write_tables
from lorabench.spec.known import known_measures
from lorabench.store.store import Store
from tests.analysis.test_analyze import LAYERS, make_sweep, write_run

SETTINGS = ["run_id", "method.name", "method.rank", "lr", "seed", "selected"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    sweep, store = make_sweep(tmp_path_factory.mktemp("base")), Store(tmp_path_factory.mktemp("store"))
    for spec in sweep.runs:
        write_run(store, spec)
    return load_results(store, sweep, analyze)


@pytest.fixture(scope="module")
def tables(results):
    return long_tables(results)


def test_every_number_has_a_row_with_its_run(results, tables):
    frame = tables["metrics"].to_pandas()
    assert list(frame.columns)[: len(SETTINGS)] == SETTINGS and list(frame.columns)[-3:] == LAST
    analyses = {name: f for name, f in results.analyses.items() if "metric" in f and "run_id" in f}
    assert len(frame) == sum(map(len, analyses.values())) and set(frame["analysis"]) == {*analyses}
    for name, own in analyses.items():
        mine = frame[frame["analysis"] == name].reset_index(drop=True)
        for column in own:
            wanted, found = own[column], mine[column]
            assert found.astype(object).where(found.notna()).equals(wanted.astype(object).where(wanted.notna()))
    runs = frame.drop_duplicates("run_id").set_index("run_id")
    for key in ("method.name", "method.rank", "lr", "seed"):
        for run_id, value in runs[key].items():
            wanted = results.runs.loc[run_id, key]
            assert value == wanted or (pd.isna(value) and pd.isna(wanted))


def test_pairs_have_the_settings_of_both_runs(results, tables):
    frame = tables["subspace"].to_pandas()
    assert {"a.method.rank", "b.method.rank", "a.seed", "b.seed"} < {*frame}
    ranks = frame[frame["axis"] == "method.rank"]
    assert set(ranks["a.method.rank"]) == {2} and set(ranks["b.method.rank"]) == {4}
    assert set(ranks["value_a"]) == {"2"} and (ranks["a.seed"] == ranks["b.seed"]).all()
    methods = frame[frame["axis"] == "method"]
    assert set(zip(methods["value_a"], methods["value_b"], strict=True)) == {("full", "lora")}


def test_files_give_back_the_table_and_are_the_same_again(tables, monkeypatch):
    metrics = tables["metrics"]
    plain = files("metrics", metrics)
    assert plain == files("metrics", metrics) and plain.keys() == {"metrics.parquet", "metrics.csv"}
    read = parquet.read_table(io.BytesIO(plain["metrics.parquet"]))
    assert read.to_pandas().equals(metrics.to_pandas())
    table = pd.read_csv(io.BytesIO(plain["metrics.csv"]), float_precision="round_trip")
    assert table["value"].equals(metrics["value"].to_pandas()) and list(table) == metrics.column_names
    monkeypatch.setattr(analysis_rows, "PLAIN_ROWS", 3)
    packed = files("metrics", metrics)
    assert gzip.decompress(packed["metrics.csv.gz"]) == plain["metrics.csv"] and packed == files("metrics", metrics)
    monkeypatch.setattr(analysis_rows, "MOST_ROWS", 3)
    assert files("metrics", metrics).keys() == {"metrics.parquet"}
    assert files("subspace", tables["subspace"]).keys() == {"subspace.parquet"}


def test_every_column_and_metric_that_any_analysis_gives_is_documented(results, tables):
    assert all(len(frame) for name, frame in results.analyses.items()), "each analysis has found something"
    page = columns_page(results, tables)
    for name, frame in results.analyses.items():
        cls = plugins.plugin_class("analyses", name)
        for column in frame:
            assert column_text(column, [name]), f"{name}: {column}"
        if "metric" in frame:
            assert set(frame["metric"]) <= {*cls.metrics}, name
            assert {*cls.per_layer} <= {*cls.metrics}, name
        assert f"### {name}\n" in page and all(f"| `{metric}` |" in page for metric in cls.metrics)
    for name, table in tables.items():
        assert f"## {name}.parquet\n" in page and all(f"| `{column}` |" in page for column in table.column_names)
    assert all(f"| `{column}` |" in page for column in results.runs)
    with pytest.raises(KeyError):
        column_text("no_such_column", ["spectrum"])


def test_every_column_of_the_other_tables_is_documented(results):
    assert {*subspace_table(results)} <= {*columns.SUBSPACE, *columns.PAIR, "kind", *results.runs}
    for sheet in build_tables(results):
        assert {*sheet.tidy} <= {*columns.SHEET, *results.runs}


def test_a_metric_that_tables_can_show_has_one_value_a_layer_and_side(results):
    for name, frame in results.analyses.items():
        cls = plugins.plugin_class("analyses", name)
        if cls.needs in ("layer", "base") and "metric" in frame:
            places = ["run_id", "layer", "metric", *(["side"] if "side" in frame else [])]
            counts = frame.groupby(places, observed=True, dropna=False).size().groupby("metric", observed=True).max()
            several = set(counts.index[counts > 1])
            assert not {f"{name}.{metric}" for metric in several} & {*known_measures()}


@pytest.mark.parametrize("name", ["alignment.amplification", "intruders.num_intruders", "survival.survival"])
def test_a_measure_of_a_run_is_the_mean_over_layers_and_sides(results, name):
    analysis, _, metric = name.partition(".")
    rows = [row for _, row in results.analyses[analysis].iterrows() if row["metric"] == metric]
    for run_id in results.runs.index:
        for column, source in ((name, "value"), (f"{name}:null", "null")):
            mine = [row[source] for row in rows if row["run_id"] == run_id]
            assert len(mine) == len(LAYERS) * (2 if analysis == "survival" else 1)
            assert results.runs.loc[run_id, column] == pytest.approx(sum(mine) / len(mine))


def test_everything_is_written_beside_the_tables(results, tmp_path):
    written = {file.name for file in write_tables(results, build_tables(results), tmp_path)}
    assert {"metrics.parquet", "metrics.csv", "singular_values.parquet", "subspace.parquet", "COLUMNS.md"} <= written
    assert all(isinstance(parquet.read_table(tmp_path / name), pa.Table) for name in written if "parquet" in name)


def test_a_key_that_none_of_an_analysis_runs_has_keeps_its_type(results):
    """Only some runs have snapshots, say full fine-tuning, which has no rank: the tables still fit together."""
    full = results.runs.index[results.runs["method.name"] == "full"]
    some = results.analyses["dynamics"]
    found = dataclasses.replace(results, analyses=results.analyses | {"dynamics": some[some["run_id"].isin(full)]})
    frame = long_tables(found)["metrics"].to_pandas()
    assert frame[frame["analysis"] == "dynamics"]["method.rank"].isna().all()
    assert set(frame[frame["analysis"] == "spectrum"]["method.rank"].dropna()) == {2, 4}
