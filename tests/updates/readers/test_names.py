"""Names with wrappers, adapters' names and old prefixes in them mean what the same tensors mean without."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lorabench.config.decode import InputError
from lorabench.updates import formats
from lorabench.updates.weightfile import WeightFiles

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}}


def factors():
    torch.manual_seed(0)
    return {f"{PREFIX}{layer}.lora_{x}.weight": torch.randn((r, 8) if x == "A" else (6, r))
            for layer, r in zip(LAYERS, (3, 2), strict=True) for x in "AB"}  # fmt: skip


def write(folder, tensors, config=CONFIG):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


RENAMED = {
    "compiled outside": lambda name: f"_orig_mod.{name}",
    "compiled inside": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled by block": lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
    "distributed": lambda name: f"module.{name}",
    "distributed inside": lambda name: name.replace(PREFIX, f"{PREFIX}module."),
    "sharded": lambda name: name.replace(".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"),
    "distributed and compiled": lambda name: f"module._orig_mod.{name}",
    "default": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".ranking.weight"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_wrappers_and_adapters_names(case, tmp_path):
    tensors = factors()
    plain = formats.open_adapter(write(tmp_path / "plain", tensors))
    save = {RENAMED[case](name): tensor for name, tensor in tensors.items()}
    wrapped = formats.open_adapter(write(tmp_path / "wrapped", save))
    assert [*wrapped.entries] == [f"{layer}.weight" for layer in LAYERS] and wrapped.notes == ()
    for name, entry in plain.entries.items():
        assert torch.equal(wrapped.entries[name].load().dense(), entry.load().dense())


def test_what_is_saved_whole_under_an_adapters_name(tmp_path):
    head = {f"{PREFIX}score.modules_to_save.one.weight": torch.randn(3, 8),
            f"{PREFIX}score.original_module.weight": torch.zeros(3, 8)}  # fmt: skip
    tensors = {name.replace(".weight", ".one.weight"): tensor for name, tensor in factors().items()} | head
    adapter = formats.open_adapter(write(tmp_path, tensors))
    assert [*adapter.others] == ["score.weight"] and adapter.left_out == (f"{PREFIX}score.original_module.weight",)
    assert torch.equal(adapter.others["score.weight"].load(), head[f"{PREFIX}score.modules_to_save.one.weight"])


def test_two_adapters_in_one_file(tmp_path):
    tensors = {name.replace(".weight", f".{one}.weight"): t.clone() for name, t in factors().items() for one in "ab"}
    with pytest.raises(InputError, match=r"holds several adapters \(a, b\): keep one of them"):
        formats.open_adapter(write(tmp_path, tensors))
    tensors = {name.replace(".a.", ".default."): tensor for name, tensor in tensors.items()}
    adapter = formats.open_adapter(write(tmp_path, tensors))
    assert len(adapter.entries) == 2 and len(adapter.left_out) == 4 and "4 tensors left out" in adapter.notes[-1]


def test_two_tensors_of_one_name(tmp_path):
    tensors = factors()
    save = tensors | {f"_orig_mod.{name}": tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(InputError, match="are both base_model"):
        formats.open_adapter(write(tmp_path, save))


@pytest.mark.parametrize(
    ("module", "infix", "layer"),
    [
        ("layers.0.attention.to_q", "default", "layers.0.attention.to_q"),
        ("diffusion_model.blocks.0.self_attn.q", "default", "blocks.0.self_attn.q"),
        ("diffusion_model.blocks.0.self_attn.q", "", "blocks.0.self_attn.q"),
        ("transformer.blocks.0.attn.to_q", "default_0", "transformer.blocks.0.attn.to_q"),
        ("base_model.model.diffusion_model.blocks.0.q", "", "blocks.0.q"),
    ],
)
def test_files_of_diffusion_models(module, infix, layer, tmp_path):
    torch.manual_seed(0)
    A, B = torch.randn(4, 16), torch.randn(24, 4)
    end = f".{infix}.weight" if infix else ".weight"
    save_file({f"{module}.lora_A{end}": A, f"{module}.lora_B{end}": B}, tmp_path / "lora.safetensors")
    adapter = formats.open_adapter(tmp_path / "lora.safetensors")
    (name,) = adapter.entries
    assert name == f"{layer}.weight" and adapter.scale_source == "assumed"
    assert torch.allclose(adapter.entries[name].load().dense(), B @ A, atol=1e-5)


def test_a_vision_language_model_before_it_was_moved(tmp_path):
    """transformers 4.52 renamed them; patterns name the modules as they were when it was trained."""
    tensors = {name.replace("model.layers", "language_model.model.layers"): t for name, t in factors().items()}
    pattern = {"rank_pattern": {"^language_model.model.layers.0.self_attn.q_proj": 3}}
    adapter = formats.open_adapter(write(tmp_path, tensors, CONFIG | pattern))
    assert [*adapter.entries] == [f"{x.replace('model.', 'model.language_model.', 1)}.weight" for x in LAYERS]
    assert [entry.shape for entry in adapter.entries.values()] == [(6, 8)] * 2


def test_a_base_by_its_old_names(tmp_path):
    for name in ("language_model.model.layers.0.q.weight", "model.language_model.layers.0.q.weight"):
        save_file({name: torch.ones(2, 2), "vision.layers.0.q.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
        weights = WeightFiles(tmp_path / "x.safetensors")
        for asked in ("language_model.model.layers.0.q.weight", "model.layers.0.q.weight"):
            assert weights.find(asked) == name
        assert weights.find("language_model.model.layers.1.q.weight") is None
