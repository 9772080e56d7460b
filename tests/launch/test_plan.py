"""The plan: counts against closed forms and the real model, estimates against what finished runs have shown."""

import json
from pathlib import Path

import pytest
import torch

from lorabench.config.decode import InputError
from lorabench.launch import plan as plans
from lorabench.launch.plan import count, formula, make_plan, plan_text
from lorabench.models.base_model import load_base
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep, parse_sweep
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.training.meter import GIB
from tests.conftest import TOY

CPU = torch.device("cpu")
MODEL = Path(plans.models.BUILTIN) / "tiny-llama"


@pytest.fixture(autouse=True)
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 GFLOP/s, so that times are the same on every machine."""
    monkeypatch.setattr(plans, "flop_rate", lambda *_: (1e9, "set by the test"))


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
    def estimate(**base: object) -> plans.Estimate:
        run = spec(**base)
        return formula(run, count(run), torch.device("meta"))

    small, large = estimate(batch_size=4), estimate(batch_size=8)
    assert large.train_seconds == pytest.approx(2 * small.train_seconds)
    assert estimate(batch_size=8, micro_batch_size=4).peak_gib == pytest.approx(small.peak_gib)
    assert estimate(gradient_checkpointing=True).peak_gib < estimate().peak_gib
    full, lora = estimate(method={"name": "full"}, batch_size=1), estimate(batch_size=1)
    parameters = count(spec(method={"name": "full"})).num_parameters
    trainable = count(spec()).num_trainable
    assert (full.peak_gib - lora.peak_gib) * GIB == pytest.approx(12 * parameters - 16 * trainable, rel=1e-6)
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
    assert learned["estimate"]["seconds"] == pytest.approx(3 * first["estimate"]["seconds"] + 7)
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
    assert any("formula: training at 40% of 0.001 TFLOP/s (set by the test)" in line for line in lines)
