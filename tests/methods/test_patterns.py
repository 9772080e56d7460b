"""Patterns that overlap: what was trained is what PEFT and lorabench read again, whichever pattern comes first."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from lorabench.config.decode import InputError
from lorabench.methods._peft import tuner_layers
from lorabench.models.base_model import skeleton
from lorabench.models.remarks import remarks
from lorabench.training.examples import prepare
from lorabench.training.passes import forward
from lorabench.updates.advice import exact_key
from lorabench.updates.formats import open_adapter, read_updates
from tests.conftest import make_spec
from tests.methods.test_lora import peft_config
from tests.methods.test_methods import CPU, attach, collate, load_base, method_spec, take_steps

FIRST, LATER = "q_proj", "layers.1.self_attn.q_proj"
OVERLAPPING = {
    "alphas": {"alpha_pattern": {FIRST: 8.0, LATER: 64.0}},
    "ranks": {"rank_pattern": {FIRST: 4, LATER: 8}},
    "both": {"rank_pattern": {r".*\.1\..*": 3, FIRST: 4}, "alpha_pattern": {"(q|v)_proj": 2.0, r".*\.1\..*": 5.0}},
    "pissa": {"init": "pissa", "rank_pattern": {FIRST: 4, LATER: 8}, "alpha_pattern": {"proj|q_proj": 3.0}},
    "rslora": {"rslora": True, "rank_pattern": {"self_attn.q_proj": 1, FIRST: 4}},
}
TUNERS = {"LOHA": {"r": 2}, "LOKR": {"r": 2}, "DELORA": {"r": 2}, "OSF": {"effective_rank": 4}}


def trained_model(spec):
    examples = prepare(spec)
    model = attach(spec, examples)
    take_steps(spec, model, examples, 3)
    return model.eval(), examples


@pytest.mark.parametrize("case", OVERLAPPING)
def test_the_update_that_was_trained_is_the_one_that_is_read(case, tiny_bases, labelled, tmp_path):
    spec = method_spec("lora", "llama", tiny_bases, labelled, OVERLAPPING[case])
    model, examples = trained_model(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    want = {update.layer: update.dense() for update in spec.method.layer_updates(model, lambda: None)}
    if case != "pissa":  # of which PEFT's own counts from another base
        delta = {name: layer.get_delta_weight("default") for name, layer in tuner_layers(model)}
        assert all(torch.allclose(delta[name], want[name], atol=1e-6) for name in delta)
    reloaded = PeftModel.from_pretrained(load_base(spec, examples), tmp_path)
    found = {name: layer.get_delta_weight("default") for name, layer in tuner_layers(reloaded)}
    read = {update.layer: update.dense() for update in read_updates(tmp_path)}
    assert found.keys() == read.keys() == want.keys()
    for name, delta in want.items():
        torch.testing.assert_close(found[name], delta, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(read[name], delta, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["alphas", "ranks", "both"])
def test_a_run_is_trained_as_peft_takes_the_patterns(case, tiny_bases, labelled):
    spec = method_spec("lora", "llama", tiny_bases, labelled, OVERLAPPING[case])
    ours = attach(spec, prepare(spec))
    names = [name for name, _ in tuner_layers(ours)]
    theirs = get_peft_model(load_base(spec, prepare(spec)), peft_config(OVERLAPPING[case], names))
    for (name, mine), (_, other) in zip(tuner_layers(ours), tuner_layers(theirs), strict=True):
        assert (mine.r, mine.scaling) == (other.r, other.scaling), name


@pytest.mark.parametrize("kind", TUNERS)
def test_other_tuners_patterns_are_exact_too(kind, tiny_bases, labelled, tmp_path):
    patterns = {"rank_pattern": {FIRST: 3, LATER: 5}}
    if kind in ("LOHA", "LOKR"):
        patterns["alpha_pattern"] = {FIRST: 2.0, LATER: 64.0}
    method = {"type": kind, "config": TUNERS[kind] | patterns, "targets": "attention"}
    spec = method_spec("peft", "llama", tiny_bases, labelled, method)
    model, examples = trained_model(spec)
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    written = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert written == {exact_key(f"model.layers.{block}.self_attn.q_proj"): 3 for block in (0, 1)}
    batch = collate(examples.splits["train"][:4], examples.padding, CPU)
    with torch.no_grad():
        again = PeftModel.from_pretrained(load_base(spec, examples), tmp_path).eval()
        torch.testing.assert_close(forward(again, batch), forward(model, batch), atol=2e-5, rtol=1e-4)


def test_patterns_that_peft_does_not_keep_to_are_refused(tiny_bases, labelled):
    method = {"type": "HIRA", "config": {"r": 2, "rank_pattern": {FIRST: 3}}}
    spec = method_spec("peft", "llama", tiny_bases, labelled, method)
    with pytest.raises(InputError, match=r"rank_pattern: PEFT does not keep to it: .*q_proj has 2 and not 3"):
        attach(spec, prepare(spec))


@pytest.mark.parametrize("case", ["alphas", "ranks"])
def test_a_run_of_before_is_read_by_the_order_of_its_spec(case, tiny_bases, labelled, tmp_path):
    """Its file has patterns sorted by their names: alone it says another scale, or ranks that do not fit."""
    spec = method_spec("lora", "llama", tiny_bases, labelled, OVERLAPPING[case])
    base, folder = load_base(spec, prepare(spec)), tmp_path / "updates"
    names = [name for name, module in base.named_modules() if name.endswith(("q_proj", "v_proj"))]
    model = get_peft_model(base, peft_config(OVERLAPPING[case], names))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    model.save_pretrained(folder)
    alone = json.loads((folder / "adapter_config.json").read_text())
    assert list(alone["alpha_pattern"]) != list(model.peft_config["default"].alpha_pattern)
    want = {name: layer.get_delta_weight("default") for name, layer in tuner_layers(model)}
    if case == "alphas":
        assert not all(torch.allclose(update.dense(), want[update.layer]) for update in read_updates(folder))
    else:
        with pytest.raises(InputError, match="do not fit"):
            list(read_updates(folder))
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_json()))
    for update in read_updates(folder):
        torch.testing.assert_close(update.dense(), want[update.layer], atol=1e-6, rtol=1e-5)
    assert any("patterns overlap" in note for note in open_adapter(folder).notes)
    reloaded = spec.method.load(load_base(spec, prepare(spec)), folder, spec)
    for name, layer in tuner_layers(reloaded):
        torch.testing.assert_close(layer.get_delta_weight("default"), want[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("patterns", "vain"),
    [
        ({FIRST: 8, LATER: 3}, [LATER]),
        ({LATER: 3, FIRST: 8}, []),
        ({"q_proj": 1, "k_proj": 2, "(q|k)_proj": 3, "v_proj": 4}, ["(q|k)_proj"]),
    ],
)
def test_a_pattern_that_never_counts_is_told(patterns, vain):
    spec = make_spec(method={"name": "lora", "rank": 2, "targets": "attention", "rank_pattern": patterns})
    told = remarks(spec, skeleton(spec, {})).get("patterns", "")
    names = ", ".join(f'method.rank_pattern: "{pattern}"' for pattern in vain)
    assert told == (
        f"{names}: without effect, for of each layer's patterns the first counts, as in PEFT" if vain else ""
    )


def test_a_pattern_of_a_hybrid_s_lora_is_told_by_its_own_key():
    lora = {"rank": 2, "targets": "attention", "alpha_pattern": {FIRST: 8.0, LATER: 3.0}}
    spec = make_spec(method={"name": "hybrid", "lora": lora, "prefix": {}})
    assert remarks(spec, skeleton(spec, {}))["patterns"].startswith(f'method.lora.alpha_pattern: "{LATER}": without')
