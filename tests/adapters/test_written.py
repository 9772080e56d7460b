"""Each fixture, and what each method has trained: what `convert` and `compress` write is loaded by PEFT and computes
the same, or it is refused for the reason that stands here."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel, PeftType
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.methods.peft import UNFIT
from lorabench.training.evaluation import forward
from lorabench.training.examples import collate, prepare
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
DENSE, CONV = "two factors would not be exact", "is a convolution; only linear layers"
FLAT, MODELS = "`_` may stand for `.`", "names its modules by the model that they are in"
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
    "diffusers_model": (WRITTEN, CONV),
    "diffusers_plain": (WRITTEN, MODELS),
    "diffusers_processor": (WRITTEN, MODELS),
    "kohya_flux": (FLAT, FLAT),
    "kohya_unet": (FLAT, FLAT),
    "kohya_zimage": (FLAT, FLAT),
    "loralib_lora": (WRITTEN, WRITTEN),
    "loralib_weights": (DENSE, CONV),
    "lycoris_dora": (WRITTEN, FLAT),
    "lycoris_dora_input": (WRITTEN, FLAT),
    "lycoris_full": (DENSE, FLAT),
    "lycoris_locon": (WRITTEN, FLAT),
    "lycoris_loha": (WRITTEN, FLAT),
    "lycoris_loha_tucker": (DENSE, FLAT),
    "lycoris_lokr": (WRITTEN, FLAT),
    "lycoris_lokr_both": (WRITTEN, FLAT),
    "lycoris_lokr_tucker": (WRITTEN, FLAT),
    "lycoris_lokr_whole": (DENSE, FLAT),
    "lycoris_lora": (WRITTEN, FLAT),
    "lycoris_lora_zero": (WRITTEN, FLAT),
    "mlx_dora": (NOT_PEFTS, WRITTEN),
    "mlx_experts": ("one of stacked experts", "one of stacked experts"),
    "mlx_lora": (WRITTEN, WRITTEN),
    "peft_adalora": (WRITTEN, WRITTEN),
    "peft_base": (DENSE, CONV),
    "peft_bin": (WRITTEN, WRITTEN),
    "peft_conv1d": (WRITTEN, WRITTEN),
    "peft_dora": (WRITTEN, CONV),
    "peft_embedding_conv": (WRITTEN, CONV),
    "peft_ia3": (DENSE, WRITTEN),
    "peft_loha": (WRITTEN, CONV),
    "peft_lokr": (WRITTEN, CONV),
    "peft_lora": (WRITTEN, WRITTEN),
    "peft_patterns": (WRITTEN, WRITTEN),
    "peft_pissa": (WRITTEN, WRITTEN),
    "peft_prefix": ("not applicable", "not applicable"),
    "peft_vera": (WRITTEN, WRITTEN),
    "peft_whole": (WRITTEN, WRITTEN),
    "torchtune_alone": (ROTARY, ROTARY),
    "torchtune_dora": (ROTARY, ROTARY),
    "torchtune_lora": (ROTARY, ROTARY),
    "xlabs_flux": (WRITTEN, MODELS),
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


def matrices_of(folder, base):
    """The base with each ΔW but those of biases and norms."""
    return add(base, [update for update in read_updates(folder) if update.shape[1] > 1])


def test_every_peft_type_stands_here():
    """With a row of its own, or of the method that is it; or lorabench refuses to train it, and says why."""
    rows = {kind for case in METHODS for name, _, kind in [case.partition(" ")] if name == "peft"}
    assert not rows & UNFIT.keys() and {*OF_A_METHOD.values()} <= METHODS.keys()
    assert rows | UNFIT.keys() | OF_A_METHOD.keys() == {kind.value for kind in PeftType}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_trained_here_is_refused_with_its_reason(kind):
    with pytest.raises(InputError, match=re.escape(UNFIT[kind])):
        make_spec(method={"name": "peft", "type": kind})


def test_every_method_stands_here():
    assert {case.partition(" ")[0] for case in METHODS} == {*plugins.names("methods")}
    assert FIXTURES.keys() == {path.name for path in ADAPTERS.iterdir()}
