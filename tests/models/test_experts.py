"""Mixtures of experts: LoRA on stacked experts and routers, and one ΔW for each expert."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from lorabench.config.decode import InputError
from lorabench.models import weights
from lorabench.updates.formats import read_updates
from tests import families
from tests.conftest import make_spec

FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3", "qwen3-next", "gpt-oss", "llama4"]
TOKENS = torch.arange(24).reshape(2, 12)


def base(family):
    torch.manual_seed(0)
    return families.make(family, "cpu").eval()


def tuned(method, family):
    """A model with the method attached, and something learned."""
    spec = make_spec(method=method)
    model = spec.method.attach(base(family), spec)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return spec, model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def add(model, updates):
    for update in updates:
        weights.add_update(model, update)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_every_expert_is_what_its_updates_say_and_peft_loads_it(family, tmp_path):
    spec, model = tuned({"name": "lora", "rank": 2}, family)
    want = logits(model)
    updates = list(spec.method.updates(model, lambda: base(family)))
    assert (want - logits(base(family))).abs().max() > 0.1
    torch.testing.assert_close(logits(add(base(family), updates)), want, atol=1e-5, rtol=1e-4)
    names = {update.parameter for update in updates}
    experts = "feed_forward.experts" if family == "llama4" else "mlp.experts"
    assert {f"model.layers.1.{experts}.down_proj[{e}].weight" for e in range(4)} <= names
    assert len(names) == len(updates)
    assert sum(sum(u.B.shape[0:1] + u.A.shape[1:]) * 2 for u in updates) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    spec.method.save(model, lambda: base(family), tmp_path, "updates")
    read = list(read_updates(tmp_path))
    assert {update.parameter for update in read} == names
    torch.testing.assert_close(logits(add(base(family), read)), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(family), tmp_path)), want, atol=0, rtol=0)
    torch.testing.assert_close(logits(spec.method.merge(copy.deepcopy(model))), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(spec.method.unload(model)), logits(base(family)), atol=0, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_full_fine_tuning_has_a_delta_for_each_expert(family, tmp_path):
    spec, model = tuned({"name": "full"}, family)
    spec.method.save(model, lambda: base(family), tmp_path, "updates")
    updates = {update.parameter: update for update in read_updates(tmp_path)}
    assert updates["model.layers.0.mlp.experts.gate_up_proj[3].weight"].shape == (128, 32)
    torch.testing.assert_close(logits(add(base(family), updates.values())), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", "mlp", "experts.(gate_up|down)_proj"])
def test_only_the_chosen_blocks_of_a_renamed_family_train(targets):
    """PEFT takes `gate_proj` of a DeepSeek for its stacked experts, and a regular expression for all blocks."""
    _, model = tuned({"name": "lora", "rank": 2, "targets": targets, "layers": "1"}, "deepseek-v3")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(".layers.1." in name for name in trained)


@pytest.mark.parametrize(("key", "value"), [("dropout", 0.1), ("dora", True), ("init", "pissa")])
def test_what_peft_cannot_do_on_a_stack_is_refused(key, value):
    with pytest.raises(
        InputError, match=rf"method\.{key} = .*mlp\.gate, experts\.gate_up_proj|method\.{key} = .*experts"
    ):
        tuned({"name": "lora", key: value}, "qwen3-moe")
    tuned({"name": "lora", key: value, "targets": "attention"}, "qwen3-moe")
