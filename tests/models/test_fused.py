"""Which rows of fused matrices are which of their parts: by what becomes of the model when these are changed."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import transformers as t

from lorabench.models import weights
from lorabench.models.fused import fused_parts
from lorabench.updates.update import Update
from tests import families

TOKENS = torch.randint(3, 1000, (1, 9), generator=torch.Generator().manual_seed(0))
FALCON = partial(families.CONFIGS["falcon"], num_attention_heads=4)
CONFIGS = families.CONFIGS | {
    "falcon-40b": partial(FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": partial(FALCON, multi_query=False, alibi=True),
}
ATTENTION = {  # the fused matrix, and the one that takes what the attention gives
    "gpt2": ("c_attn", "attn.c_proj"),
    "phi3": ("qkv_proj", "o_proj"),
    "modernbert": ("Wqkv", "attn.Wo"),
    "codegen": ("qkv_proj", "out_proj"),
    "gpt_neox": ("query_key_value", "attention.dense"),
    **dict.fromkeys(["bloom", "falcon", "falcon-40b", "falcon-rw"], ("query_key_value", "self_attention.dense")),
}
GATED = {"phi3": "mlp.down_proj", "modernbert": "mlp.Wo"}
EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3", "qwen3-next", "gpt-oss"]


def make(family):
    """Random, without any biases, and of weights so large that attention is far from uniform."""
    torch.manual_seed(0)
    auto = t.AutoModelForSequenceClassification if family in families.CLASSIFIERS else t.AutoModelForCausalLM
    model = auto.from_config(CONFIGS[family](), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        parameter.data *= 0 if name.endswith("bias") else 10 if parameter.ndim > 1 else 1
    return model


def scaled(family, kind, factor):
    """The model with one part of all its fused matrices times a factor."""
    model, zero = make(family), make(family)
    for parameter in zero.parameters():
        parameter.data.zero_()
    W0 = {update.parameter: update.B for update in weights.weight_changes(model, zero)}
    for parameter, parts in fused_parts(model).items():
        if kind in parts:
            rows = parts[kind].rows(torch.arange(len(W0[parameter]))[:, None])[:, 0]
            delta = torch.zeros_like(W0[parameter])
            delta[rows] = (factor - 1) * W0[parameter][rows]
            weights.add_update(model, Update(parameter=parameter, B=delta))
    return model


def seen(model, module, output=False):
    """What the first module that is so called is given, or puts out."""
    found = []
    name = next(name for name, _ in model.named_modules() if name.endswith(f".{module}"))
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, args, out: found.append(out if output else args[0])
    )
    model(input_ids=TOKENS)
    hook.remove()
    return found[0]


def is_close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-5 * float(a.detach().abs().max()))


@pytest.mark.parametrize("family", ATTENTION)
def test_queries_keys_and_values(family):
    """Without values attention gives nothing; without queries it is as uniform as without keys; and what it gives at
    the last place depends on the queries of the last input alone, and on the keys of all."""
    fused, out = ATTENTION[family]
    plain = seen(make(family), out)
    assert plain.abs().max() > 0.1
    assert not seen(scaled(family, "v", 0), out).any()
    uniform = seen(scaled(family, "q", 0), out)
    assert is_close(uniform, seen(scaled(family, "k", 0), out)) and not is_close(uniform, plain)
    model = make(family)
    last = seen(model, fused)[0, -1].detach()
    (found := seen(model, out)).reshape(-1, found.shape[-1])[-1].sum().backward()
    parameter, parts = next((name, parts) for name, parts in fused_parts(model).items() if "q" in parts)
    gradient = model.get_parameter(parameter).grad
    gradient = gradient if gradient.shape[1] == len(last) and fused != "c_attn" else gradient.T
    beside = {kind: part.rows(gradient) for kind, part in parts.items()}
    along = {kind: torch.outer(rows @ last, last) / (last @ last) for kind, rows in beside.items()}
    assert {kind: is_close(rows, along[kind]) for kind, rows in beside.items()} == {"q": True, "k": False, "v": False}
    sizes = {kind: part.groups * (part.stop - part.start) for kind, part in parts.items()}
    assert sum(sizes.values()) == len(gradient) and sizes["k"] == sizes["v"]


def test_the_values_out_of_a_latent():
    model = make("deepseek-v3")
    assert seen(model, "o_proj").abs().max() > 0.1 and not seen(scaled("deepseek-v3", "v", 0), "o_proj").any()
    assert not is_close(seen(scaled("deepseek-v3", "k", 0), "o_proj"), seen(model, "o_proj"))


@pytest.mark.parametrize("family", [*GATED, *EXPERTS])
def test_gate_and_up(family):
    """What the feed-forward gives is nothing without `gate`, the nonlinearity of 0 being 0; it is affine in `up`, and
    not in `gate`."""
    place = (GATED[family],) if family in GATED else ("experts", True)
    gate, up = ([seen(scaled(family, kind, factor), *place) for factor in (0, 0.1, 0.2)] for kind in ("gate", "up"))
    assert not gate[0].any() and up[2].abs().max() > 1e-3
    assert is_close(up[2] - up[1], up[1] - up[0]) and not is_close(gate[2] - gate[1], gate[1] - gate[0])


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "llama4"])
def test_what_is_not_fused_or_not_known_is_one_matrix(family):
    assert not fused_parts(families.make(family, "cpu"))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "gpt-oss"])
def test_norms_are_those_of_the_parts(family):
    model = families.make(family, "cpu")
    zero = copy.deepcopy(model)
    for parameter in zero.parameters():
        parameter.data.zero_()
    norms = {update.parameter: update.B.norm() for update in weights.weight_changes(model, zero)}
    fused = fused_parts(model)
    assert fused
    for parameter, parts in fused.items():
        assert sum(part.base_norm**2 for part in parts.values()) == pytest.approx(
            float(norms[parameter]) ** 2, rel=1e-5
        )
