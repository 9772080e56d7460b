from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from lorabench.report.results import selected
from lorabench.report.update_metrics import common_layers, metric_rows, ordered_kinds, per_run, shown_settings
from lorabench.spec.known import known_measures
from tests import synthetic


@pytest.fixture
def results():
    return synthetic.shared()


def test_rows_are_those_of_one_metric_of_the_given_runs_inside_the_blocks(results):
    runs = selected(results).done.iloc[:2]
    frame = results.analyses["spectrum"]
    outside = frame.iloc[:1].assign(depth=None, metric="rank_90")
    with_head = dataclasses.replace(results, analyses={"spectrum": pd.concat([frame, outside])})
    rows = metric_rows(with_head, "spectrum.rank_90", runs)
    assert set(rows["run_id"]) == set(runs.index) and set(rows["metric"]) == {"rank_90"}
    assert len(rows) == 2 * 8
    assert metric_rows(results, "dynamics.rank_90", runs).empty


@pytest.mark.parametrize(
    ("how", "expected", "null"), [("mean", 14 / 3, 2.0), ("sum", 14.0, 6.0), ("geometric", 64 ** (1 / 3), 2.0)]
)
def test_layers_of_a_run_are_averaged_or_summed(results, how, expected, null):
    run_id = results.runs.index[3]
    rows = pd.DataFrame({"run_id": run_id, "k": 1, "value": [2.0, 4.0, 8.0], "null": [2.0, 2.0, 2.0]})
    found = per_run(results, rows, ["k"], how)
    assert found.index.tolist() == [run_id]
    assert found["value"].item() == pytest.approx(expected) and found["value:null"].item() == pytest.approx(null)
    assert found["seed"].item() == results.runs.loc[run_id, "seed"]


def test_a_null_that_no_layer_has_stays_missing(results):
    rows = pd.DataFrame({"run_id": results.runs.index[0], "k": 1, "value": [1.0, 2.0], "null": [np.nan, np.nan]})
    for how in ("mean", "sum", "geometric"):
        assert per_run(results, rows, ["k"], how)["value:null"].isna().all()


def test_curves_are_over_layers_that_all_runs_have_at_every_point():
    def layer(run_id, name, most):
        return [{"run_id": run_id, "layer": name, "depth": 0, "k": k} for k in range(1, most + 1)]

    layers = [("a", "q", 4), ("a", "small", 2), ("a", "own", 4), ("b", "q", 4), ("b", "small", 2)]
    rows = pd.DataFrame([row for place in layers for row in layer(*place)])
    found = common_layers(rows, "k")
    assert set(found["layer"]) == {"q"} and len(found) == 8


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (9, [(1, "none"), (1, "nf4"), (4, "none"), (4, "nf4"), (16, "none"), (16, "nf4"), (64, "none"), (64, "nf4")]),
        (7, [(1, "none"), (1, "nf4"), (4, "none"), (4, "nf4"), (64, "none"), (64, "nf4")]),
        (5, [(1, "none"), (1, "nf4"), (64, "none"), (64, "nf4")]),
        (4, [(64, "none"), (64, "nf4")]),
    ],
)
def test_of_many_settings_all_methods_have_room_with_their_largest_ranks(results, most, expected):
    found = shown_settings(results, selected(results).done, most)
    assert found == [("lora", *setting) for setting in expected] + [("full", None, "none")]


def test_where_even_the_largest_ranks_are_too_many_the_best_are_shown(results):
    done = selected(results).done
    assert shown_settings(results, done, 1) == [("full", None, "none")]  # of the lowest validation loss


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
         ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        (["value", "query", "key"], ["query", "key", "value"]),
        (["up_proj[sBA]", "gate_proj", "q_proj[sBA]", "up_proj", "gate_proj[sBA]", "q_proj"],
         ["q_proj", "q_proj[sBA]", "up_proj", "up_proj[sBA]", "gate_proj", "gate_proj[sBA]"]),
        (["mlp.c_proj", "c_fc", "attn.c_proj", "c_attn"], ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
    ],
)  # fmt: skip
def test_kinds_stand_as_a_block_computes(kinds, expected):
    assert ordered_kinds(kinds) == expected


def test_of_the_metrics_beside_the_base_tables_know_those_with_one_number_a_layer():
    known = known_measures()
    assert {"alignment.amplification", "intruders.num_intruders", "survival.survival"} <= set(known)
    assert not {"alignment.amplification_at", "intruders.count", "survival.survival_at"} & set(known)
