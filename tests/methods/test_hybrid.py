"""Several methods in one model: each does what it does alone, and only they train."""

from __future__ import annotations

import pytest
import torch

from lorabench.config.decode import InputError, encode
from lorabench.models import weights
from lorabench.spec.run_spec import RunSpec
from lorabench.training.examples import collate, prepare
from lorabench.training.passes import forward
from lorabench.updates.formats import read_updates
from tests.conftest import make_spec
from tests.methods.test_methods import CPU, add, attach, load_base, method_spec, take_steps, tuned

LORA = {"name": "lora", "rank": 2, "targets": "attention"}
ADAPTER = {"name": "adapter", "reduction": 8, "placement": "parallel"}
COMBINATIONS = {
    "lora+adapter": {"lora": LORA, "adapter": ADAPTER},
    "mam": {"prefix": {"num_tokens": 4}, "adapter": ADAPTER},
    "lora+prompt": {"lora": LORA, "prompt": {"num_tokens": 4}},
    "unipelt": {"lora": LORA, "prefix": {"num_tokens": 4}, "adapter": ADAPTER | {"placement": "pfeiffer"}},
}


def hybrid_spec(parts, base, tiny_bases, labelled, **changes):
    spec = method_spec("lora", base, tiny_bases, labelled, **changes).to_json()
    return RunSpec.from_json(spec | {"method": {"name": "hybrid"} | parts})


@pytest.mark.parametrize("parts", COMBINATIONS)
@pytest.mark.parametrize("base", ["llama", "gpt2", "bert"])
def test_only_the_parts_train_and_all_comes_back_from_disk(parts, base, tiny_bases, labelled, tmp_path):
    spec = hybrid_spec(COMBINATIONS[parts], base, tiny_bases, labelled)
    model, batch, losses, examples = tuned(spec)
    assert losses[-1] < losses[0]
    before = attach(spec, examples)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    after = dict(model.named_parameters())
    changed = {name for name, p in before.named_parameters() if not torch.equal(p, after[name])}
    assert changed == {name for name in trained if not name.endswith("pooler.dense.weight")} & changed
    for mark in (".lora_", ".bottleneck.", "prompt_encoder"):
        has = {".lora_": "lora", ".bottleneck.": "adapter", "prompt_encoder": "prefix"}[mark]
        wanted = has in COMBINATIONS[parts] or (has == "prefix" and "prompt" in COMBINATIONS[parts])
        assert any(mark in name for name in changed) == wanted
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        torch.testing.assert_close(forward(loaded, batch), forward(model, batch), atol=1e-6, rtol=1e-5)


def test_counts_are_the_sum_of_the_parts(tiny_bases, labelled):
    def count(table):
        spec = RunSpec.from_json(method_spec("lora", "llama", tiny_bases, labelled).to_json() | {"method": table})
        return sum(p.numel() for p in attach(spec, prepare(spec)).parameters() if p.requires_grad)

    parts = {key: {"name": key} | value for key, value in COMBINATIONS["unipelt"].items()}
    assert count({"name": "hybrid"} | parts) == sum(map(count, parts.values()))


def test_lora_part_of_a_hybrid_gives_its_update(tiny_bases, labelled, tmp_path):
    """With the prompt taken away, W0 + ΔW is what is left."""
    spec = hybrid_spec(COMBINATIONS["lora+prompt"], "llama", tiny_bases, labelled)
    model, batch, _, examples = tuned(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want = model.get_base_model()(input_ids=batch["input_ids"]).logits
        got = forward(add(load_base(spec, examples), read_updates(tmp_path)), batch)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_it_trains_on_a_quantized_base(quantization, tiny_bases, labelled):
    spec = hybrid_spec(COMBINATIONS["unipelt"], "llama", tiny_bases, labelled, quantization=quantization)
    examples = prepare(spec)
    model = attach(spec, examples)
    losses = take_steps(spec, model, examples, 10)
    assert losses[-1] < losses[0]
    batch = collate(examples.splits["train"][:4], examples.padding, CPU)
    assert forward(model.eval(), batch).shape == (*batch["input_ids"].shape, 1024)
    assert not any(p.requires_grad for m in model.modules() if weights.is_linear_layer(m) and hasattr(m, "quant_state")
                   for p in m.parameters(recurse=False))  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"lora": LORA}, "needs at least two"),
        ({"prefix": {}, "prompt": {}, "lora": LORA}, "method.prompt: cannot be had together"),
        ({"lora": LORA | {"init": "pissa"}, "adapter": ADAPTER}, "init must be"),
        ({"lora": {"rank": 0}, "adapter": ADAPTER}, "method.lora.rank = 0: must be at least 1"),
        ({"lora": {"name": "adapter"}, "adapter": ADAPTER}, "method.lora.name = \"adapter\": can only be lora"),
        ({"lora": 3, "adapter": ADAPTER}, "method.lora = 3: must be a table"),
        ({"adaptor": ADAPTER}, "Did you mean 'adapter'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_key(parts, problem):
    with pytest.raises(InputError) as error:
        make_spec(method={"name": "hybrid"} | parts)
    assert problem in str(error.value)


def test_a_hybrid_is_its_table_and_back():
    spec = make_spec(method={"name": "hybrid"} | COMBINATIONS["mam"])
    again = RunSpec.from_json(spec.to_json())
    assert again == spec
    assert again.id == spec.id
    assert encode(spec.method)["lora"] is None
