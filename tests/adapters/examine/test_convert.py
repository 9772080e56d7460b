"""An adapter that was converted: PEFT must compute the same ΔW from it, and so must lorabench."""

import dataclasses
import json

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lorabench import cli
from lorabench.adapters.examine.convert import convert
from lorabench.config.decode import InputError
from lorabench.updates import formats
from lorabench.updates.update import Update, save_updates
from tests.wild import FIXTURES, expected_of, opened

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.lin = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (2, 3)), nn.Linear(4, 6)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)


MAKE = {
    "llama": lambda: AutoModelForCausalLM.from_config(LLAMA),
    "gpt2": lambda: AutoModelForCausalLM.from_config(GPT2),
    "convolutions": Convolutions,
}
CASES = {
    "patterns": (
        "llama",
        LoraConfig(
            r=2, lora_alpha=5, target_modules=["q_proj", "down_proj", "embed_tokens"], use_rslora=True,
            rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={"down_proj": 7},
        ),
    ),
    "conv1d": ("gpt2", LoraConfig(r=2, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "convolutions": ("convolutions", LoraConfig(r=2, lora_alpha=5, target_modules=["one", "two", "lin"])),
    "lokr": ("convolutions", LoKrConfig(r=1, alpha=3, target_modules=["two"], use_effective_conv2d=True)),
    "loha": ("llama", LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"])),
}  # fmt: skip


def save_base(kind, folder):
    torch.manual_seed(0)
    base = MAKE[kind]()
    if kind == "convolutions":
        folder.mkdir(parents=True)
        save_file(base.state_dict(), folder / "model.safetensors")
    else:
        base.save_pretrained(folder)
    return base


def save_trained(base, config, folder):
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(folder)


def changes(kind, folder):
    """What PEFT's merge of the adapter in `folder` changes in each weight."""
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(MAKE[kind](), folder).double()
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    before = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}
    merged = model.merge_and_unload()
    return {name: merged.get_submodule(name).weight.detach() - old for name, old in before.items()}


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "alone"])
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_update(case, with_base, tmp_path):
    kind, config = CASES[case]
    save_trained(save_base(kind, tmp_path / "base"), config, tmp_path / "source")
    adapter = formats.open_adapter(tmp_path / "source")
    notes = convert(adapter, tmp_path / "output", str(tmp_path / "base") if with_base else None)
    expected, found = changes(kind, tmp_path / "source"), changes(kind, tmp_path / "output")
    assert found.keys() == expected.keys() and found
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    assert any("not held against a base" in note for note in notes) != with_base
    again = formats.open_adapter(tmp_path / "output")
    assert again.entries.keys() == adapter.entries.keys() and again.scale_source == "config"
    for name, entry in adapter.entries.items():
        assert torch.allclose(again.entries[name].load().dense(), entry.load().dense(), atol=1e-5)


def test_names_of_another_wrapper_become_the_bases(tmp_path):
    """Trained on the bare model, loaded on the one with a head."""
    base = save_base("llama", tmp_path / "base")
    save_trained(base.model, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "source")
    adapter = formats.open_adapter(tmp_path / "source")
    convert(adapter, tmp_path / "output", str(tmp_path / "base"))
    found = changes("llama", tmp_path / "output")
    assert len(found) == 2
    for name, delta in found.items():
        update = adapter.entries[f"{name.removeprefix('model.')}.weight"].load()
        assert torch.allclose(delta, update.dense().double(), atol=1e-5)


def flat(folder, *names):
    """An opened adapter with names such as kohya's."""
    save_updates([Update(parameter=n, B=torch.randn(16, 2), A=torch.randn(2, 16)) for n in names], folder)
    return formats.open_adapter(folder)


def test_flat_names_are_found_in_the_base_or_refused(tmp_path):
    save_base("llama", tmp_path / "base")
    name = "lora_unet_layers_1_self_attn_q_proj.weight"
    adapter = flat(tmp_path, name)
    with pytest.raises(InputError, match=r"`_` may stand for `\.`: which module it is, only --base can tell"):
        convert(adapter, tmp_path / "output")
    convert(adapter, tmp_path / "output", str(tmp_path / "base"))
    (module,) = json.loads((tmp_path / "output" / "adapter_config.json").read_text())["target_modules"]
    assert module == "model.layers.1.self_attn.q_proj"


def test_each_of_several_models_gets_a_folder(tmp_path):
    """As diffusers keeps a pipeline's in one file."""
    names = ("unet.down.weight", "unet.up.weight", "text_encoder.q.weight")
    adapter = dataclasses.replace(flat(tmp_path, *names), format="diffusers")
    notes = convert(adapter, tmp_path / "output")
    assert "one folder a model: text_encoder, unet" in notes
    for name in names:
        model, module, _ = name.split(".")
        entry = formats.open_adapter(tmp_path / "output" / model).entries[f"{module}.weight"]
        assert torch.allclose(entry.load().dense(), adapter.entries[name].load().dense(), atol=1e-5)
    with pytest.raises(InputError, match=r"several models \(text_encoder, unet\), and the base .* is none"):
        convert(adapter, tmp_path / "other", str(tmp_path))


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("model.layers.7.self_attn.q_proj.weight", "has no such weight, or several"),
        ("lora_te_q_proj.weight", "has no such weight, or several"),
        ("model.layers.0.mlp.up_proj.weight", r"ΔW \(16, 16\), and the base's weight is \(24, 16\)"),
        ("img_attn_qkv[q].weight", "is some rows of a fused layer"),
        ("model.layers.0.self_attn.q_proj.bias", "is not the weight of a module"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(parameter, message, tmp_path):
    save_base("llama", tmp_path / "base")
    with pytest.raises(InputError, match=message):
        convert(flat(tmp_path, parameter), tmp_path / "output", str(tmp_path / "base"))
    assert not (tmp_path / "output").exists()


def test_what_is_not_two_factors_is_refused(tmp_path):
    save_updates([Update(parameter="a.weight", B=torch.randn(4, 3))], tmp_path)
    save_trained(save_base("convolutions", tmp_path / "c"), LoraConfig(r=2, target_modules=["grouped"]), tmp_path / "g")
    for folder, message in {".": "ΔW is dense", "g": "grouped convolution"}.items():
        with pytest.raises(InputError, match=f"cannot be written as PEFT exactly: .*{message}"):
            convert(formats.open_adapter(tmp_path / folder), tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_patterns_of_names_that_end_alike(tmp_path):
    """`q` is the end of `x.q`: PEFT's patterns must not mistake one for the other."""
    updates = [Update(parameter=f"{name}.weight", B=torch.randn(4, r), A=torch.randn(r, 4))
               for name, r in {"q": 3, "x.q": 2, "y.q": 2, "x.x.q": 1}.items()]  # fmt: skip
    save_updates(updates, tmp_path)
    convert(formats.open_adapter(tmp_path), tmp_path / "output")

    class Inner(nn.Module):
        def __init__(self, *inner):
            super().__init__()
            self.q = nn.Linear(4, 4, bias=False)
            for name, module in inner:
                setattr(self, name, module)

    model = Inner(("x", Inner(("x", Inner()))), ("y", Inner()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = PeftModel.from_pretrained(model, tmp_path / "output").merge_and_unload()
    for update in updates:
        delta = merged.get_parameter(update.parameter).detach() - before[update.parameter]
        assert torch.allclose(delta, update.dense(), atol=1e-5)


def test_the_command(tmp_path, capsys):
    base = save_base("llama", tmp_path / "base")
    save_trained(base, LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "source")
    arguments = ["convert", str(tmp_path / "source"), str(tmp_path / "output"), "--base", str(tmp_path / "base")]
    assert cli.main(arguments) == 0
    output = capsys.readouterr()
    assert output.out == f"{tmp_path}/output\n" and "2 layers of peft, scale: config" in output.err
    written = load_file(tmp_path / "output" / "adapter_model.safetensors")
    assert cli.main(arguments) == 2
    assert f"OUTPUT = {tmp_path}/output: is not empty" in capsys.readouterr().err
    assert load_file(tmp_path / "output" / "adapter_model.safetensors").keys() == written.keys()
    config = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def convolution(kind, folder):
    """A convolution's LoRA as diffusers and loralib write it, and its ΔW (out, in, height, width)."""
    torch.manual_seed(0)
    A, B = torch.randn(2, 4, 2, 3), torch.randn(6, 2, 1, 1)
    folder.mkdir()
    if kind == "diffusers":
        save_file({"two.lora_A.weight": A, "two.lora_B.weight": B}, folder / "pytorch_lora_weights.safetensors")
        return torch.einsum("or,rihw->oihw", B[:, :, 0, 0].double(), A.double())
    layer = loralib_convolution(out=24, width=4, kernel=2)
    torch.save({f"two.{name}": tensor for name, tensor in layer.items()}, folder / "lora.pt")
    return (layer["lora_B"] @ layer["lora_A"]).reshape(24, 4, 2, 2).double()


def loralib_convolution(out, width, kernel, r=1):
    """By `loralib.layers.ConvLoRA`."""
    shapes = {"lora_A": (r * kernel, width * kernel), "lora_B": (out * kernel, r * kernel)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {
        "conv.weight": torch.zeros(out, width, kernel, kernel)
    }


@pytest.mark.parametrize("kind", ["diffusers", "loralib"])
def test_a_convolution_has_its_kernel_without_a_base(kind, tmp_path):
    delta = convolution(kind, tmp_path / "source")
    convert(formats.open_adapter(tmp_path / "source"), tmp_path / "output")
    model = nn.Module()
    model.two = nn.Conv2d(delta.shape[1], delta.shape[0], tuple(delta.shape[2:]))
    before = model.two.weight.detach().double().clone()
    merged = PeftModel.from_pretrained(model, tmp_path / "output").double().merge_and_unload()
    assert torch.allclose(merged.two.weight - before, delta, atol=1e-5)


@pytest.mark.parametrize("name", ["diffusers_plain", "peft_pissa", "peft_whole"])
def test_the_command_tells_each_note_once(name, tmp_path, capsys):
    source = str(FIXTURES / "adapters" / name / "adapter")
    assert cli.main(["convert", source, str(tmp_path / "output")]) == 0
    told = [line.partition(": ")[2].removeprefix("note: ") for line in capsys.readouterr().err.splitlines()]
    told = [line.removeprefix(f"{source}: ") for line in told]
    notes = formats.open_adapter(source).notes
    assert notes and all(told.count(note) == 1 for note in notes) and len(told) == len(set(told))


@pytest.mark.parametrize("name", ["lycoris_lora", "lycoris_locon", "lycoris_loha", "lycoris_lokr"])
def test_kohyas_convolutions_on_their_base_are_the_librarys(name, tmp_path):
    convert(opened(name), tmp_path / "output", str(FIXTURES / "adapters" / "lycoris_dora" / "base.safetensors"))
    model = nn.Module()
    model.proj, model.conv, model.point = nn.Linear(16, 12), nn.Conv2d(8, 12, 3), nn.Conv2d(8, 8, 1)
    before = {layer: module.weight.detach().double().clone() for layer, module in model.named_children()}
    merged = PeftModel.from_pretrained(model, tmp_path / "output").double().merge_and_unload()
    expected = expected_of(name)
    assert len(expected) == 3
    for layer, old in before.items():
        delta = merged.get_submodule(layer).weight.detach() - old
        assert torch.allclose(delta.flatten(1), expected[f"lora_unet_{layer}.weight"], atol=1e-5)
