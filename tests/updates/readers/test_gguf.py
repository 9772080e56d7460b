"""GGUF adapters, written by the `gguf` package as llama.cpp's conversion does, against the ΔW they are made of."""

import json
import re
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorabench.config.decode import InputError
from lorabench.updates import formats
from lorabench.updates.readers.gguf import PERMUTED, PLAIN
from tests.updates.test_peftfile import write as write_peft

HEADS = {"q": 4, "k": 2}
WIDTH = 6
"""Of a head."""


def factors(rows, columns=16, rank=2):
    return torch.randn(rows, rank), torch.randn(rank, columns)


def rotated_together(rows, heads):
    """Rows in llama.cpp's order: transformers rotates i with i + d / 2 of a head, llama.cpp neighbours."""
    half = rows // heads // 2
    pairs = [(head * 2 * half + i, head * 2 * half + i + half) for head in range(heads) for i in range(half)]
    return [row for pair in pairs for row in pair]


def write(file, tensors, architecture="llama", alpha=8.0, kind=None):
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        data = tensor.numpy()
        writer.add_tensor(name, data if kind is None else gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama(folder, **options):
    """The file, and ΔW by transformers' names; the base beside it, of which only names and heads count."""
    torch.manual_seed(0)
    rows = {"q": HEADS["q"] * WIDTH, "k": HEADS["k"] * WIDTH, "v": HEADS["k"] * WIDTH}
    tensors, expected = {}, {}
    for block in (0, 11):
        for which, count in rows.items():
            B, A = factors(count)
            expected[f"model.layers.{block}.self_attn.{which}_proj.weight"] = 4 * B @ A
            order = rotated_together(count, HEADS[which]) if which in HEADS else range(count)
            tensors |= {
                f"blk.{block}.attn_{which}.weight.lora_a": A,
                f"blk.{block}.attn_{which}.weight.lora_b": B[order],
            }
    B, A = factors(16, 30)
    expected["model.embed_tokens.weight"] = 4 * B @ A
    tensors |= {"token_embd.weight.lora_a": A.T.contiguous(), "token_embd.weight.lora_b": B}
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(
        json.dumps({"num_attention_heads": HEADS["q"], "num_key_value_heads": HEADS["k"]})
    )
    save_file({name: torch.zeros(1) for name in expected}, base / "model.safetensors")
    return write(folder / "lora.gguf", tensors, **options), expected


def test_rows_of_queries_and_keys_are_those_of_transformers(tmp_path):
    file, expected = llama(tmp_path)
    adapter = formats.open_adapter(file, base=tmp_path / "base")
    assert (adapter.format, adapter.scale_source, adapter.notes) == ("gguf", "file", ())
    assert adapter.entries.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.allclose(adapter.entries[name].load().dense(), delta, atol=1e-5), name


def test_the_order_is_that_of_the_rotary_embedding():
    """Neighbours turned in llama.cpp's order are halves turned in transformers' (`apply_rotary_pos_emb`)."""

    def rotate_half(x):
        return torch.cat([-x[WIDTH // 2 :], x[: WIDTH // 2]])

    x, angles = torch.randn(WIDTH), torch.randn(WIDTH // 2)
    theirs = x * torch.cat([angles, angles]).cos() + rotate_half(x) * torch.cat([angles, angles]).sin()
    pairs = torch.view_as_complex(x[rotated_together(WIDTH, 1)].reshape(-1, 2))
    ours = torch.view_as_real(pairs * torch.polar(torch.ones(WIDTH // 2), angles)).flatten()
    assert torch.allclose(theirs[rotated_together(WIDTH, 1)], ours, atol=1e-6)


def test_without_a_base_the_order_stays_and_is_noted(tmp_path):
    _, expected = llama(tmp_path)
    adapter = formats.open_adapter(tmp_path / "lora.gguf")
    assert "rows of q and k in 4 layers are in llama.cpp's rotary order" in adapter.notes[0]
    layers = {layer.parameter: layer.svd for layer in formats.load_layers(adapter)}
    assert {name for name in layers if not name.startswith("blk.")} == {
        n for n in expected if "q_p" not in n and "k_p" not in n
    }
    exact = torch.linalg.svdvals(expected["model.layers.11.self_attn.q_proj.weight"])[:2]
    assert torch.allclose(layers["blk.11.attn_q.weight"].S.float(), exact, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("someone's", {}), ("internlm2", {}), ("xverse", {}), ("deci", {"num_key_value_heads_per_layer": [2, 4]})],
)
def test_rows_that_are_not_certain_are_never_given_the_models_names(architecture, config, tmp_path):
    """An unknown architecture, or heads that one number does not tell: nothing is guessed, and nothing written."""
    file, expected = llama(tmp_path, architecture=architecture)
    base = tmp_path / "base"
    told = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(told | config))
    adapter = formats.open_adapter(file, base=base)
    rotary = {f"blk.{block}.attn_{which}.weight" for block in (0, 11) for which in "qk"}
    assert {name for name in adapter.entries if "attn_q" in name or "attn_k" in name} == rotary
    assert not {name for name in expected if re.search("[qk]_proj", name)} & adapter.entries.keys() and adapter.notes
    for command in ("convert", "compress"):
        with pytest.raises(InputError, match=r"is llama\.cpp's name"):
            write_peft(command, file, tmp_path / command, base)


@pytest.mark.parametrize("architecture", PERMUTED + PLAIN)
def test_architectures_are_llama_cpps(architecture):
    assert architecture in gguf.MODEL_ARCH_NAMES.values()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_quantized_factors(kind, tmp_path):
    torch.manual_seed(0)
    B, A = torch.randn(64, 32), torch.randn(32, 96)
    tensors = {"blk.0.ffn_up.weight.lora_a": A, "blk.0.ffn_up.weight.lora_b": B}
    write(tmp_path / "x.gguf", tensors, "qwen2", alpha=32.0, kind=gguf.GGMLQuantizationType[kind])
    adapter = formats.open_adapter(tmp_path)
    update = adapter.entries["model.layers.0.mlp.up_proj.weight"].load()
    assert float((update.dense() - B @ A).norm() / (B @ A).norm()) < 2e-2 and update.scale == 1.0


def test_stacked_experts_and_what_is_left_out(tmp_path):
    torch.manual_seed(0)
    B, A = torch.randn(3, 6, 2), torch.randn(3, 2, 8)
    tensors = {"blk.0.ffn_up_exps.weight.lora_a": A, "blk.0.ffn_up_exps.weight.lora_b": B}
    write(tmp_path / "x.gguf", tensors | {"blk.0.attn_norm.weight": torch.ones(8)}, "qwen3moe", alpha=None)
    adapter = formats.open_adapter(tmp_path, alpha=4)
    assert [*adapter.entries] == [f"model.layers.0.mlp.experts.up_proj[{e}].weight" for e in range(3)]
    for e, entry in enumerate(adapter.entries.values()):
        assert torch.allclose(entry.load().dense(), 2 * B[e] @ A[e], atol=1e-5)
    assert adapter.left_out == ("blk.0.attn_norm.weight",) and adapter.scale_source == "--alpha"


def test_a_model_is_no_adapter(tmp_path):
    write(tmp_path / "x.gguf", {"blk.0.attn_q.weight": torch.ones(4, 4)})
    with pytest.raises(InputError, match=r"holds no LoRA factors .*: a model"):
        formats.open_adapter(tmp_path / "x.gguf")


def test_damaged_files(tmp_path):
    """Nothing but an InputError, whichever byte is wrong or missing; and no count is believed."""
    file, _ = llama(tmp_path)
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    damaged = [whole[: int(size)] for size in generator.integers(0, len(whole), 20)]
    for place, byte in zip(generator.integers(0, 3000, 80), generator.integers(0, 256, 80), strict=True):
        damaged.append(whole[:place] + bytes([byte]) + whole[place + 1 :])
    damaged += [whole[:8] + struct.pack("<Q", 2**60) + whole[16:], whole[:16] + struct.pack("<Q", 2**60) + whole[24:]]
    nested = struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 9, 2**60) * 2
    damaged.append(whole[:8] + struct.pack("<QQ", 0, 1) + nested)
    for data in damaged:
        file.write_bytes(data)
        try:
            list(formats.load_layers(formats.open_adapter(file)))
        except InputError as error:
            assert str(error).startswith(str(tmp_path)) and len(str(error)) < 600
