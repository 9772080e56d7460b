"""Target presets mean the same layers on every architecture."""

from __future__ import annotations

import pytest

from lorabench.decode import InputError
from lorabench.model import skeleton
from lorabench.targets import PRESETS, linear_layers, match
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
