from __future__ import annotations

import pandas as pd
import pytest

from lorabench.report.labels import losses_of, measure
from lorabench.report.results import grouped, kept_rows, load_results, ordered, selected, shared, with_analyses
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests import synthetic
from tests.conftest import BASE, make_spec

GRID = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
seed = [0, 1]
[[grid]]
method.name = "lora"
method.rank = [2, 4]
lr = [1e-4, 1e-3, 1e-2]
"""
SELECT = '[select]\nover = "lr"\nby = "valid_loss"\n'


@pytest.fixture
def results():
    return synthetic.shared()


def load(folder, text, value, status=lambda spec: Status.DONE, measure="valid_loss"):
    """The results of a sweep whose runs have `value(spec)` as their only measure."""
    store, sweep = Store(folder), synthetic.read(text)
    for spec in sweep.runs:
        store.write_spec(spec)
        record = synthetic.record(spec)
        record.status, record.error, record.measures = status(spec), None, {measure: value(spec)}
        store.write(record)
    return load_results(store, sweep)


def chosen(results):
    return {row["method.rank"]: (row["lr"], row["edge"]) for row in selected(results).choices.to_dict("records")}


def test_runs_keep_the_sweeps_order_and_every_run(results):
    runs = results.runs
    assert list(runs.index) == [spec.id for spec in results.sweep.runs]
    assert set(runs["status"]) == {"done", "oom", "failed", "diverged"}
    assert runs.loc[runs["method.name"] == "full", "method.rank"].isna().all()
    assert {type(rank) for rank in runs["method.rank"].dropna()} == {int}
    assert runs.loc[runs["status"] == "oom", "valid_loss"].isna().all()


def test_swept_keys_are_those_with_two_values_among_the_runs_that_have_them(results):
    assert results.keys == ["method.name", "method.rank", "quantization", "lr", "seed"]  # not alpha, dropout, …
    assert results.settings == ["method.name", "method.rank", "quantization"]


@pytest.mark.parametrize("field", ["layers = '0'", "rank_pattern = {q_proj = 2}", "alpha_pattern = {'0.q_proj' = 2.0}"])
def test_what_one_of_two_like_settings_lacks_tells_them_apart(tmp_path, field):
    like = '[[grid]]\nmethod.name = "lora"\nmethod.rank = 4\nlr = [1e-3, 1e-2]\n'
    text = f"{BASE}seed = [0, 1]\n{like}{like}method.{field}\n" + SELECT
    results = load(
        tmp_path, text, lambda spec: spec.lr + 10 * ("pattern" in str(spec.flat) or bool(spec.method.layers))
    )
    _, key = results.settings
    assert key.split(".")[1] == field.partition(" ")[0]
    assert set(results.keys) == {key, "lr", "seed"}
    assert [len(runs) for _, runs in grouped(selected(results).done, results.settings)] == [2, 2]


def test_best_is_the_lowest_mean_over_seeds(tmp_path):
    results = load(tmp_path, GRID + SELECT, lambda s: abs(s.lr - {2: 1e-3, 4: 1e-2}[s.method.rank]) + s.seed)
    assert chosen(results) == {2: (1e-3, None), 4: (1e-2, "largest")}
    assert sorted(selected(results).runs["seed"]) == [0, 0, 1, 1]


def test_best_is_the_highest_where_more_is_better(tmp_path):
    text = GRID + SELECT.replace("valid_loss", "valid_token_accuracy")
    results = load(tmp_path, text, lambda spec: 1 - spec.lr, measure="valid_token_accuracy")
    assert chosen(results) == {2: (1e-4, "smallest"), 4: (1e-4, "smallest")}


def test_a_value_with_a_failed_seed_loses_to_a_complete_one(tmp_path):
    def status(spec):
        return Status.DIVERGED if spec.lr == 1e-2 and spec.seed == 1 else Status.DONE

    assert chosen(load(tmp_path, GRID + SELECT, lambda spec: -spec.lr, status)) == {2: (1e-3, None), 4: (1e-3, None)}


def test_of_equal_values_the_smaller_wins(tmp_path):
    assert chosen(load(tmp_path, GRID + SELECT, lambda spec: 1.0)) == {2: (1e-4, "smallest"), 4: (1e-4, "smallest")}


def test_a_setting_that_failed_at_every_value_is_still_there(tmp_path):
    def status(spec):
        return Status.OOM if spec.method.rank == 4 else Status.DONE

    selection = selected(load(tmp_path, GRID + SELECT, lambda spec: spec.lr, status))
    assert (selection.runs["method.rank"] == 4).sum() == 2
    assert list(selection.choices["complete"]) == [True, False]


def test_without_select_every_run_is_used(tmp_path):
    results = load(tmp_path, GRID, lambda spec: spec.lr)
    assert selected(results).run_ids == list(results.runs.index)
    assert results.settings == ["method.name", "method.rank", "lr"]


def test_keys_zipped_with_the_chosen_one_move_with_it(tmp_path):
    text = GRID + "warmup = [0.1, 0.2, 0.3]\nzip = ['lr', 'warmup']\n" + SELECT
    results = load(tmp_path, text, lambda spec: abs(spec.lr - 1e-3))
    choices = selected(results).choices
    assert results.over == ["lr", "warmup"]
    assert list(zip(choices["lr"], choices["warmup"], strict=True)) == [(1e-3, 0.2)] * 2


def test_missing_and_damaged_runs_are_shown_as_such(tmp_path):
    results = load(tmp_path, GRID, lambda spec: 1.0)
    first, second = results.runs.index[:2]
    (Store(tmp_path).folder(first) / "record.json").unlink()
    (Store(tmp_path).folder(second) / "record.json").write_text('{"run_id": "lo')
    runs = load_results(Store(tmp_path), results.sweep).runs
    assert runs.loc[first, "status"] == "missing"
    assert runs.loc[second, "status"] == "corrupt"
    assert "cut short" in runs.loc[second, "error"]


def test_layer_metrics_are_means_over_the_layers_that_all_runs_have(tmp_path):
    results = load(tmp_path, GRID, lambda spec: 1.0)
    a, b = results.runs.index[:2]
    rows = [(a, "q", 1.0, 5.0), (a, "v", 3.0, 7.0), (a, "mlp", 100.0, 100.0), (b, "q", 2.0, 5.0), (b, "v", 2.0, 6.0)]
    frame = pd.DataFrame(rows, columns=["run_id", "layer", "value", "null"]).assign(metric="rank_90")
    runs = with_analyses(results, {"spectrum": frame}).runs
    assert list(runs.loc[[a, b], "spectrum.rank_90"]) == [2.0, 2.0]
    assert list(runs.loc[[a, b], "spectrum.rank_90:null"]) == [6.0, 5.5]
    assert runs["spectrum.rank_90"].isna().sum() == len(runs) - 2


def test_analyze_is_given_the_selected_runs(tmp_path, results):
    synthetic.fill(Store(tmp_path), results.sweep)
    asked = []

    def analyze(store, sweep, run_ids):
        asked.extend(run_ids)
        return {}

    load_results(Store(tmp_path), results.sweep, analyze)
    assert asked == selected(results).run_ids


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ([64, 4, None, 16], [4, 16, 64, None]),
        (["nf4", "none", "nf4"], ["nf4", "none"]),
        ([0.5, "x", 0.1], [0.1, 0.5, "x"]),
    ],
)
def test_order_of_values(values, order):
    assert ordered(values) == order


def test_means_are_over_the_layers_in_the_blocks_that_all_runs_have():
    """A run of a soft prompt trains a head alone: it must not make that the only layer that is compared."""
    rows = [
        ("a", "h.0.q", 0),
        ("a", "h.0.k", 0),
        ("a", "classifier", None),
        ("b", "h.0.q", 0),
        ("b", "classifier", None),
    ]
    frame = pd.DataFrame([*rows, ("c", "classifier", None)], columns=["run_id", "layer", "depth"])
    assert shared(frame)[["run_id", "layer"]].to_numpy().tolist() == [["a", "h.0.q"], ["b", "h.0.q"]]
    heads = frame[frame["layer"] == "classifier"]
    assert len(shared(heads)) == 3


def test_a_mean_over_layers_leaves_doras_part_out(tmp_path):
    """Runs of DoRA alone have `MODULE[sBA]` in every run: it is a part of ΔW, not another ΔW to average with."""
    results = load(tmp_path, GRID, lambda spec: 1.0)
    a, b = results.runs.index[:2]
    rows = [(run, f"layers.{n}.q{part}", value) for run in (a, b) for n in (0, 1)
            for part, value in (("", 35.0 + n), ("[sBA]", 7.0))]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["run_id", "layer", "value"]).assign(metric="rank_90", depth=0)
    assert with_analyses(results, {"spectrum": frame}).runs.loc[a, "spectrum.rank_90"] == 35.5
    beside = pd.concat([frame, frame[~frame["layer"].str.contains("sBA")].assign(run_id=results.runs.index[2])])
    assert with_analyses(results, {"spectrum": beside}).runs.loc[a, "spectrum.rank_90"] == 35.5
    parts = frame[frame["layer"].str.contains("sBA")]
    assert len(shared(parts)) == len(parts), "where they are asked for by their own names"


def test_rows_are_chosen_also_of_an_empty_frame():
    frame = pd.DataFrame({"rank": [1, 2], "lr": [0.1, 0.2]})
    assert list(kept_rows(frame, (rank == 2 for rank in frame["rank"]))["lr"]) == [0.2]
    assert list(kept_rows(frame.iloc[:0], []).columns) == ["rank", "lr"]


def test_a_loss_that_is_a_mean_square_is_not_in_nats():
    regression = [make_spec(task={"name": "regression", "data": "builtin:questions", "text": "question"})]
    text = [make_spec()]
    for runs, unit in ((regression, ""), (text, "nats"), (regression + text, "nats")):
        with losses_of(runs):
            assert {measure(name).unit for name in ("valid_loss", "forgetting", "retain_loss_after")} == {unit}
            assert (measure("kl_task").unit, measure("valid_accuracy").unit) == ("nats", "%")
    assert measure("valid_loss").unit == "nats"
