"""The plan: counts against closed forms and the real model, estimates against what finished runs have shown."""

import json
from pathlib import Path

import pytest
import torch

from lorabench.config.decode import InputError
from lorabench.launch import estimate as estimates
from lorabench.launch import plan as plans
from lorabench.launch.estimate import formula
from lorabench.launch.plan import count, make_plan, plan_text
from lorabench.models.base_model import load_base
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep, parse_sweep
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.training import flops
from lorabench.training.live import LiveTensors
from tests.conftest import TOY

CPU = torch.device("cpu")
MODEL = Path(plans.models.BUILTIN) / "tiny-llama"


@pytest.fixture(autouse=True)
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 GFLOP/s, so that times are the same on every machine."""
    monkeypatch.setattr(estimates, "flop_rate", lambda *_: (1e9, "set by the test"))


def sweep(**base: object) -> Sweep:
    table = TOY | {"method": {"name": "lora"}, "seq_len": 64} | base
    return parse_sweep({"base": table})


def spec(**base: object) -> RunSpec:
    return sweep(**base).runs[0]


def test_lora_trains_rank_times_the_sum_of_both_sides_of_every_layer() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    h, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * (h + h) + 2 * (h + kv) + 3 * (h + inner)  # q and o, k and v, gate and up and down
    counts = count(spec(method={"name": "lora", "rank": 5}))
    assert counts.num_trainable == 5 * layer * config["num_hidden_layers"]
    query_value = count(spec(method={"name": "lora", "rank": 3, "targets": "query-value"}))
    assert query_value.num_trainable == 3 * (h + h + h + kv) * config["num_hidden_layers"]


def test_full_counts_the_real_models_parameters() -> None:
    run = spec(method={"name": "full"})
    real = sum(p.numel() for p in load_base(run, CPU, {}).parameters())
    counts = count(run)
    assert counts.num_trainable == counts.num_parameters == real
    assert counts.weight_bytes == 4 * real


@pytest.mark.parametrize(("quantization", "at_most"), [("int8", 1 / 4), ("nf4", 0.52 / 4)])
def test_quantization_shrinks_the_linear_layers_and_nothing_else(quantization: str, at_most: float) -> None:
    plain, quantized = count(spec()), count(spec(quantization=quantization))
    assert quantized.num_parameters == plain.num_parameters
    config = json.loads((MODEL / "config.json").read_text())
    embeddings = 4 * config["vocab_size"] * config["hidden_size"]
    linear = plain.weight_bytes - embeddings - 4 * plain.num_trainable
    saved = plain.weight_bytes - quantized.weight_bytes
    assert saved == pytest.approx((1 - at_most) * linear, rel=0.01)


def test_memory_and_time_grow_as_theory_says() -> None:
    def estimate(**base: object) -> estimates.Estimate:
        run = spec(**base)
        return formula(run, count(run), torch.device("meta"))

    small, large = estimate(batch_size=4), estimate(batch_size=8)
    assert large.train_seconds == pytest.approx(2 * small.train_seconds, rel=0.02)  # what asking takes stays
    assert estimate(batch_size=8, micro_batch_size=4).peak_gib == pytest.approx(small.peak_gib)
    assert estimate(gradient_checkpointing=True).peak_gib < estimate().peak_gib
    longer = [estimate(seq_len=length).tensors_gib for length in (32, 64, 96)]
    assert longer[2] - longer[1] == pytest.approx(longer[1] - longer[0], rel=0.1)
    assert estimate(steps=20).train_seconds == pytest.approx(estimate(steps=200).train_seconds / 10)


def finish(store: Store, run: RunSpec, **measures: float) -> None:
    store.write_spec(run)
    hardware = {"hardware": {"device": "cpu"}}
    record = RunRecord(
        run_id=run.id, spec=run.to_json(), status=Status.DONE, measures=measures, environment=hardware
    )  # fmt: skip
    store.write(record)


def test_estimates_learn_from_finished_runs_and_say_so(tmp_path: Path) -> None:
    store, small, other = Store(tmp_path), sweep(seed=[0, 1, 2, 3], steps=10), sweep(seed=0, steps=20)
    (first,) = make_plan(other, store, "cpu")["runs"]
    assert first["estimate"]["basis"] == "formula" and not first["done"]
    run = small.runs[0]
    expected = formula(run, count(run), CPU)
    for seed, factor in enumerate([1.0, 3.0, 50.0]):  # the median is 3
        seconds = factor * expected.train_seconds
        finish(store, small.runs[seed], peak_gib=2 * expected.peak_gib, train_seconds=seconds,
               total_seconds=seconds + 7, num_trainable=11, num_parameters=22)  # fmt: skip
    (learned,) = make_plan(other, store, "cpu")["runs"]
    assert learned["estimate"]["basis"] == "similar runs" and learned["estimate"]["num_similar"] == 3
    parts = formula(other.runs[0], count(other.runs[0]), CPU, first=False).seconds_of
    assert first["estimate"]["seconds_of"]["evaluate"] > parts["evaluate"]  # the base is known since
    unmeasured = parts["load"] + parts["evaluate"] + parts["serve"]
    assert learned["estimate"]["seconds"] == pytest.approx(3 * parts["train"] + 7 + unmeasured)
    assert learned["estimate"]["peak_gib"] == pytest.approx(2 * first["estimate"]["peak_gib"])
    result = make_plan(small, store, "cpu")
    assert [r["done"] for r in result["runs"]] == [True, True, True, False]
    assert result["runs"][0]["estimate"]["basis"] == "measured"
    assert result["runs"][0]["estimate"]["seconds"] == pytest.approx(expected.train_seconds + 7)
    assert (result["totals"]["num_done"], result["totals"]["num_to_run"]) == (3, 1)
    assert result["totals"]["seconds"] == result["runs"][3]["estimate"]["seconds"]


def test_runs_on_another_kind_of_device_or_model_teach_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    finish(store, spec(), peak_gib=9.0, train_seconds=9.0, total_seconds=9.0)
    record = store.read(spec().id)
    record.environment = {"hardware": {"device": "cuda"}}
    store.write(record)
    (run,) = make_plan(sweep(steps=3), store, "cpu")["runs"]
    assert run["estimate"]["basis"] == "formula"


def test_what_shows_only_at_the_model_is_reported_all_at_once() -> None:
    wrong = parse_sweep({"base": TOY | {
        "method": {"name": "lora", "targets": ["zap", "mlp", "zip("]},
        "seq_len": [16, 100_000],
    }})  # fmt: skip
    with pytest.raises(InputError) as error:
        make_plan(wrong, Store(Path("nowhere")), "cpu")
    starts = [line.split(": ")[0] for line in error.value.problems]
    assert sorted(starts) == sorted(['method.targets = "zap"', "seq_len = 100000", 'method.targets = "zip("'])


def test_a_missing_model_is_one_message() -> None:
    with pytest.raises(InputError, match=r'model = "\./nowhere": no such folder') as error:
        make_plan(sweep(model="./nowhere", seed=[0, 1, 2]), Store(Path("nowhere")), "cpu")
    assert len(error.value.problems) == 1


def test_the_table_has_one_line_a_run_with_the_swept_keys(tmp_path: Path) -> None:
    runs = sweep(seed=[0, 1], lr=[0.1, 0.2])
    lines = plan_text(runs, make_plan(runs, Store(tmp_path), "cpu")).splitlines()
    assert lines[0].split()[:5] == ["run_id", "status", "method.name", "lr", "seed"]
    assert [line.split()[0] for line in lines[1:5]] == [run.id for run in runs.runs]
    assert any("0 done, 4 to run" in line for line in lines[5:])
    assert any("formula: training at 60% of 0.001 TFLOP/s (set by the test)" in line for line in lines)


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 8}, {"name": "full"}], ids=lambda method: method["name"])
def test_what_a_pass_keeps_is_what_a_real_one_holds(method: dict) -> None:
    run = spec(method=method)
    found = count(run).profile((4, 96))
    model = run.method.attach(load_base(run, CPU, {}), run)
    ids = torch.randint(0, 1000, (4, 96))
    with LiveTensors([*model.parameters(), *model.buffers()]) as live:
        before = live.peak
        logits = model(input_ids=ids).logits.sum()
        held = live.peak - before
        logits.backward()
    assert found.kept == pytest.approx(held, rel=0.2)
    assert found.both.flops == flops.of_pass(flops.without_numbers(model), (4, 96)) > 2 * found.forward.flops


def test_time_is_that_of_the_data_and_not_of_the_longest_there_could_be(labelled: str) -> None:
    task = {"name": "classification", "data": labelled}
    short, long = (spec(task=task, seq_len=length, serving=False) for length in (32, 128))
    found = [formula(run, count(run), CPU) for run in (short, long)]
    assert found[0].seconds_of == found[1].seconds_of and found[0].peak_gib == found[1].peak_gib
    assert found[0].seconds_of["generate"] == found[0].seconds_of["serve"] == 0.0
    text = formula(*(lambda run: (run, count(run)))(spec(seq_len=128)), CPU)
    assert text.train_seconds > 5 * found[1].train_seconds and text.seconds_of["serve"] > 1


def test_answers_take_as_long_as_they_may_be() -> None:
    def writing(tokens: int, first: bool = True) -> float:
        generate = {"max_new_tokens": tokens, "answer": "=(.*)"}
        run = spec(task={"name": "completion", "data": "builtin:arithmetic", "max_eval": 20, "generate": generate})
        return formula(run, count(run), CPU, first=first).seconds_of["generate"]

    assert writing(30) - writing(20) == pytest.approx(writing(20) - writing(10)) and writing(10) > 0
    assert writing(10) == pytest.approx(2 * writing(10, first=False))  # the untouched base writes once


def test_what_small_runs_take_beside_their_tensors_is_no_factor_for_large_ones(tmp_path: Path) -> None:
    store, small, large = Store(tmp_path), sweep(seed=[0, 1], batch_size=1), sweep(batch_size=64)
    for run in small.runs:
        tensors = formula(run, count(run), CPU).tensors_gib
        finish(store, run, peak_gib=tensors + 0.1, train_seconds=1.0, total_seconds=2.0)
    (planned,) = make_plan(large, store, "cpu")["runs"]
    run = large.runs[0]
    assert planned["estimate"]["peak_gib"] == pytest.approx(formula(run, count(run), CPU).tensors_gib + 0.1)


def test_of_finished_runs_those_count_that_are_nearest_in_size(tmp_path: Path) -> None:
    store, runs = Store(tmp_path), sweep(seed=[*range(8)], steps=[10, 1000]).runs
    for run in runs:
        expected = formula(run, count(run), CPU)
        seconds = expected.train_seconds * (5 if run.steps == 10 else 2)
        finish(store, run, peak_gib=expected.peak_gib, train_seconds=seconds, total_seconds=seconds)
    for steps, ratio in ((12, 5), (800, 2)):
        (planned,) = make_plan(sweep(steps=steps), store, "cpu")["runs"]
        expected = formula(spec(steps=steps), count(spec()), CPU).train_seconds
        assert planned["estimate"]["seconds_of"]["train"] == pytest.approx(ratio * expected)
