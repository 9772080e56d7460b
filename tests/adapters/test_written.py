"""Each fixture, and what each method has trained: what `convert` and `compress` write is loaded by PEFT and computes
the same, or it is refused for the reason that stands here."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel, PeftType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorabench.cli import main
from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.methods.peft import UNFIT
from lorabench.training.examples import collate, prepare
from lorabench.training.passes import forward
from lorabench.updates import formats
from lorabench.updates.formats import read_updates
from lorabench.updates.weightfile import is_embedding
from tests.conftest import make_spec
from tests.methods.test_methods import CPU, add, attach, load_base, method_spec, take_steps
from tests.methods.test_peft_bridge import TUNERS
from tests.updates.test_peftfile import write
from tests.wild import ADAPTERS, CASES, expected_of, path_of

pytestmark = pytest.mark.filterwarnings("ignore")
WRITTEN = None
MATRICES = "the matrices alone"
"""Are written: biases and norms, which two factors cannot hold, are told as left out."""
DENSE = "two factors would not be exact"
FLAT, MODELS = "`_` may stand for `.`", "holds adapters of several models"
NO_UPDATE, COMPUTATION = "changes no weight, so that there is no ΔW", "adds computation that no ΔW stands for"
NOT_PEFTS, ROTARY = "its DoRA is not PEFT's", "it permutes the rows of queries and keys"
FIXTURES = {
    "adapterhub_bert": (WRITTEN, WRITTEN),
    "adapterhub_bottleneck": ("not applicable", "not applicable"),
    "adapterhub_dora": (NOT_PEFTS, "only a part of ΔW, and the whole is not known"),
    "adapterhub_gpt2": (WRITTEN, WRITTEN),
    "adapterhub_gpt2_key": (WRITTEN, WRITTEN),
    "adapterhub_prefix": ("not applicable", "not applicable"),
    "diffusers_linear_layer": (WRITTEN, MODELS),
    "diffusers_metadata": (WRITTEN, MODELS),
    "diffusers_model": (WRITTEN, WRITTEN),
    "diffusers_plain": (WRITTEN, MODELS),
    "diffusers_processor": (WRITTEN, MODELS),
    "kohya_flux": (FLAT, FLAT),
    "kohya_unet": (FLAT, MODELS),
    "kohya_zimage": (FLAT, FLAT),
    "loralib_lora": (WRITTEN, WRITTEN),
    "loralib_weights": (DENSE, WRITTEN),
    "lycoris_dora": (WRITTEN, WRITTEN),
    "lycoris_dora_input": (WRITTEN, WRITTEN),
    "lycoris_full": (DENSE, WRITTEN),
    "lycoris_locon": (WRITTEN, WRITTEN),
    "lycoris_loha": (WRITTEN, WRITTEN),
    "lycoris_loha_tucker": (DENSE, WRITTEN),
    "lycoris_lokr": (WRITTEN, WRITTEN),
    "lycoris_lokr_both": (WRITTEN, WRITTEN),
    "lycoris_lokr_tucker": (WRITTEN, WRITTEN),
    "lycoris_lokr_whole": (DENSE, WRITTEN),
    "lycoris_lora": (WRITTEN, WRITTEN),
    "lycoris_lora_zero": (WRITTEN, WRITTEN),
    "mlx_dora": (NOT_PEFTS, WRITTEN),
    "mlx_experts": ("one of stacked experts", "one of stacked experts"),
    "mlx_lora": (WRITTEN, WRITTEN),
    "peft_adalora": (WRITTEN, WRITTEN),
    "peft_base": (DENSE, "every ΔW is 0"),
    "peft_bin": (WRITTEN, WRITTEN),
    "peft_conv1d": (WRITTEN, WRITTEN),
    "peft_dora": (WRITTEN, WRITTEN),
    "peft_embedding_conv": (WRITTEN, WRITTEN),
    "peft_ia3": (DENSE, WRITTEN),
    "peft_loha": (WRITTEN, WRITTEN),
    "peft_lokr": (WRITTEN, WRITTEN),
    "peft_lora": (WRITTEN, WRITTEN),
    "peft_patterns": (WRITTEN, WRITTEN),
    "peft_pissa": (WRITTEN, WRITTEN),
    "peft_prefix": ("not applicable", "not applicable"),
    "peft_vera": (WRITTEN, WRITTEN),
    "peft_whole": (WRITTEN, WRITTEN),
    "torchtune_alone": (ROTARY, ROTARY),
    "torchtune_dora": (ROTARY, ROTARY),
    "torchtune_lora": (ROTARY, ROTARY),
    "xlabs_flux": (WRITTEN, WRITTEN),
}
"""What `convert` and `compress` do: written, or refused with these words."""
FURTHER = {
    "LILY": {}, "FROD": {}, "PVERA": {}, "GLORA": {}, "HRA": {},
    "VBLORA": {"vector_length": 32, "num_vectors": 8},
    "UNILORA": {},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 2},
    "WAVEFT": {"n_frequency": 50},
    "GRALORA": {},
    "TINYLORA": {}, "PSOFT": {}, "PEANUT": {}, "SUPERTUNING": {}, "DEFT": {},
}  # fmt: skip
"""PEFT's other types, by the fewest fields that fit the small model."""
OF_A_METHOD = {
    "ADALORA": "adalora", "IA3": "ia3", "LN_TUNING": "layernorm", "LOKR": "lokr", "OFT": "oft",
    "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "ptuning", "VERA": "vera",
}  # fmt: skip
"""PEFT types that have a method of their own here."""
METHODS = {
    "adalora": ({}, WRITTEN, WRITTEN),
    "adapter": ({}, "is a full checkpoint", "is a full checkpoint"),
    "bitfit with head": ({}, DENSE, MATRICES),
    "full": ({}, DENSE, MATRICES),
    "head": ({}, DENSE, MATRICES),
    "hybrid": ({}, COMPUTATION, COMPUTATION),
    "ia3": ({}, DENSE, WRITTEN),
    "layernorm": ({}, "holds no change of a weight matrix", "holds no change of a weight matrix"),
    "loha": ({}, WRITTEN, WRITTEN),
    "loha with head": ({}, DENSE, MATRICES),
    "lokr": ({}, WRITTEN, WRITTEN),
    "lora": ({}, WRITTEN, WRITTEN),
    "lora with head": ({}, WRITTEN, WRITTEN),
    "lora rslora": ({"rslora": True}, WRITTEN, WRITTEN),
    "lora dora": ({"dora": True}, WRITTEN, WRITTEN),
    "lora dora with head": ({"dora": True}, WRITTEN, WRITTEN),
    "lora pissa": ({"init": "pissa"}, WRITTEN, WRITTEN),
    "lora olora": ({"init": "olora"}, WRITTEN, WRITTEN),
    "lora patterns": ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 1.0}}, WRITTEN, WRITTEN),
    "lora embeddings": ({"embeddings": True, "head": True}, WRITTEN, WRITTEN),
    "oft": ({}, DENSE, WRITTEN),
    "prefix": ({}, NO_UPDATE, NO_UPDATE),
    "prompt": ({}, NO_UPDATE, NO_UPDATE),
    "ptuning": ({}, NO_UPDATE, NO_UPDATE),
    "vera": ({}, WRITTEN, WRITTEN),
    "peft ADAMSS": ({"type": "ADAMSS", "targets": "attention", "layers": "0", "config": {"r": 4, "num_subspaces": 2}},
                    DENSE, WRITTEN),
    "peft BEFT": ({"type": "BEFT", "config": {}}, DENSE, MATRICES),
    "peft CARTRIDGE": ({"type": "CARTRIDGE", "config": {"num_virtual_tokens": 4}}, NO_UPDATE, NO_UPDATE),
    "peft LORA": ({"type": "LORA", "config": {"r": 2}}, WRITTEN, WRITTEN),
    "peft LORA bias of B": ({"type": "LORA", "config": {"r": 2, "lora_bias": True}}, WRITTEN, WRITTEN),
    "peft LORA tokens": ({"type": "LORA", "config": {"r": 2, "bias": "all", "trainable_token_indices": [1, 5]}},
                         WRITTEN, WRITTEN),
    "peft LOHA": ({"type": "LOHA", "config": {"r": 2}}, DENSE, WRITTEN),
} | {
    f"peft {kind}": ({"type": kind, "config": config}, *([NO_UPDATE] * 2 if kind == "CPT" else [DENSE, WRITTEN]))
    for kind, config in (TUNERS | FURTHER).items()
}  # fmt: skip


class Leaves(nn.Module):
    """Modules of some names, and nothing that computes through them."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        for name, weight in weights.items():
            parent: nn.Module = self
            *path, leaf = name.removesuffix(".weight").split(".")
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, leaf_of(name, weight))


def leaf_of(name, weight):
    if weight.dim() == 4:
        module: nn.Module = nn.Conv2d(weight.shape[1], len(weight), weight.shape[2:], bias=False)
    elif is_embedding(name):
        module = nn.Embedding(*weight.shape)
    elif is_conv1d(name):
        module = Conv1D(weight.shape[1], weight.shape[0])
    else:
        module = nn.Linear(weight.shape[1], len(weight), bias=False)
    module.weight.data = weight.clone().float()
    return module


def is_conv1d(name):
    return bool(re.search(r"c_(attn|fc|proj)\.weight$", name))


def stored(name, delta, like=None):
    """ΔW (out, in) in the shape of the module's weight."""
    if is_embedding(name) or is_conv1d(name):
        return delta.T
    return delta.reshape(like.shape) if like is not None else delta


def outputs(model, names):
    """What each module gives for a random input."""
    found = {}
    for name in names:
        module = model.get_submodule(name)
        weight = getattr(module, "base_layer", module).weight
        generator = torch.Generator().manual_seed(0)
        if weight.dim() == 4:
            x = torch.randn(2, weight.shape[1], 5, 5, generator=generator)
        elif isinstance(getattr(module, "base_layer", module), nn.Embedding):
            x = torch.arange(len(weight))
        else:
            x = torch.randn(3, weight.shape[0 if is_conv1d(f"{name}.weight") else 1], generator=generator)
        with torch.no_grad():
            found[name] = module(x)
    return found


def weights_of(folder, adapter):
    """The untouched weights that a fixture has, or random ones of the modules that it speaks of."""
    if folder is not None:
        return {name: w for name, w in load_file(folder).items() if name.endswith(".weight") and w.dim() > 1}
    torch.manual_seed(0)
    found = {}
    for name, entry in adapter.entries.items():
        update = entry.load()
        M, N = update.shape
        shape = (M, N // torch.Size(update.kernel).numel(), *update.kernel) if update.kernel else (M, N)
        found[name] = stored(name, torch.randn(shape))
    return found


def base_file(name):
    own = ADAPTERS / name / "base.safetensors"
    if name.startswith("peft_"):
        return ADAPTERS / "peft_base" / "model.safetensors"
    if name.startswith("lycoris_"):
        return ADAPTERS / "lycoris_dora" / "base.safetensors"
    return own if own.exists() else None


def source_of(name):
    return ADAPTERS / name if name == "peft_base" else path_of(name)


@pytest.mark.parametrize("command", ["convert", "compress"])
@pytest.mark.parametrize("name", sorted(path.name for path in ADAPTERS.iterdir()))
def test_fixture(name, command, tmp_path):
    message = FIXTURES[name][command == "compress"]
    file, alpha = base_file(name), CASES[name].alpha if name in CASES else None
    known = None if file is None else file.parent if name.startswith("peft_") else file
    if message is not WRITTEN:
        with pytest.raises(InputError, match=re.escape(message)):
            write(command, source_of(name), tmp_path / "out", known, alpha)
        assert not list(tmp_path.rglob("*.safetensors"))
        return
    written = write(command, source_of(name), tmp_path / "out", known, alpha)
    adapter = formats.open_adapter(source_of(name), base=known, alpha=alpha)
    weights = weights_of(file, adapter)
    want = {theirs(key, weights): delta for key, delta in changes(name).items()}
    checked = 0
    for folder in [path.parent for path in written.rglob("adapter_config.json")]:
        model = "" if folder == written else f"{folder.name}."
        prefix = model or ("transformer." if name == "xlabs_flux" else "")
        of_model = {key.removeprefix(prefix): w for key, w in weights.items() if key.startswith(prefix)}
        deltas = {key.removeprefix(prefix): delta for key, delta in want.items() if key.startswith(prefix)}
        names = [key.removesuffix(".weight") for key in deltas]
        tuned = {key: w + stored(key, deltas[key].to(w), w) if key in deltas else w for key, w in of_model.items()}
        loaded = PeftModel.from_pretrained(Leaves(of_model), folder).eval().get_base_model()
        found, expected = outputs(loaded, names), outputs(Leaves(tuned), names)
        untouched = outputs(Leaves(of_model), names)
        for each in names:
            torch.testing.assert_close(found[each], expected[each], atol=1e-4, rtol=1e-4, msg=each)
            assert not torch.equal(expected[each], untouched[each])
        checked += len(names)
    assert checked == len(want)


FLUX = {
    **{f"double_blocks_0_img_attn_qkv[{x}]": f"transformer_blocks.0.attn.to_{x}" for x in "qkv"},
    **{f"double_blocks_0_txt_attn_qkv[{x}]": f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"},
    **{f"single_blocks_0_linear1[{x}]": f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"},
    "double_blocks_0_img_attn_proj": "transformer_blocks.0.attn.to_out.0",
    "single_blocks_0_linear1[mlp]": "single_transformer_blocks.0.proj_mlp",
}  # fmt: skip
ZIMAGE = {f"layers_0_attention_qkv[{x}]": f"layers.0.attention.to_{x}" for x in "qkv"} | {
    "context_refiner_1_feed_forward_w1": "context_refiner.1.feed_forward.w1"
}
UNET = {
    name.replace(".", "_"): name
    for name in ("attentions.0.proj_in", "attentions.0.transformer_blocks.0.attn1.to_q",
                 "attentions.0.transformer_blocks.0.attn2.to_out.0", "resnets.0.conv1", "resnets.0.time_emb_proj")
}  # fmt: skip
FUSED = {
    "kohya_flux": {"double_blocks.0.img_attn.qkv": "qkv", "double_blocks.0.txt_attn.qkv": "qkv",
                   "single_blocks.0.linear1": ("q", "k", "v", "mlp"), "double_blocks.0.img_attn.proj": ""},
    "kohya_zimage": {"layers.0.attention.qkv": "qkv", "context_refiner.1.feed_forward.w1": ""},
}  # fmt: skip
KOHYA = {
    "flux of diffusers": ("kohya_flux", {module: [f"lora_unet_{name}"] for name, module in FLUX.items()}),
    "zimage of diffusers": ("kohya_zimage", {module: [f"lora_unet_{name}"] for name, module in ZIMAGE.items()}),
    "unet": ("kohya_unet", {f"down_blocks.0.{m}": [f"lora_unet_down_blocks_0_{name}"] for name, m in UNET.items()}),
    "text encoder": ("kohya_unet", {f"text_model.encoder.layers.0.self_attn.{x}":
                                    [f"lora_te1_encoder_layers_0_self_attn_{x}"] for x in ("q_proj", "out_proj")}),
} | {
    f"{name} as it was": (name, {
        module: [f"lora_unet_{module.replace('.', '_')}" + (f"[{part}]" if part else "") for part in parts or ("",)]
        for module, parts in modules.items()
    })
    for name, modules in FUSED.items()
}  # fmt: skip
"""Fixture, and the modules of a base: which of the library's ΔW are its rows."""


@pytest.mark.parametrize("command", ["convert", "compress"])
@pytest.mark.parametrize("case", KOHYA)
def test_kohyas_names_on_a_base(case, command, tmp_path):
    """As diffusers has its modules, or with fused ones as the first code of the model; of one of several models."""
    name, modules = KOHYA[case]
    expected = expected_of(name)
    deltas = {m: torch.cat([expected.pop(f"{part}.weight") for part in parts]) for m, parts in modules.items()}
    torch.manual_seed(0)
    weights = {f"{m}.weight": torch.randn(len(d), 4, 3, 3) if "conv1" in m else torch.randn(d.shape)
               for m, d in deltas.items()}  # fmt: skip
    save_file(weights, tmp_path / "base.safetensors")
    folder = write(command, path_of(name), tmp_path / "out", tmp_path / "base.safetensors")
    tuned = {f"{m}.weight": weights[f"{m}.weight"] + d.reshape(weights[f"{m}.weight"].shape) for m, d in deltas.items()}
    loaded = PeftModel.from_pretrained(Leaves(weights), folder).eval().get_base_model()
    found, want = outputs(loaded, modules), outputs(Leaves(tuned), modules)
    for module in modules:
        torch.testing.assert_close(found[module], want[module], atol=1e-4, rtol=1e-4, msg=module)
    assert bool(expected) == (name == "kohya_unet")  # whose other model is told


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("command", ["convert", "compress"])
def test_dora_of_a_fused_layer(command, fused, by_input, tmp_path):
    """m of each row goes with its row; of each input it is a norm over all rows, which one of three does not tell."""
    torch.manual_seed(0)
    B, A, W0 = torch.randn(24, 2), torch.randn(2, 8), torch.randn(24, 8)
    m = torch.rand((1, 8) if by_input else (24, 1)) + 1
    stem = "lora_unet_layers_0_attention_qkv"
    tensors = {f"{stem}.lora_up.weight": B, f"{stem}.lora_down.weight": A, f"{stem}.alpha": torch.tensor(4.0)}
    (tmp_path / "adapter").mkdir()
    save_file(tensors | {f"{stem}.dora_scale": m}, tmp_path / "adapter" / "lora.safetensors")
    V = W0 + 2 * B @ A
    tuned = m * V / V.norm(dim=0 if by_input else 1, keepdim=True)
    names = ["layers.0.attention.qkv"] if fused else [f"layers.0.attention.to_{x}" for x in "qkv"]
    weights = {f"{name}.weight": W for name, W in zip(names, W0.chunk(len(names)), strict=True)}
    save_file({name: W.contiguous() for name, W in weights.items()}, tmp_path / "base.safetensors")
    if by_input and (command == "convert" or not fused):
        with pytest.raises(InputError, match=f"{NOT_PEFTS}|only a part of ΔW"):
            write(command, tmp_path / "adapter", tmp_path / "out", tmp_path / "base.safetensors")
        return
    folder = write(command, tmp_path / "adapter", tmp_path / "out", tmp_path / "base.safetensors")
    loaded = PeftModel.from_pretrained(Leaves(weights), folder).eval().get_base_model()
    expected = {f"{name}.weight": W for name, W in zip(names, tuned.chunk(len(names)), strict=True)}
    for name, output in outputs(Leaves(expected), names).items():
        torch.testing.assert_close(outputs(loaded, [name])[name], output, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("command", ["convert", "compress"])
def test_of_several_models_the_base_is_one(command, tmp_path, capsys):
    weights = {f"down_blocks.0.{m}.weight": torch.zeros(4, 16 if "time" in m else 4) for m in UNET.values()}
    weights["down_blocks.0.resnets.0.conv1.weight"] = torch.zeros(4, 4, 3, 3)
    save_file(weights, tmp_path / "unet.safetensors")
    save_file({"another.weight": torch.zeros(2, 2)}, tmp_path / "none.safetensors")
    arguments = ["convert", str(path_of("kohya_unet")), str(tmp_path / "out")]
    if command == "compress":
        arguments = ["compress", arguments[1], "--output", arguments[2], "--results", str(tmp_path / "results")]
    assert main([*arguments, "--base", str(tmp_path / "unet.safetensors")]) == 0
    told = "2 layers of lora_te1 left out, such as lora_te1_encoder_layers_0_self_attn_out_proj.weight: not the base's"
    output = capsys.readouterr()
    assert told in output.out + output.err
    arguments[2 + (command == "compress")] = str(tmp_path / "other")
    assert main([*arguments, "--base", str(tmp_path / "none.safetensors")]) == 2
    assert "holds adapters of several models (lora_te1, lora_unet), and the base" in capsys.readouterr().err


def changes(name):
    """The library's own ΔW: with the untouched base's part, of DoRA."""
    whole = ADAPTERS / name / "whole.safetensors"
    if not whole.exists():
        return expected_of(name)
    return {key: delta.flatten(1).double() for key, delta in load_file(whole).items() if delta.dim() > 1}


def theirs(name, weights):
    """The base's name of a parameter that kohya names with `_` for `.`."""
    flat = {key.replace(".", "_"): key for key in weights}
    return name if name in weights else flat[re.sub(r"^lora_unet_", "", name).replace(".", "_")]


@pytest.mark.parametrize("case", METHODS)
def test_method(case, tiny_bases, labelled, tmp_path):
    """Trained here, written by both commands, loaded by PEFT on the untouched base."""
    name, _, _ = case.partition(" ")
    method, *messages = METHODS[case]
    spec = method_spec(name, "bert" if "head" in case else "llama", tiny_bases, labelled, method)
    examples = prepare(spec)
    model = attach(spec, examples)
    take_steps(spec, model, examples, 2)
    folder = tmp_path / "trained"
    folder.mkdir()
    spec.method.save(model.eval(), lambda: load_base(spec, examples), folder, "updates")
    batch = collate(examples.splits["train"][:2], examples.padding, CPU)
    with torch.no_grad():
        want, untouched = forward(model, batch), forward(load_base(spec, examples), batch)
    for command, message in zip(("convert", "compress"), messages, strict=True):
        if message not in (WRITTEN, MATRICES):
            with pytest.raises(InputError, match=re.escape(message)):
                write(command, folder, tmp_path / command)
            assert not list((tmp_path / command).rglob("*.safetensors"))
            continue
        loaded = PeftModel.from_pretrained(load_base(spec, examples), write(command, folder, tmp_path / command))
        with torch.no_grad():
            expected = want if message is WRITTEN else forward(matrices_of(folder, load_base(spec, examples)), batch)
            torch.testing.assert_close(forward(loaded.eval(), batch), expected, atol=1e-4, rtol=1e-4)
    assert (want - untouched).abs().max() > 1e-3


def in_transformers(tensors):
    """torchtune's layers by the names that transformers has, with the rows of q and k in its rotary order."""
    leaves = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    found = {}
    for name, tensor in tensors.items():
        block, _, leaf = (
            name.replace("[sBA]", "").removesuffix(".weight").replace(".attn.", ".self_attn.").rpartition(".")
        )
        heads = {"q_proj": 2, "k_proj": 1}.get(leaf)
        rows = tensor.view(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape) if heads else tensor
        found[f"model.{block}.{leaves.get(leaf, leaf)}.weight"] = rows
    return found


@pytest.mark.parametrize("command", ["convert", "compress"])
def test_torchtunes_export_in_peft_form(command, tmp_path):
    deltas = in_transformers(expected_of("torchtune_lora"))
    torch.manual_seed(0)
    weights = {name: torch.randn(delta.shape) for name, delta in deltas.items()}
    save_file(weights, tmp_path / "base.safetensors")
    folder = write(command, ADAPTERS / "torchtune_lora" / "adapter", tmp_path / "out", tmp_path / "base.safetensors")
    names = [name.removesuffix(".weight") for name in weights]
    loaded = PeftModel.from_pretrained(Leaves(weights), folder).eval().get_base_model()
    tuned = {name: weight + deltas[name].float() for name, weight in weights.items()}
    for name, output in outputs(Leaves(tuned), names).items():
        torch.testing.assert_close(outputs(loaded, [name])[name], output, atol=1e-4, rtol=1e-4, msg=name)


def matrices_of(folder, base):
    """The base with each ΔW but those of biases and norms."""
    return add(base, [update for update in read_updates(folder) if update.shape[1] > 1])


def test_every_peft_type_stands_here():
    """With a row of its own, or of the method that is it; or lorabench refuses to train it, and says why."""
    rows = {case.split()[1] for case in METHODS if case.startswith("peft ")}
    assert not rows & UNFIT.keys() and {*OF_A_METHOD.values()} <= METHODS.keys()
    assert rows | UNFIT.keys() | OF_A_METHOD.keys() == {kind.value for kind in PeftType}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_trained_here_is_refused_with_its_reason(kind):
    with pytest.raises(InputError, match=re.escape(UNFIT[kind])):
        make_spec(method={"name": "peft", "type": kind})


def test_every_method_stands_here():
    assert {case.partition(" ")[0] for case in METHODS} == {*plugins.names("methods")}
    assert FIXTURES.keys() == {path.name for path in ADAPTERS.iterdir()}
