"""FLOPs of a step, of every method, beside torch's own counter on the step itself."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorabench.config import plugins
from lorabench.config.decode import encode
from lorabench.launch import estimate, plan
from lorabench.models import base_model as models
from lorabench.models import weights
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training import bookkeeping, flops
from lorabench.training.examples import collate, prepare
from lorabench.training.execute import Options, execute
from lorabench.training.passes import forward
from tests import families
from tests.conftest import make_spec
from tests.methods.test_methods import CPU, IMPOSSIBLE, VARIANTS, attach, load_base, method_spec

METHODS = plugins.names("methods")
CASES = {
    **{f"{name} {base}": (name, base, {}) for name in METHODS for base in ("llama", "bert")
       if (name, base) not in IMPOSSIBLE},
    **{variant: (name, "llama", fields) for variant, (name, fields) in VARIANTS.items()},
    "bitfit gpt2": ("bitfit", "gpt2", {}),
    "houlsby": ("adapter", "gpt2", {"placement": "houlsby"}),
    "parallel": ("adapter", "bert", {"placement": "parallel"}),
    "the upper block": ("lora", "llama", {"layers": "1"}),
    "the upper block's adapter": ("adapter", "llama", {"layers": "1"}),
    "lora on gpt2": ("lora", "gpt2", {}),
    **{f"PEFT's {kind}": ("peft", "llama", {"type": kind, "config": config}) for kind, config in {
        "FOURIERFT": {"n_frequency": 20}, "MISS": {"r": 4}, "RANDLORA": {"r": 4},
        "ROAD": {"group_size": 4}, "C3A": {"block_size": 16},
        "BOFT": {"boft_block_size": 4},
    }.items()},
}  # fmt: skip


def counted(spec, model, batches):
    """What torch counts of the step's passes and penalty: by kernels that it knows."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.backends.mkldnn.flags(enabled=False):
        for batch in batches:
            spec.task.loss(forward(model, batch), batch).backward()
        penalty = spec.method.penalty(model)
        if penalty is not None:
            penalty.backward()
    return counter.get_total_flops()


def step_of(name, base, fields, tiny_bases, labelled, **changes):
    """A spec, its model as it trains, and two micro batches of other lengths."""
    spec = method_spec(name, base, tiny_bases, labelled, fields, **changes)
    examples = prepare(spec)
    rows = [row | {"input_ids": row["input_ids"][: 9 + i]} for i, row in enumerate(examples.splits["train"][:5])]
    if "bert" not in base:
        rows = [row | {"labels": row["input_ids"]} for row in rows]
    model = attach(spec, examples).train()
    return spec, model, [collate(part, examples.padding, CPU) for part in (rows[:3], rows[3:])]


def shapes_of(batches):
    return {tuple(batch["input_ids"].shape): 1 for batch in batches}


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_that_torch_counts(case, tiny_bases, labelled):
    spec, model, batches = step_of(*CASES[case], tiny_bases, labelled)
    state = torch.get_rng_state()
    found = flops.of_step(flops.without_numbers(model), shapes_of(batches), spec.method)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == pytest.approx(counted(spec, model, batches), rel=0.03)


def pairs_of(name, base, encoder_decoders):
    """Of an encoder-decoder: a spec, its model as it trains, and two batches of other lengths on either side."""
    task = {"name": "seq2seq", "data": "builtin:arithmetic", "source": "{prompt}", "target": "{response}"}
    method = encode(plugins.example("methods", name))
    spec = make_spec(model=encoder_decoders[base], method=method, task=task | {"max_train": 5, "max_eval": 1})
    examples = prepare(spec)
    rows = [{"input_ids": row["input_ids"][: 2 + i], "labels": row["labels"][: 9 - i]}
            for i, row in enumerate(examples.splits["train"])]  # fmt: skip
    model = attach(spec, examples).train()
    return spec, model, [collate(part, examples.padding, CPU) for part in (rows[:3], rows[3:])]


@pytest.mark.parametrize(("name", "base"), [*product(["lora", "full", "prefix", "prompt"], ["t5", "bart"])])
def test_both_sides_of_an_encoder_decoder_count(name, base, encoder_decoders):
    spec, model, batches = pairs_of(name, base, encoder_decoders)
    shapes = {(*batch["input_ids"].shape, batch["labels"].shape[1]): 1 for batch in batches}
    assert [*shapes] == [(3, 4, 9), (2, 6, 6)]
    found = flops.of_step(flops.without_numbers(model), shapes, spec.method)
    assert found == pytest.approx(counted(spec, model, batches), rel=0.03)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss"])
def test_lora_on_stacked_experts_counts_as_torch_counts_it(family):
    """Of the experts that a token is given to; ΔW of each expert is made once a pass."""
    spec = make_spec(method={"name": "lora", "rank": 4, "targets": "all-linear"})
    torch.manual_seed(0)
    model = spec.method.attach(families.make(family, "cpu"), spec).train()
    batch = {"input_ids": torch.arange(24).reshape(2, 12), "labels": torch.arange(24).reshape(2, 12)}
    found = flops.of_step(flops.without_numbers(model), {(2, 12): 1}, spec.method)
    model.set_experts_implementation("batched_mm")
    assert found == pytest.approx(counted(spec, model, [batch]), rel=0.03)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["lora", "ia3", "adapter", "prompt"])
def test_a_quantized_layer_counts_as_the_one_that_it_stands_for(name, quantization, tiny_bases, labelled):
    spec, model, batches = step_of(name, "llama", {}, tiny_bases, labelled)
    wanted = flops.of_step(flops.without_numbers(model), shapes_of(batches), spec.method)
    spec, model, batches = step_of(name, "llama", {}, tiny_bases, labelled, quantization=quantization)
    assert flops.of_step(flops.without_numbers(model), shapes_of(batches), spec.method) == wanted


@pytest.mark.parametrize("name", ["lora", "vera", "prefix", "head"])
def test_many_lengths_are_told_by_a_polynomial(name, tiny_bases, labelled):
    spec, model, _ = step_of(name, "llama", {}, tiny_bases, labelled)
    copied = flops.without_numbers(model)
    shapes = {(n, t): 1 + t % 3 for n, t in [(4, 5), (4, 9), (4, 16), (3, 16), (4, 31), (1, 7)]}
    exact = sum(times * flops.of_pass(copied, shape) for shape, times in shapes.items())
    assert flops.of_step(copied, shapes, spec.method) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_many_lengths_of_either_side_are_told_by_one_too(name, encoder_decoders):
    spec, model, _ = pairs_of(name, "t5", encoder_decoders)
    copied = flops.without_numbers(model)
    shapes = {(4, 5, 9): 1, (4, 9, 3): 2, (4, 16, 7): 1, (3, 16, 12): 3, (4, 31, 20): 1, (1, 7, 20): 2, (2, 6, 6): 1}
    exact = sum(times * flops.of_pass(copied, shape) for shape, times in shapes.items())
    assert flops.of_step(copied, shapes, spec.method) == pytest.approx(exact, rel=1e-9)


def test_the_model_stays_as_it_is(tiny_bases, labelled):
    _, model, batches = step_of("lora", "llama", {}, tiny_bases, labelled)
    before = copy.deepcopy(model.state_dict()), model.config._attn_implementation, forward(model, batches[0])
    flops.of_pass(flops.without_numbers(model), (1, 4))
    assert all(torch.equal(tensor, before[0][key]) for key, tensor in model.state_dict().items())
    assert model.config._attn_implementation == before[1]
    assert torch.equal(forward(model, batches[0]), before[2])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def quick(tiny_bases):
    return lambda **changes: make_spec(model=tiny_bases["llama"], steps=2, **changes)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"gradient_checkpointing": True, "quantization": "nf4"}])
def test_the_plan_says_what_the_record_does(changes, quick, tmp_path):
    """Of blocks of text, which are all as long as seq_len allows."""
    spec, store = quick(**changes), Store(tmp_path)
    assert execute(spec, store, Options(log_to_file=False, device="cpu")) == Status.DONE
    record, planned = store.read(spec.id), plan.count(spec)
    assert record.measures["flops_per_step"] == pytest.approx(estimate.flops_per_step(spec, planned), rel=1e-12)
    assert record.measures["num_parameters"] == planned.num_parameters
    assert record.provenance["flops_per_step"] == flops.ABOUT


@pytest.mark.parametrize("peak", [1e18, 1.0])
def test_a_share_above_one_is_not_printed(peak, quick, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(bookkeeping, "peak_flops", lambda *_, **beyond: asked.append(beyond) or (peak, "of the test"))
    spec, store = quick(), Store(tmp_path)
    assert execute(spec, store, Options(log_to_file=False, device="cpu")) == Status.DONE
    record = store.read(spec.id)
    told = record.provenance["model_flops_utilization"]
    if peak > 1:
        rate = record.measures["flops_per_step"] / record.measures["step_seconds_median"]
        assert record.measures["model_flops_utilization"] == pytest.approx(rate / peak, rel=0.9)
        assert told.startswith("of 1e+06 TFLOP/s, of the test") and len(asked) == 1
    else:
        assert "model_flops_utilization" not in record.measures
        assert told.startswith("not measured: ") and told.endswith("of 1e-12 TFLOP/s, of the test")
        assert asked[1]["beyond"] > 1


def test_what_cannot_be_counted_fails_no_run(quick, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("needs numbers\nand more")

    monkeypatch.setattr(flops, "of_pass", fail)
    spec, store = quick(), Store(tmp_path)
    assert execute(spec, store, Options(log_to_file=False, device="cpu")) == Status.DONE
    record = store.read(spec.id)
    assert "flops_per_step" not in record.measures and "model_flops_utilization" not in record.measures
    assert record.provenance["flops_per_step"].endswith("without numbers: RuntimeError: needs numbers")


@pytest.mark.parametrize("base", ["bert", "roberta"])
@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_the_base_s_and_the_method_s_own(name, base, tiny_bases, labelled):
    """Those of the untouched base, and what is trained beside it: a head that is trained counts once."""
    if (name, base) in IMPOSSIBLE:
        return
    spec = method_spec(name, base, tiny_bases, labelled)
    examples = prepare(spec)
    untouched = load_base(spec, examples)
    original = {key for key, _ in untouched.named_parameters()}
    model = attach(spec, examples)
    heads = tuple(models.new_heads(untouched))
    own = sum(
        parameter.numel()
        for key, parameter in model.named_parameters()
        if key.removeprefix("base_model.").removeprefix("model.").replace(".base_layer", "") not in original
        and not any(f"{head}." in key for head in heads)
    )
    assert weights.count(model) == sum(p.numel() for p in untouched.parameters()) + own
