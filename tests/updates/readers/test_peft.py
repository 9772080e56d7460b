"""Adapters that PEFT saves, against the ΔW that PEFT itself computes from them when it loads them again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from lorabench.analyses.spectrum import rounding_norm
from lorabench.config.decode import InputError
from lorabench.updates import formats

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8)
CONFIG, ADAPTER, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
pytestmark = pytest.mark.filterwarnings("ignore")


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (2, 3)), nn.Conv3d(4, 6, (1, 2, 3))
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)


def make(kind):
    torch.manual_seed(0)
    match kind:
        case "llama":
            return AutoModelForCausalLM.from_config(LLAMA)
        case "gpt2":
            return AutoModelForCausalLM.from_config(GPT2)
        case "convolutions":
            return Convolutions()


def saved(folder, kind, config, random=True):
    """Save an adapter with random parameters, as if trained, and the untouched base in `base`; the model as PEFT
    loads it again."""
    base = make(kind)
    if kind == "convolutions":
        (folder / "base").mkdir(parents=True)
        save_file(base.state_dict(), folder / "base" / "model.safetensors")
    else:
        base.save_pretrained(folder / "base")
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and random:
            parameter.data += torch.randn_like(parameter) * (0.3 if "magnitude" in name else 1)
    model.save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(make(kind), folder / "adapter").eval()


def changes(model, kind):
    """What merging the adapter changes in each weight, as (out, in), in float64."""
    model = model.double()
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    before = {name: module.get_base_layer().weight.detach().clone() for name, module in layers.items()}
    merged = model.merge_and_unload()
    found = {}
    for name, old in before.items():
        module = merged.get_submodule(name)
        delta = module.weight.detach() - old
        transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        found[f"{name}.weight"] = delta.T if transposed else delta.flatten(1)
    return found


def updates(folder, **options):
    adapter = formats.open_adapter(folder, **options)
    return adapter, {name: entry.load() for name, entry in adapter.entries.items()}


def assert_same(found, expected, atol=1e-5):
    assert found.keys() == expected.keys() and found
    for name, delta in expected.items():
        assert found[name].shape == tuple(delta.shape)
        assert torch.allclose(found[name].dense().double(), delta, atol=atol), name


LORA = {
    "llama": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"layers.1.*": 3}}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
    "convolutions": ("convolutions", {"target_modules": ["one", "two", "three"]}),
}
TUNERS = {
    "adalora": ("llama", AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, total_step=10, target_modules=["q_proj"])),
    "loha": ("llama", LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"])),
    "loha-patterns": (
        "llama",
        LoHaConfig(r=2, alpha=3, target_modules=["q_proj"], rank_pattern={"0.*": 3}, alpha_pattern={"q_proj": 5}),
    ),
    "loha-dense": ("llama", LoHaConfig(r=5, alpha=3, target_modules=["q_proj"])),
    "loha-conv": ("convolutions", LoHaConfig(r=2, alpha=3, target_modules=["one", "two"])),
    "loha-tucker": (
        "convolutions",
        LoHaConfig(r=2, alpha=3, target_modules=["one", "two"], use_effective_conv2d=True),
    ),
    "lokr": ("llama", LoKrConfig(r=1, alpha=3, target_modules=["q_proj", "down_proj"])),
    "lokr-both": ("llama", LoKrConfig(r=1, alpha=3, target_modules=["down_proj"], decompose_both=True)),
    "lokr-full": ("llama", LoKrConfig(r=8, alpha=3, target_modules=["down_proj", "q_proj"])),
    "lokr-factor": ("llama", LoKrConfig(r=2, alpha=3, target_modules=["down_proj"], decompose_factor=2)),
    "lokr-conv": ("convolutions", LoKrConfig(r=2, alpha=3, target_modules=["two"])),
    "lokr-tucker": ("convolutions", LoKrConfig(r=1, alpha=3, target_modules=["two"], use_effective_conv2d=True)),
}
NEED_BASE = {
    "vera": ("llama", VeraConfig(r=4, target_modules=["q_proj", "down_proj"], save_projection=True)),
    "ia3": ("llama", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3-conv1d": (
        "gpt2",
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
    "oft": ("llama", OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"], use_cayley_neumann=False)),
    "oft-shared": ("llama", OFTConfig(oft_block_size=8, target_modules=["q_proj"], block_share=True)),
} | {
    f"oft-neumann-{count}": (
        "llama",
        OFTConfig(oft_block_size=4, target_modules=["v_proj"], num_cayley_neumann_terms=count),
    )
    for count in (1, 2, 3, 4, 5, 7)
}


@pytest.mark.parametrize("case", LORA)
def test_lora_in_either_kind_of_file(case, tmp_path):
    kind, options = LORA[case]
    model = saved(tmp_path, kind, LoraConfig(r=2, lora_alpha=5, **options))
    expected = changes(model, kind)
    adapter, found = updates(tmp_path / "adapter")
    assert_same(found, expected)
    assert (adapter.format, adapter.scale_source, adapter.notes) == ("peft", "config", ())
    torch.save(load_file(tmp_path / "adapter" / ADAPTER), tmp_path / "adapter" / BIN)
    (tmp_path / "adapter" / ADAPTER).unlink()
    assert_same(updates(tmp_path / "adapter")[1], expected)
    assert_same(updates(tmp_path / "adapter" / BIN)[1], expected)


@pytest.mark.parametrize("case", LORA)
def test_dora_is_what_peft_merges_where_the_base_is_given(case, tmp_path):
    kind, options = LORA[case]
    if kind == "llama":  # PEFT cannot merge DoRA on an embedding in float64
        options = options | {"target_modules": ["q_proj", "o_proj"]}
    model = saved(tmp_path, kind, LoraConfig(r=2, lora_alpha=5, use_dora=True, **options))
    expected = changes(model, kind)
    adapter, found = updates(tmp_path / "adapter", base=tmp_path / "base")
    parts = {name: found.pop(name) for name in list(found) if "[sBA]" in name}
    assert_same(found, expected)
    assert adapter.notes == () and len(parts) == len(found)
    alone, only_parts = updates(tmp_path / "adapter")
    assert alone.notes == ("DoRA: ΔW needs W0; this is its s B A; give --base",)
    assert only_parts.keys() == parts.keys() and all(update.part == "sBA" for update in only_parts.values())


def test_dora_of_an_embedding_is_what_peft_computes(tmp_path):
    model = saved(tmp_path, "llama", LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=["embed_tokens"]))
    layer = model.get_base_model().model.embed_tokens
    before = layer.get_base_layer().weight.detach().double().clone()
    tokens = torch.arange(len(before))
    with torch.no_grad():
        expected = layer(tokens).double() - before
    _, found = updates(tmp_path / "adapter", base=tmp_path / "base")
    assert torch.allclose(found["model.embed_tokens.weight"].dense().double(), expected.T, atol=1e-5)


def test_dora_that_was_not_trained_changes_nothing(tmp_path):
    saved(tmp_path, "llama", LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), random=False)
    _, found = updates(tmp_path / "adapter", base=tmp_path / "base")
    whole = [update for update in found.values() if update.part is None]
    assert len(whole) == 2 and all(update.dense().abs().max() < 1e-7 for update in whole)
    base = dict(make("llama").named_parameters())
    assert all(update.base_norm == pytest.approx(float(base[update.parameter].norm())) for update in whole)


def test_doras_magnitudes_say_how_exact_its_change_is(tmp_path):
    saved(tmp_path, "llama", LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), random=False)
    file = tmp_path / "adapter" / ADAPTER
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    _, found = updates(tmp_path / "adapter", base=tmp_path / "base")
    for update in (update for update in found.values() if update.part is None):
        assert update.precision == "bfloat16"
        noise = rounding_norm(update.base_norm, update.precision)  # of rows' norms, not of entries: to a factor
        assert noise / 2 < float(update.dense().norm()) < 2 * noise


@pytest.mark.parametrize("case", TUNERS)
def test_other_tuners(case, tmp_path):
    kind, config = TUNERS[case]
    model = saved(tmp_path, kind, config)
    adapter, found = updates(tmp_path / "adapter")
    assert_same(found, changes(model, kind), atol=1e-4)
    assert adapter.format == f"peft {config.peft_type.value}"


@pytest.mark.parametrize("case", NEED_BASE)
def test_tuners_whose_update_needs_the_base(case, tmp_path):
    kind, config = NEED_BASE[case]
    model = saved(tmp_path, kind, config)
    with pytest.raises(InputError, match=r"its ΔW needs the base: give --base"):
        formats.open_adapter(tmp_path / "adapter")
    assert_same(updates(tmp_path / "adapter", base=tmp_path / "base")[1], changes(model, kind), atol=1e-4)


def test_factored_where_that_is_smaller(tmp_path):
    saved(tmp_path / "loha", "llama", TUNERS["loha"][1])
    saved(tmp_path / "lokr", "llama", TUNERS["lokr-factor"][1])
    assert {update.A.shape[0] for update in updates(tmp_path / "loha" / "adapter")[1].values()} == {4}
    assert {update.A.shape[0] for update in updates(tmp_path / "lokr" / "adapter")[1].values()} == {4}


def test_vera_without_its_shared_matrices(tmp_path):
    saved(tmp_path, "llama", VeraConfig(r=4, target_modules=["q_proj"], save_projection=False))
    with pytest.raises(InputError, match=r"no shared A and B \(VeRA with save_projection = false\)"):
        formats.open_adapter(tmp_path / "adapter", base=tmp_path / "base")


def test_a_grouped_convolution_is_what_the_layer_adds(tmp_path):
    """PEFT cannot merge one: its forward pass is the oracle."""
    model = saved(tmp_path, "convolutions", LoraConfig(r=4, lora_alpha=6, target_modules=["grouped"]))
    adapter, found = updates(tmp_path / "adapter")
    (update,) = found.values()
    x = torch.randn(2, 4, 5, 5)
    layer = model.get_base_model().grouped
    added = layer(x) - layer.get_base_layer()(x)
    ours = nn.functional.conv2d(x, update.dense().reshape(6, 4, 3, 3))
    assert torch.allclose(added, ours, atol=1e-5) and "grouped" in adapter.notes[0]


@pytest.mark.parametrize("place", ["adapter/init", "pissa_init"])
def test_pissa_with_its_initial_adapter(place, tmp_path):
    """As in PEFT's example: W_residual + s B A is what is computed, and W0 = W_residual + s B0 A0."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa", use_rslora=True)
    base = make("llama")
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / place)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    if place == "pissa_init":
        shutil.copytree(tmp_path / "adapter", tmp_path / "alone" / "adapter")
        with pytest.raises(InputError, match=r"init_lora_weights = pissa: ΔW needs the initial factors"):
            formats.open_adapter(tmp_path / "alone" / "adapter")
    adapter, found = updates(tmp_path / "adapter")
    merged = dict(model.merge_and_unload().named_parameters())
    assert_same(found, {name: (merged[name] - weights[name]).detach().double() for name in found}, atol=1e-4)
    assert "initial factors from" in adapter.notes[0] and len(found) == 2


@pytest.mark.parametrize("config", [PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
                                    PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")])  # fmt: skip
def test_a_prompt_has_no_update(config, tmp_path):
    get_peft_model(make("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"not applicable: {config.peft_type.value} changes no weight"):
        formats.open_adapter(tmp_path)


def test_weights_that_were_saved_whole_need_the_base(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    saved(tmp_path, "llama", config)
    adapter, found = updates(tmp_path / "adapter")
    assert "lm_head.weight" not in found and "saved whole" in adapter.notes[0] and "lm_head" in adapter.notes[0]
    adapter, found = updates(tmp_path / "adapter", base=tmp_path / "base")
    tuned = load_file(tmp_path / "adapter" / ADAPTER)["base_model.model.lm_head.weight"]
    before = make("llama").lm_head.weight.detach()
    assert torch.allclose(found["lm_head.weight"].dense(), tuned - before) and adapter.notes == ()


def test_several_adapters_in_one_folder(tmp_path):
    model = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    adapter, found = updates(tmp_path)
    assert all("q_proj" in name for name in found)
    assert adapter.notes == (f"more adapters in sub-folders: other (open {tmp_path}/other)",)
    assert all("v_proj" in name for name in updates(tmp_path / "other")[1])
    (tmp_path / ADAPTER).unlink()
    (tmp_path / CONFIG).unlink()
    with pytest.raises(InputError, match=rf"holds adapters in sub-folders: other; open one, as {tmp_path}/other"):
        formats.open_adapter(tmp_path)
    with pytest.raises(InputError, match=f"no such file or folder; {tmp_path} has the adapters other"):
        formats.open_adapter(tmp_path / "othr")


def test_a_file_without_its_configuration(tmp_path):
    model = saved(tmp_path, "llama", LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"]))
    (tmp_path / "adapter" / CONFIG).unlink()
    adapter, found = updates(tmp_path / "adapter", alpha=5)
    assert_same(found, changes(model, "llama"))
    assert adapter.scale_source == "--alpha"
    adapter, guessed = updates(tmp_path / "adapter" / ADAPTER)
    name = next(iter(found))
    assert adapter.scale_source == "assumed" and "taken for 1" in adapter.notes[0]
    assert torch.allclose(guessed[name].dense() * 2.5, found[name].dense(), atol=1e-5)


def test_biases_are_noted(tmp_path):
    saved(tmp_path, "llama", LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    assert formats.open_adapter(tmp_path / "adapter").notes == (
        "lora_bias: the change of the biases is not part of ΔW",
    )


def test_what_is_left_out_is_noted(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 3]})
    saved(tmp_path, "llama", config)
    (note,) = formats.open_adapter(tmp_path / "adapter").notes
    assert note.startswith("trainable_token_indices: ")
    tensors = load_file(tmp_path / "adapter" / ADAPTER)
    tensors["base_model.model.x.lora_A.other.weight"] = torch.ones(2, 3)
    save_file(tensors, tmp_path / "adapter" / ADAPTER)
    note = formats.open_adapter(tmp_path / "adapter").notes[-1]
    assert note == "1 tensor left out, such as base_model.model.x.lora_A.other.weight"


def test_dora_without_its_configuration_is_refused(tmp_path):
    saved(tmp_path, "llama", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    (tmp_path / "adapter" / CONFIG).unlink()
    with pytest.raises(InputError, match=r"holds DoRA's magnitudes, and no adapter_config\.json"):
        formats.open_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": {"(a+)+b": 2}}, "repeated group"),
        ({"rank_pattern": ["q_proj"]}, "must give a number for each pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, "must give a number for each pattern"),
        ({"r": True}, "r = True: must be a whole number"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf: must be a number"),
    ],
)
def test_a_configuration_with_wrong_types(change, message, tmp_path):
    saved(tmp_path, "llama", LoraConfig(r=2, target_modules=["q_proj"]))
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        formats.open_adapter(tmp_path / "adapter")


FIXTURES = Path(__file__).parents[2] / "fixtures" / "adapters"
OWN_FORMAT = {"adalora", "loha", "lokr", "vera", "ia3"}


@pytest.mark.parametrize("case", sorted(path.parent.name for path in FIXTURES.glob("peft_*/expected.safetensors")))
def test_kept_files_of_peft(case):
    """Made by `tests/fixtures/make_peft.py`."""
    expected = load_file(FIXTURES / case / "expected.safetensors")
    adapter, found = updates(FIXTURES / case / "adapter", base=FIXTURES / "peft_base")
    whole = {name: update for name, update in found.items() if update.part is None}
    assert_same(whole, expected, atol=1e-4)
    kind = case.removeprefix("peft_")
    assert adapter.format == (f"peft {kind.upper()}" if kind in OWN_FORMAT else "peft")


def test_a_kept_prefix_of_peft():
    with pytest.raises(InputError, match="not applicable: PREFIX_TUNING"):
        formats.open_adapter(FIXTURES / "peft_prefix" / "adapter")
