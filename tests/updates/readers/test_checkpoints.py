"""Two checkpoints, before and after, against the difference of the models that transformers loads from them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig

from lorabench.config.decode import InputError
from lorabench.models.weights import weight_changes
from lorabench.updates import formats
from tests import families

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
MODELS = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)),
    "gpt2": (AutoModelForCausalLM, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8)),
    "bert": (AutoModelForSequenceClassification, BertConfig(**SIZES)),
    "gpt-oss": (AutoModelForCausalLM, families.CONFIGS["gpt-oss"]()),
    "llama4": (AutoModelForCausalLM, families.CONFIGS["llama4"]()),
}


def two(kind, folder, **options):
    """A model and what became of it, both saved; and the true ΔW of each weight, as (out, in)."""
    auto, config = MODELS[kind]
    torch.manual_seed(0)
    base, tuned = auto.from_config(config), auto.from_config(config)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned", **options)
    return base, tuned, {update.parameter: update for update in weight_changes(tuned, base)}


def opened(folder, base):
    adapter = formats.open_adapter(folder, base=base)
    return adapter, {name: entry.load() for name, entry in adapter.entries.items()}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_matrix_of_the_difference(kind, options, tmp_path):
    _, _, expected = two(kind, tmp_path, **options)
    adapter, found = opened(tmp_path / "tuned", tmp_path / "base")
    matrices = {name for name, update in expected.items() if update.shape[1] > 1}
    assert found.keys() == matrices and adapter.format == "checkpoints" and adapter.scale_source is None
    assert adapter.notes == ("ΔW is the difference of two checkpoints, stored in float32 and float32",)
    for name in matrices:
        assert torch.equal(found[name].dense(), expected[name].dense())
        assert found[name].base_norm == pytest.approx(expected[name].base_norm)
        assert adapter.entries[name].shape == expected[name].shape
    layers = {layer.parameter: layer for layer in formats.load_layers(adapter)}
    assert all(
        torch.allclose(layer.svd.S, torch.linalg.svdvals(expected[name].dense().double()), atol=1e-5)
        for name, layer in layers.items()
    )


def test_old_files_one_without_its_configuration(tmp_path):
    """GPT-2's orientation is that of the base, also where the tuned one's file lies alone."""
    _, tuned, expected = two("gpt2", tmp_path)
    torch.save({"state_dict": tuned.transformer.state_dict(), "step": 3}, tmp_path / "model.ckpt")
    _, found = opened(tmp_path / "model.ckpt", tmp_path / "base")
    assert found.keys() == {name for name, update in expected.items() if update.shape[1] > 1}
    assert all(torch.equal(found[name].dense(), expected[name].dense()) for name in found)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "other.bin"])
def test_what_a_trainer_leaves_beside_weights_is_not_opened(name, tmp_path):
    _, tuned, expected = two("llama", tmp_path)
    (tmp_path / "tuned" / "model.safetensors").unlink()
    torch.save(tuned.state_dict(), tmp_path / "tuned" / name)
    for other in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "tuned" / other).write_bytes(b"a pickle")
    _, found = opened(tmp_path / "tuned", tmp_path / "base")
    assert found.keys() == {name for name, update in expected.items() if update.shape[1] > 1}


def test_precision_is_the_coarser_of_the_two(tmp_path):
    base, tuned, _ = two("llama", tmp_path)
    tuned.bfloat16().save_pretrained(tmp_path / "tuned")
    adapter, found = opened(tmp_path / "tuned", tmp_path / "base")
    assert {update.precision for update in found.values()} == {"bfloat16"}
    assert "stored in bfloat16 and float32" in adapter.notes[0]
    name = "model.layers.0.mlp.up_proj.weight"
    exact = tuned.get_parameter(name).detach().float() - base.get_parameter(name).detach()
    assert torch.equal(found[name].dense(), exact)


def test_what_only_one_has_is_said(tmp_path):
    two("llama", tmp_path)
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["score.weight"] = torch.ones(2, 16)
    tensors["position_ids"] = torch.arange(8)
    tensors["model.embed_tokens.weight"] = torch.ones(31, 16)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    adapter, found = opened(tmp_path / "tuned", tmp_path / "base")
    assert adapter.notes[1:] == (
        "only the tuned one has score.weight",
        "not floating-point numbers (quantized?): position_ids",
        "only the base has lm_head.weight",
        "other shapes in model.embed_tokens.weight",
    )
    assert len(found) == 14


def test_a_checkpoint_without_its_base(tmp_path):
    two("llama", tmp_path)
    with pytest.raises(InputError, match=r"is a full checkpoint \(21 tensors: .*untouched one, with --base"):
        formats.open_adapter(tmp_path / "tuned")


def test_two_models_that_share_nothing(tmp_path):
    two("llama", tmp_path)
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"shares no weight with the base"):
        formats.open_adapter(tmp_path / "tuned", base=tmp_path / "other.safetensors")


def test_one_weight_of_each_is_read_at_a_time(tmp_path):
    """The rest may be damaged."""
    two("llama", tmp_path)
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] = torch.full((24, 16), float("nan"))
    tensors["model.norm.weight"] = torch.ones(16)
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    adapter = formats.open_adapter(tmp_path / "tuned", base=tmp_path / "base")
    for name, entry in adapter.entries.items():
        if name == "model.layers.1.mlp.up_proj.weight":
            with pytest.raises(InputError, match=f"{name}: holds NaN or Inf"):
                entry.load()
        else:
            entry.load()


def test_the_configuration_may_say_what_the_file_does_not(tmp_path):
    """An adapter_config.json of something else does not make a checkpoint an adapter."""
    two("llama", tmp_path)
    (tmp_path / "tuned" / "adapter_config.json").write_text(json.dumps({"num_layers": 3}))
    assert formats.open_adapter(tmp_path / "tuned", base=tmp_path / "base").format == "checkpoints"
