"""Fused layers of adapters in parts: beside PEFT's own ΔW, cut by the rows that the family's code reads."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorabench
from lorabench.cli import main
from lorabench.models.fused import fused_parts
from tests import families

FAMILIES = {"phi3": ["qkv_proj", "gate_up_proj"], "gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}


@pytest.fixture(scope="module", params=FAMILIES)
def tuned(request, tmp_path_factory):
    """The base's folder, two adapters of it, ΔW of the first as PEFT has it, and the rows of its parts."""
    folder = tmp_path_factory.mktemp(request.param)
    base = families.make(request.param, "cpu")
    base.save_pretrained(folder / "base")
    parts = fused_parts(base)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=FAMILIES[request.param]))
    changes = {}
    for name in "ba":
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / name)
    for key, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            changes[key] = delta.T if request.param == "gpt2" else delta
    return folder, changes, parts


def wanted(tuned):
    _, changes, parts = tuned
    return {
        f"{layer}[{kind}]": part.rows(delta)
        for layer, delta in changes.items()
        for kind, part in parts[f"{layer}.weight"].items()
    }


def test_with_the_base_parts_stand_beside_the_whole(tuned):
    folder, changes, _ = tuned
    updates, whole = lorabench.load(folder / "a", base=folder / "base"), lorabench.load(folder / "a")
    parts = wanted(tuned)
    assert {*whole} == {*changes} and {*updates} == {*changes, *parts} and len(parts) >= 3 * 2
    for layer, delta in (changes | parts).items():
        svd = updates[layer]
        assert torch.allclose((svd.U.double() * svd.S.double()) @ svd.Vh.double(), delta.double(), atol=1e-5)


def test_inspect_shows_them_and_advises_ranks_of_the_modules(tuned, capsys):
    folder, changes, _ = tuned
    tables = []
    for base in ([], ["--base", str(folder / "base")]):
        assert main(["inspect", str(folder / "a"), "--json", *base]) == 0
        tables.append(json.loads(capsys.readouterr().out))
    whole, parts = tables
    for key in ("num_layers", "frobenius_norm", "rank_advice"):
        assert parts[key] == whole[key]
    rows = {row["layer"]: row for row in parts["layers"]}
    assert {row["layer"] for row in whole["layers"]} == {*changes} and rows.keys() == {*changes, *wanted(tuned)}
    for layer, delta in wanted(tuned).items():
        assert rows[layer]["part_of"] in changes and rows[layer]["shape"] == [*delta.shape]
        assert rows[layer]["frobenius_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)


def test_compare_has_them_in_place_of_the_whole(tuned, capsys):
    folder, _, _ = tuned
    arguments = ["compare", str(folder / "a"), str(folder / "b"), "--json"]
    assert main([*arguments, "--base", str(folder / "base")]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {row["layer"] for row in table["layers"]} == {*wanted(tuned)} and not table["only_a"] + table["only_b"]
    (folder / "base" / "config.json").rename(folder / "base" / "gone.json")
    assert main([*arguments, "--base", str(folder / "base")]) == 0
    (folder / "base" / "gone.json").rename(folder / "base" / "config.json")
    assert not any("[" in row["layer"] for row in json.loads(capsys.readouterr().out)["layers"])


def test_a_base_of_another_width_or_kind_tells_nothing(tuned, tmp_path, capsys):
    folder, changes, _ = tuned
    wide = {"hidden_size": 64, "n_embd": 64, "head_dim": 16, "intermediate_size": 128}
    for change, code in ((wide, 0), ({"model_type": "x"}, 2)):
        table = json.loads((folder / "base" / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(table))
        (tmp_path / "model.safetensors").write_bytes((folder / "base" / "model.safetensors").read_bytes())
        assert main(["inspect", str(folder / "a"), "--base", str(tmp_path), "--json"]) == code
        said = capsys.readouterr()
        if code:
            assert "config.json: is no configuration of a model" in said.err
        else:
            assert {row["layer"] for row in json.loads(said.out)["layers"]} == {*changes}
