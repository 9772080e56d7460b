from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lorabench.report.results import selected
from lorabench.report.update_table import changes_sheet
from tests import synthetic


@pytest.fixture(scope="module")
def results():
    return synthetic.shared()


@pytest.fixture(scope="module")
def sheet(results):
    return changes_sheet(results, selected(results))


def rows(results, analysis, metric, kind, rank):
    runs = selected(results).done
    runs = runs[(runs["method.rank"] == rank) & (runs["quantization"] == "none")]
    frame = results.analyses[analysis]
    return frame[frame["run_id"].isin(runs.index) & (frame["metric"] == metric) & (frame["kind"] == kind)]


def test_a_row_a_setting_and_kind(results, sheet):
    labels = [column.label for column in sheet.columns]
    assert labels[:4] == ["method", "rank", "quantization", "module"] and labels[-1] == "n"
    settings = selected(results).done.groupby(results.settings, dropna=False).ngroups
    assert len(sheet.rows) == 4 * settings
    assert all(len(row) == len(sheet.columns) for row in sheet.rows)


@pytest.mark.parametrize("measure", ["spectrum.rank_90", "intruders.num_intruders", "spectrum.relative_norm"])
def test_numbers_are_means_over_layers_and_seeds(results, sheet, measure):
    tidy = sheet.tidy
    row = tidy[(tidy["method.rank"] == 16) & (tidy["quantization"] == "none") & (tidy["kind"] == "v_proj")]
    row = row[row["measure"] == measure].iloc[0]
    frame = rows(results, *measure.split("."), "v_proj", 16)
    assert row["mean"] == pytest.approx(frame["value"].astype(float).mean())
    if frame["null"].notna().any():
        assert row["null"] == pytest.approx(frame["null"].astype(float).mean())


def test_the_amplification_of_a_run_is_a_geometric_mean(results, sheet):
    tidy = sheet.tidy
    row = tidy[(tidy["method.rank"] == 64) & (tidy["quantization"] == "none") & (tidy["kind"] == "q_proj")]
    row = row[row["measure"] == "alignment.amplification"].iloc[0]
    frame = rows(results, "alignment", "amplification", "q_proj", 64)
    runs = np.log(frame["value"].astype(float)).groupby(frame["run_id"].astype(str)).mean()
    assert row["mean"] == pytest.approx(np.exp(runs).mean())


def test_nulls_stand_in_brackets(sheet):
    column = [c.label for c in sheet.columns].index("rank 90")
    assert all("[" in row[column] for row in sheet.rows)


def test_without_analyses_there_is_no_table(results):
    assert changes_sheet(dataclasses.replace(results, analyses={}), selected(results)) is None
