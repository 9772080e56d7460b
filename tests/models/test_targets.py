"""Target presets mean the same layers on every architecture."""

from __future__ import annotations

import re

import pytest

from lorabench.config.decode import InputError
from lorabench.models.base_model import skeleton
from lorabench.models.targets import PRESETS, find, layer_index, linear_layers, match, unreached
from tests import families
from tests.conftest import make_spec

WANT = {  # the layers of one block
    "llama": {
        "query": {"q_proj"},
        "query-value": {"q_proj", "v_proj"},
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "mlp": {"gate_proj", "up_proj", "down_proj"},
    },
    "gpt2": {
        "attention": {"attn.c_attn", "attn.c_proj"},
        "mlp": {"mlp.c_fc", "mlp.c_proj"},
    },
    "bert": {
        "query": {"self.query"},
        "query-value": {"self.query", "self.value"},
        "attention": {"self.query", "self.key", "self.value", "attention.output.dense"},
        "mlp": {"intermediate.dense", "1.output.dense"},
    },
}

WANT["roberta"] = WANT["bert"]


@pytest.fixture(scope="module")
def skeletons(tiny_bases):
    models = {}
    for name, folder in tiny_bases.items():
        task = {"name": "classification", "data": "x"} if "bert" in name else {"name": "text"}
        models[name] = skeleton(make_spec(model=folder, task=task), {})
    return models


@pytest.mark.parametrize(("base", "preset"), [(base, preset) for base in WANT for preset in WANT[base]])
def test_presets(base, preset, skeletons):
    model = skeletons[base]
    block = [name for name in match(model, preset) if ".1." in name]
    assert len(block) == len(WANT[base][preset])
    assert all(any(name.endswith(end) for name in block) for end in WANT[base][preset]), block


@pytest.mark.parametrize("base", WANT)
def test_attention_and_mlp_make_up_all_linear_layers(base, skeletons):
    model = skeletons[base]
    attention, mlp = set(match(model, "attention")), set(match(model, "mlp"))
    assert not attention & mlp
    assert attention | mlp == set(match(model, "all-linear")) == set(linear_layers(model))


QKV, BERT = (
    ["q_proj", "k_proj", "v_proj"],
    [*(f"attention.{kind}" for kind in ("self.query", "self.key", "self.value", "output.dense"))],
)
GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LLAMA = ([*(f"self_attn.{kind}" for kind in [*QKV, "o_proj"])], GATED)
FUSED = ["query_key_value", "dense"]
WIDENED = ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
OPT = [*(f"self_attn.{kind}" for kind in [*QKV, "out_proj"])]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate"]
SHARED = [*(f"mlp.shared_expert.{kind}" for kind in ("gate_proj", "up_proj", "down_proj")), "mlp.shared_expert_gate"]
T5 = [f"{kind}.{leaf}" for kind in ("layer.0.SelfAttention", "layer.1.EncDecAttention") for leaf in "qkvo"]
FAMILIES: dict[str, tuple[list[str], list[str]]] = {  # the attention's and the feed-forward's of the last block
    **dict.fromkeys(["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral"], LLAMA),
    "phi3": (["self_attn.qkv_proj", "self_attn.o_proj"], ["mlp.gate_up_proj", "mlp.down_proj"]),
    "gpt2": (["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
    "gptj": ([f"attn.{kind}" for kind in [*QKV, "out_proj"]], ["mlp.fc_in", "mlp.fc_out"]),
    "codegen": (["attn.qkv_proj", "attn.out_proj"], ["mlp.fc_in", "mlp.fc_out"]),
    "gpt_neox": ([f"attention.{kind}" for kind in FUSED], WIDENED),
    **dict.fromkeys(["falcon", "bloom"], ([f"self_attention.{kind}" for kind in FUSED], WIDENED)),
    "opt": (OPT, ["fc1", "fc2"]),
    "bart": ([*OPT, *(name.replace("self", "encoder") for name in OPT)], ["fc1", "fc2"]),
    **dict.fromkeys(["bert", "roberta"], (BERT, ["intermediate.dense", "output.dense"])),
    "deberta-v2": ([*(f"{name}_proj" for name in BERT[:3]), BERT[3]], ["intermediate.dense", "output.dense"]),
    "modernbert": (["attn.Wqkv", "attn.Wo"], ["mlp.Wi", "mlp.Wo"]),
    "distilbert": ([f"attention.{kind}_lin" for kind in ("q", "k", "v", "out")], ["ffn.lin1", "ffn.lin2"]),
    "t5": (T5, ["layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"]),
    "t5-gated": (T5, [f"layer.2.DenseReluDense.{kind}" for kind in ("wi_0", "wi_1", "wo")]),
    **dict.fromkeys(["mixtral", "qwen3-moe", "olmoe"], (LLAMA[0], STACKS)),
    "gpt-oss": (LLAMA[0], [*STACKS[:2], "mlp.router"]),
    "llama4": (LLAMA[0], [name.replace("mlp.", "feed_forward.") for name in [*STACKS[:2], "mlp.router", *SHARED[:3]]]),
    "qwen2-moe": (LLAMA[0], [*STACKS, *SHARED]),
    "qwen3-next": (LLAMA[0], [*STACKS, *SHARED]),
    "deepseek-v3": (
        [f"self_attn.{kind}" for kind in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")],
        [*STACKS, *(name.replace("expert", "experts") for name in SHARED[:3])],
    ),
}


def last_block(found):
    """What was found in the last block, without its name; of T5 and BART in the decoder's."""
    names = [*found.layers, *(name.removesuffix(".weight") for name in found.stacked)]
    assert len(names) == len(set(names))
    inner = [re.fullmatch(r"(\D*)\.1\.(.+)", name) for name in names]
    encoders = "encoder" if any("decoder" in name for name in names) else "nothing"
    return sorted(m[2] for m in inner if m and encoders not in m[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_preset_takes_of_each_family(family):
    model, (attention, mlp) = families.make(family), FAMILIES[family]
    assert last_block(find(model, "attention")) == sorted(attention)
    assert last_block(find(model, "mlp")) == sorted(mlp)
    everything = find(model, "all-linear")
    assert last_block(everything) == sorted([*attention, *mlp])
    assert last_block(find(model, "all-linear", "1")) == sorted([*attention, *mlp])
    assert all(layer_index(name) == 1 for name in find(model, "all-linear", "1").layers)
    assert set(find(model, "all-linear", "0-1").layers) == set(everything.layers)
    left = {"qwen3-next": ["linear_attn.conv1d"]}
    assert unreached(model, everything) == left.get(family, [])


def test_the_attention_that_is_computed_as_a_recurrence_is_one_too():
    names = find(families.make("qwen3-next"), "attention", "0").layers
    kinds = ("in_proj_qkvz", "in_proj_ba", "out_proj")
    assert names == [f"model.layers.0.linear_attn.{kind}" for kind in kinds]


@pytest.mark.parametrize(("family", "layers"), [("mamba", ["in_proj", "x_proj"]), ("mamba2", ["in_proj"])])
def test_a_model_without_attention_has_what_peft_can_be_put_on(family, layers):
    model = families.make(family)
    assert find(model, "all-linear").layers == [f"backbone.layers.{i}.mixer.{k}" for i in (0, 1) for k in layers]
    left = unreached(model, find(model, "all-linear"))
    assert {"mixer.out_proj", "mixer.conv1d"} <= set(left) and ("mixer.dt_proj" in left) == (family == "mamba")
    for preset in ("attention", "mlp", "query"):
        with pytest.raises(InputError, match="in_proj"):
            match(model, preset)


@pytest.mark.parametrize("model_type", ["falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h", "llama", "jamba"])
def test_what_peft_refuses_of_a_model_type_is_left_out(model_type):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    model = families.make("mamba2")
    model.config.model_type = model_type
    try:
        _check_lora_target_modules_mamba(LoraConfig(target_modules=["out_proj"]), model, "out_proj")
        refused = False
    except ValueError:
        refused = True
    assert refused != any(name.endswith("out_proj") for name in find(model, "all-linear").layers)


@pytest.mark.parametrize("model_type", ["bamba", "granitemoehybrid", "zamba2"])
def test_what_a_kernel_uses_by_its_weight_alone_is_left_out(model_type):
    """Mamba 2's mixer in other models; PEFT does not refuse it there, and it would not be computed."""
    model = families.make("mamba2")
    model.config.model_type = model_type
    assert {name.rpartition(".")[2] for name in find(model, "all-linear").layers} == {"in_proj"}


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("gptj", ["attn.k_proj", "attn.v_proj", "mlp.fc_out"]),
        ("codegen", ["attn.qkv_proj", "mlp.fc_out"]),
        ("gpt2", ["attn.c_attn", "mlp.c_proj"]),
        ("llama", ["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"]),
        ("deepseek-v3", ["self_attn.kv_b_proj", "mlp.shared_experts.down_proj", "mlp.experts.down_proj"]),
    ],
)
def test_keys_values_and_the_last_matrix_of_the_feed_forward_are_taken_together(family, layers):
    assert last_block(find(families.make(family), "key-value-down")) == sorted(layers)


def test_some_of_what_a_preset_names_are_no_preset():
    from torch import nn

    model = families.make("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Identity()
    with pytest.raises(InputError, match='"key-value-down": fits no linear layer'):
        find(model, "key-value-down")


def test_stacked_experts_are_no_linear_layers():
    model = families.make("mixtral")
    with pytest.raises(InputError, match=r'"mlp": fits no linear layer .*down_proj, gate, gate_up_proj.*lora alone'):
        match(model, "mlp")
    assert find(model, "experts.down_proj", "1").stacked == ["model.layers.1.mlp.experts.down_proj"]
    assert {name.rpartition(".")[2] for name in match(model, "all-linear")} == {*QKV, "o_proj"}


def test_heads_and_poolers_are_no_targets(skeletons):
    names = {name for model in skeletons.values() for name in linear_layers(model)}
    assert not any("lm_head" in name or "classifier" in name or "pooler" in name for name in names)


def test_a_regular_expression_matches_whole_names_or_their_ends(skeletons):
    assert match(skeletons["llama"], r"layers\.1\..*q_proj") == ["model.layers.1.self_attn.q_proj"]
    assert len(match(skeletons["llama"], "q_proj|v_proj")) == 4


@pytest.mark.parametrize(
    ("base", "targets", "words"),
    [
        ("gpt2", "query", ["query", "c_attn", *PRESETS]),  # a fused layer has no query of its own
        ("llama", "qproj", ["method.targets", "qproj", "q_proj"]),
        ("llama", "(", ["method.targets", "not a regular expression"]),
    ],
)
def test_what_fits_nothing_is_said_with_the_choices(base, targets, words, skeletons):
    with pytest.raises(InputError) as error:
        match(skeletons[base], targets)
    assert all(word in str(error.value) for word in words)
