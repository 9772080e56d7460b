"""What is timed is the model that was meant: the base without its adapter, the tuned one, the merged one."""

from __future__ import annotations

import copy

import pytest
import torch

from lorabench.config import plugins
from lorabench.models.base_model import max_length
from lorabench.spec.measures import MEASURES
from lorabench.training import inference
from lorabench.training.examples import collate
from lorabench.training.inference import (
    Workload,
    as_served,
    checked_batch,
    compare,
    logits,
    race,
    relative_error,
    twin,
    workload,
)
from lorabench.training.passes import autocast, forward
from tests.methods.test_methods import CPU, IMPOSSIBLE, attach, load_base, method_spec, prepare, take_steps

METHODS = plugins.names("methods")


def trained(name, base, tiny_bases, labelled, **changes):
    """A spec, its model after a few steps, and its data."""
    spec = method_spec(name, base, tiny_bases, labelled, **changes)
    examples = prepare(spec)
    model = attach(spec, examples)
    with autocast(spec, CPU):
        take_steps(spec, model, examples, 3)
    return spec, as_served(model, spec.dtype), examples


@pytest.mark.parametrize("base", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("name", METHODS)
def test_the_unloaded_model_is_the_base(name, base, tiny_bases, labelled):
    """Without training, so that it holds for methods that train the base's own weights too."""
    if (name, base) in IMPOSSIBLE:
        pytest.skip(IMPOSSIBLE[name, base])
    spec = method_spec(name, base, tiny_bases, labelled)
    examples = prepare(spec)
    unloaded = spec.method.unload(twin(attach(spec, examples)))
    if unloaded is None:
        assert not spec.method.holds_several
        return
    fresh, batch = load_base(spec, examples), checked_batch(examples, CPU)
    assert type(unloaded) is type(fresh)
    assert sum(p.numel() for p in unloaded.parameters()) - sum(p.numel() for p in fresh.parameters()) in (0, 1024 * 64)
    torch.testing.assert_close(logits(unloaded.eval(), batch), logits(fresh, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", ["lora", "ia3", "prompt", "adapter", "head", "full"])
def test_a_twin_shares_what_is_frozen_and_leaves_the_model_as_it_is(name, quantization, tiny_bases, labelled):
    if name == "full" and quantization != "none":
        pytest.skip("a quantized base cannot be trained")
    spec, model, examples = trained(name, "llama", tiny_bases, labelled, quantization=quantization)
    batch = checked_batch(examples, CPU)
    before = logits(model, batch)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    other = twin(model)
    torch.testing.assert_close(logits(other, batch), before, atol=0, rtol=0)
    assert {id(p) for p in other.parameters() if not p.requires_grad} == frozen
    base = spec.method.unload(other)
    with torch.no_grad():
        for parameter in (p for p in (base or other).parameters() if p.requires_grad):
            parameter.zero_()
        logits(base or other, batch)
    torch.testing.assert_close(logits(model, batch), before, atol=0, rtol=0)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "adapter", "prompt", "prefix", "ptuning", "ia3"])
def test_generate_computes_with_the_tuned_model(name, base, tiny_bases, labelled):
    """Greedy decoding with the cache gives the tokens that whole forward passes give."""
    spec, model, examples = trained(name, base, tiny_bases, labelled)
    ids = workload(spec, examples, load_base(spec, examples), CPU).ids[:2, :12]
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=2,
        max_new_tokens=6, min_new_tokens=6,
    )  # fmt: skip
    for _ in range(6):
        with torch.no_grad():
            scores = forward(model, {"input_ids": ids})[:, -1]
        scores[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


def test_a_race_runs_in_turn_and_leaves_the_first_round_out(monkeypatch):
    monkeypatch.setattr(inference, "SECONDS", 0.0)
    monkeypatch.setattr(inference, "MIN_ROUNDS", 3)
    seen = []

    def call(name):
        seen.append(name)
        return name, len(seen)

    rows = race([lambda: call("a"), lambda: call("b")])
    assert "".join(seen) == "abba" * 2
    assert rows == [(("a", 4), ("b", 3)), (("a", 5), ("b", 6)), (("a", 8), ("b", 7))]


def test_a_race_of_quick_calls_goes_on_for_its_time(monkeypatch):
    monkeypatch.setattr(inference, "MAX_ROUNDS", 7)
    monkeypatch.setattr(inference, "SECONDS", 60.0)
    assert len(race([lambda: 0])) == 7


SLOWER = {"base": 2.0, "unmerged": 3.0, "merged": 2.5}


def test_one_race_gives_all_seconds_and_what_each_model_adds(monkeypatch):
    """The machine slows down by a tenth each round, so that only ratios within a round are those of the models."""
    seen = []

    def times(self, model, ids):
        seen.append(model)
        slow = 1.1 ** seen.count(model) * len(ids)
        return SLOWER[model] * slow, SLOWER[model] * slow / 10

    monkeypatch.setattr(inference, "SECONDS", 0.0)
    monkeypatch.setattr(inference, "MIN_ROUNDS", 3)
    monkeypatch.setattr(Workload, "times", times)
    work = Workload(ids=torch.zeros(8, 5, dtype=torch.long), generates=True, options={})
    found = compare("base", {"unmerged": "unmerged", "merged": "merged"}, work)
    assert seen[:6] == ["base", "unmerged", "merged", "merged", "unmerged", "base"]
    of_text = {name for name in MEASURES if "images" not in name}
    assert set(found) == {name for name in of_text if name.startswith(("prefill", "decode", "added"))}
    for part, share, tokens in (("prefill", 1.0, 5), ("decode", 0.1, 1)):
        for model, seconds in SLOWER.items():
            key = f"{part}_{model}_batch"
            assert found[f"{key}_1_seconds"] == pytest.approx(share * seconds * 1.1**3)
            assert found[f"{key}_1_tokens_per_second"] == pytest.approx(tokens / (share * seconds * 1.1**3))
            assert found[f"{key}_8_tokens_per_second"] == pytest.approx(tokens / (share * seconds * 1.1**7))
            if model != "base":
                assert found[f"added_{key}_1"] == pytest.approx(seconds / 2 - 1)


@pytest.mark.parametrize(
    ("name", "base"), [("lora", "llama"), ("prefix", "gpt2"), ("prompt", "llama"), ("lora", "bert")]
)
def test_prompts_fit_the_model_and_have_no_padding(name, base, tiny_bases, labelled):
    changes = {} if base == "bert" else {"seq_len": 124}  # with 4 virtual tokens the longest that the models take
    spec, model, examples = trained(name, base, tiny_bases, labelled, **changes)
    plain = load_base(spec, examples)
    work = workload(spec, examples, plain, CPU)
    longest = max(len(row["input_ids"]) for row in examples.splits["validation"])
    new = inference.NEW_TOKENS if base != "bert" else 0
    assert work.ids.shape == (8, min(longest, max_length(plain) - spec.method.num_virtual_tokens - new))
    assert set(work.ids.flatten().tolist()) <= {
        int(i) for row in examples.splits["validation"] for i in row["input_ids"]
    }
    assert len(work.times(model, work.ids)) == (1 if base == "bert" else 2) == len(work.parts)
    assert all(value > 0 for value in work.times(model, work.ids))


def test_relative_error_is_in_standard_deviations():
    wanted = torch.tensor([0.0, 2.0, 4.0])
    assert relative_error(wanted + torch.tensor([0.0, -0.5, 0.1]), wanted) == pytest.approx(0.25)


def test_logits_of_padding_are_not_compared(tiny_bases, labelled):
    _, model, examples = trained("lora", "llama", tiny_bases, labelled)
    rows = [{"input_ids": examples.splits["train"][0]["input_ids"][:n], "labels": [1] * n} for n in (5, 9)]
    found = logits(model, collate(rows, examples.padding, CPU))
    assert found.shape == (14, 1024)
    torch.testing.assert_close(
        found[:5], logits(model, collate(rows[:1], examples.padding, CPU))[0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["lora", "ia3", "oft"])
def test_merged_is_within_the_stated_tolerance(name, dtype, tiny_bases, labelled):
    spec, model, examples = trained(name, "llama", tiny_bases, labelled, dtype=dtype)
    batch = checked_batch(examples, CPU)
    wanted = logits(model, batch)
    error = relative_error(logits(spec.method.merge(copy.deepcopy(model)), batch), wanted)
    untouched = as_served(load_base(spec, examples), spec.dtype)
    assert error <= inference.TOLERANCE[dtype] < 4 * relative_error(logits(untouched, batch), wanted)
    assert (error == 0) is False


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_merging_into_a_quantized_base_rounds_again(quantization, tiny_bases, labelled):
    """The merged layers are the quantization of W0 + ΔW, and compute with it: not with bytes repacked for a kernel."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit

    from lorabench.models.weights import dequantized

    spec, model, examples = trained("lora", "llama", tiny_bases, labelled, quantization=quantization)
    batch = checked_batch(examples, CPU)
    wanted = logits(model, batch)
    updates = {u.layer: u.dense() for u in spec.method.updates(model, lambda: load_base(spec, examples))}
    plain = load_base(spec, examples)
    merged = spec.method.merge(model)
    assert 0 < relative_error(logits(merged, batch), wanted) < 1
    for name, delta in updates.items():
        module, sum_ = merged.get_submodule(name), dequantized(plain.get_submodule(name)).float() + delta
        if quantization == "nf4":
            rounded = dequantize_4bit(*quantize_4bit(sum_, quant_type="nf4", compress_statistics=True))
        else:
            values, scales, _ = int8_vectorwise_quant(sum_.half())
            rounded = values.float() * scales[:, None] / 127
        torch.testing.assert_close(dequantized(module).float(), rounded, atol=1e-6, rtol=1e-3)
        x = torch.randn(4, module.in_features)
        torch.testing.assert_close(module(x), x @ rounded.T, atol=2e-2, rtol=2e-2)
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in merged.modules())
