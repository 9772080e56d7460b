"""What `convert` and `compress` write, loaded by PEFT on the base: the same logits as the adapter itself gives."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    ViTConfig,
)

from lorabench.adapters.compression.compress import compress
from lorabench.adapters.compression.compressible import open_subject
from lorabench.adapters.examine.convert import convert
from lorabench.config.decode import InputError
from lorabench.store.store import Store
from lorabench.updates import formats
from lorabench.updates.peftfile import carried
from lorabench.updates.readers._peft_forms import FORMS
from tests.adapters.compression.test_truncation import best

pytestmark = pytest.mark.filterwarnings("ignore")
FILE, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30,
         "initializer_range": 0.3}  # fmt: skip
MOE = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2, "num_hidden_layers": 1}
WITHOUT_WORDS = {key: value for key, value in SIZES.items() if key != "vocab_size"}
MODELS = {
    "qwen": (AutoModelForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)),
    "tied": (AutoModelForCausalLM, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8)),
    "llama": (AutoModelForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=1)),
    "bert": (AutoModelForSequenceClassification, BertConfig(**SIZES, num_labels=3)),
    "moe": (AutoModelForCausalLM, Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=12)),
    "vit": (AutoModelForImageClassification, ViTConfig(**WITHOUT_WORDS, image_size=4, patch_size=2, num_labels=3)),
    "mixtral": (AutoModelForCausalLM, MixtralConfig(**MOE, num_local_experts=3)),
}
LORA = {"r": 2, "lora_alpha": 5, "init_lora_weights": False}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "plain": ("qwen", LoraConfig(**LORA, target_modules=["q_proj", "down_proj"])),
    "patterns": ("qwen", LoraConfig(**LORA, target_modules=["q_proj", "down_proj"], use_rslora=True,
                                    rank_pattern={"0.self_attn.q_proj": 3}, alpha_pattern={"down_proj": 7})),
    "biases": ("qwen", LoraConfig(**LORA, target_modules=["o_proj"], bias="lora_only")),
    "all biases": ("qwen", LoraConfig(**LORA, target_modules=["o_proj"], bias="all")),
    "bias of B": ("qwen", LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], lora_bias=True)),
    "norms": ("qwen", LoraConfig(**LORA, target_modules=["o_proj"], modules_to_save=["norm"])),
    "head": ("qwen", LoraConfig(**LORA, target_modules=["o_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "classifier": ("bert", LoraConfig(**LORA, target_modules=["query"], task_type="SEQ_CLS")),
    "replicated": ("llama", LoraConfig(**LORA, target_modules=["o_proj"], layer_replication=[[0, 2], [1, 2]])),
    "tokens": ("qwen", LoraConfig(**LORA, target_modules=["o_proj"], trainable_token_indices={"embed_tokens": [3]})),
    "embeddings": ("qwen", LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens"])),
    "tied": ("tied", LoraConfig(**LORA, target_modules=["c_attn", "wte"], fan_in_fan_out=True)),
    "experts": ("moe", LoraConfig(**LORA, target_modules=["o_proj"], target_parameters=EXPERTS,
                                  rank_pattern={"experts.down_proj": 3})),
    "adalora": ("qwen", AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["o_proj"], bias="lora_only")),
    "a convolution among embeddings": ("vit", LoraConfig(**LORA, target_modules=["projection"])),
    "dora": ("qwen", LoraConfig(**LORA, target_modules=["o_proj", "q_proj"], use_dora=True)),
    "dora on Conv1D": ("tied", LoraConfig(**LORA, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)),
}  # fmt: skip
TOKENS = torch.arange(6)[None]


def base(kind):
    torch.manual_seed(0)
    cls, config = MODELS[kind]
    return cls.from_config(copy.deepcopy(config)).eval()  # PEFT's replication changes it


def logits(model):
    images = model.config.model_type == "vit"
    with torch.no_grad():
        return model.eval()(torch.arange(48.0).reshape(1, 3, 4, 4) / 48 if images else TOKENS).logits


def move(model):
    """Change all that it trains, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(case)`: the folders of base and adapter, and the trained model's logits; made once."""
    found = {}

    def make(case):
        if case not in found:
            kind, config = CASES[case]
            folder = tmp_path_factory.mktemp("made")
            model = base(kind)
            model.save_pretrained(folder / "base")
            model = get_peft_model(model, copy.deepcopy(config))
            move(model)
            model.save_pretrained(folder / "adapter", save_embedding_layers=case == "embeddings")
            found[case] = folder, logits(model)
        return found[case]

    return make


def write(command, source, output, base_folder=None, alpha=None, energy=1.0):
    if command == "convert":
        adapter = formats.open_adapter(source, base=base_folder, alpha=alpha)
        convert(adapter, output, base_folder and str(base_folder))
        return output
    store = Store(output)
    (_, record) = compress(
        store, open_subject(store, str(source), base=base_folder, alpha=alpha), [energy], "cpu", lambda _: None
    )
    return store.root / "compressions" / record["compression_id"] / "adapter"


@pytest.mark.parametrize("command", ["convert", "compress"])
@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_source(case, command, made, tmp_path):
    folder, want = made(case)
    needs_base = case.startswith("dora") and command == "compress"
    for name in ("base", "alone")[: 1 if needs_base else 2]:
        known = str(folder / "base") if name == "base" else None
        written = write(command, folder / "adapter", tmp_path / name, known)
        found = logits(PeftModel.from_pretrained(base(CASES[case][0]), written))
        torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-4)
        assert (want - logits(base(CASES[case][0]))).abs().max() > 1e-2


def with_names(source, folder, rename, **fields):
    """A copy of an adapter with other names of its tensors, and further fields of its configuration."""
    folder.mkdir()
    save_file({rename(name): tensor for name, tensor in load_file(source / FILE).items()}, folder / FILE)
    config = json.loads((source / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("command", ["convert", "compress"])
def test_fields_are_carried_and_modules_named_in_full(command, made, tmp_path):
    folder, _ = made("norms")
    fields = {"alora_invocation_tokens": [7, 3], "of_a_later_version": {"a": 1}}
    source = with_names(folder / "adapter", tmp_path / "source", lambda name: name, **fields)
    config = json.loads((write(command, source, tmp_path / "out") / CONFIG).read_text())
    assert {key: config[key] for key in fields} == fields
    norms = {name.removesuffix(".weight") for name, _ in base("qwen").named_parameters() if "norm" in name}
    assert {*config["modules_to_save"]} == norms and len(norms) == 5
    assert not {"exclude_modules", "layers_to_transform", "loftq_config"} & config.keys()


@pytest.mark.parametrize("kind", FORMS)
def test_of_another_tuner_all_is_carried_but_what_is_its_own(kind):
    """So that a field of a later version is, and none that LoRA would not know."""
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]])}
    kept = carried(dict.fromkeys(fields, 1) | {"peft_type": kind, "of_a_later_version": {"a": 1}})
    assert kept.pop("of_a_later_version") == {"a": 1}
    assert kept.keys() <= {field.name for field in dataclasses.fields(LoraConfig)}
    assert {"task_type", "base_model_name_or_path"} <= kept.keys()


@pytest.mark.parametrize("command", ["convert", "compress"])
@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.base_model.model.", "base_model.model._orig_mod.", "module.base_model.model."]
)
def test_no_wrapper_is_in_what_is_written(wrapper, command, made, tmp_path):
    folder, want = made("all biases")
    source = with_names(folder / "adapter", tmp_path / "source", lambda n: n.replace(PREFIX, wrapper.format(PREFIX)))
    written = write(command, source, tmp_path / "out")
    assert load_file(written / FILE).keys() >= load_file(folder / "adapter" / FILE).keys()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base("qwen"), written)), want, atol=2e-5, rtol=1e-4)


def expert_deltas(model):
    """PEFT's ΔW of each stack of experts, (E, M, N)."""
    wrappers = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    return {module.parameter_name: module.get_delta_weight("default").detach() for module in wrappers}


def test_each_expert_is_cut_by_itself(made, tmp_path):
    """All of a stack have the rank of the largest, and one that no token was sent to is there too."""
    folder, _ = made("experts")
    tensors = load_file(folder / "adapter" / FILE)
    B = next(name for name in tensors if name.endswith("experts.lora_B.weight"))
    tensors[B] = tensors[B].reshape(-1, 3, 4) * torch.tensor([1.0, 1, 0, 1])
    source = with_names(folder / "adapter", tmp_path / "source", lambda name: name)
    save_file(tensors | {B: tensors[B].flatten(1).contiguous()}, source / FILE)
    before = expert_deltas(PeftModel.from_pretrained(base("moe"), source))
    written = write("compress", source, tmp_path / "out", energy=0.6)
    after = expert_deltas(PeftModel.from_pretrained(base("moe"), written))
    ranks = [[best(each.double().numpy(), 0.6)[1] if each.any() else 1 for each in stack] for stack in before.values()]
    assert before.keys() == after.keys() == {"gate_up_proj", "down_proj"} and len({*ranks[0], *ranks[1]}) > 1
    for name, stack in before.items():
        for e, delta in enumerate(stack):
            expected = best(delta.double().numpy(), 0.6)[0] if delta.any() else torch.zeros_like(delta)
            torch.testing.assert_close(
                after[name][e].double(), torch.as_tensor(expected).double(), atol=1e-5, rtol=1e-4
            )
    assert any(not delta.any() for stack in before.values() for delta in stack)


LOST = {
    "norms and biases": {"modules_to_save": ["norm", "lm_head"], "bias": "all"},
    "bias of B": {"lora_bias": True},
    "tokens": {"trainable_token_indices": [1, 4]},
}


@pytest.mark.parametrize("command", ["convert", "compress"])
@pytest.mark.parametrize("case", LOST)
def test_a_lost_configuration_is_told_by_the_tensors_or_missed(case, command, tmp_path):
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj", "o_proj"], **LOST[case])
    model = get_peft_model(base("qwen"), config)
    move(model)
    model.save_pretrained(tmp_path / "lost")
    want = logits(model)
    (tmp_path / "lost" / CONFIG).unlink()
    if case == "tokens":
        with pytest.raises(
            InputError, match=r"trainable_tokens_delta: of which tokens these are the rows, only adapter"
        ):
            write(command, tmp_path / "lost", tmp_path / "out")
        return
    (tmp_path / "lost" / FILE).rename(tmp_path / "lost" / "mine.safetensors")
    written = write(command, tmp_path / "lost", tmp_path / "out")
    config = json.loads((written / CONFIG).read_text())
    assert (config["bias"], config.get("lora_bias")) == (("all", False) if case != "bias of B" else ("none", True))
    loaded = PeftModel.from_pretrained(base("qwen"), written)
    torch.testing.assert_close(logits(loaded), want, atol=2e-5, rtol=1e-4)
    assert bool(config["modules_to_save"]) == (case == "norms and biases")


def flat(name, head, infix):
    module, _, factor = name.removeprefix(PREFIX).partition(".lora_")
    return f"{head}lora_unet_{module.replace('.', '_')}.lora_{factor.replace('.weight', infix + '.weight')}"


FLAT = {
    "adapter's name": lambda name: flat(name, "_orig_mod.", ".default"),
    "PEFT's prefix": lambda name: flat(name, "base_model.model._orig_mod.", ".mine"),
    "kohya, distributed": lambda name: flat(name, "module.", "").replace("lora_A", "lora_down").replace(
        "lora_B", "lora_up"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["convert", "compress"])
@pytest.mark.parametrize("case", FLAT)
def test_wrappers_and_an_adapters_name_around_flat_names(case, command, made, tmp_path):
    folder, want = made("plain")
    (tmp_path / "flat").mkdir()
    tensors = {FLAT[case](name): tensor for name, tensor in load_file(folder / "adapter" / FILE).items()}
    save_file(tensors, tmp_path / "flat" / "lora.safetensors")
    written = write(command, tmp_path / "flat", tmp_path / "out", folder / "base", alpha=5)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base("qwen"), written)), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("command", ["convert", "compress"])
def test_what_is_saved_whole_on_the_bare_model(command, tmp_path):
    """By the names of the model with a head, which the base has: ΔW of a norm is no second time a LoRA's."""
    model = base("qwen")
    model.save_pretrained(tmp_path / "base")
    bare = get_peft_model(
        model.model, LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["norm", "k_proj"])
    )
    move(bare)
    bare.save_pretrained(tmp_path / "bare")
    want = logits(model)
    written = write(command, tmp_path / "bare", tmp_path / "out", tmp_path / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base("qwen"), written)), want, atol=2e-5, rtol=1e-4)


MIXTURE = "model.layers.0.block_sparse_moe"
OLD = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alphas": {"alpha_pattern": {"w1": 3, "w2": 7}},
    "ranks": {"rank_pattern": {"w1": 3, "q_proj": 1, "gate": 1}},
    "an expert without tokens": {"unused": f"{MIXTURE}.experts.1.w2"},
}


def old_adapter(folder, targets=("w1", "w2", "w3"), unused=None, **fields):
    """LoRA on the single experts of a Mixtral before transformers 5, and its ΔW by module."""
    generator, tensors, deltas = torch.Generator().manual_seed(0), {}, {}
    shapes = {
        f"{MIXTURE}.experts.{e}.{leaf}": (16, 24) if leaf == "w2" else (24, 16) for e in range(3) for leaf in targets
    }
    shapes |= {f"{MIXTURE}.gate": (3, 16), "model.layers.0.self_attn.q_proj": (16, 16)}
    for module, (M, N) in shapes.items():
        leaf = module.rpartition(".")[2]
        r = fields.get("rank_pattern", {}).get(leaf, 2)
        alpha = fields.get("alpha_pattern", {}).get(leaf, 5)
        A, B = torch.randn(r, N, generator=generator), torch.randn(M, r, generator=generator) * (module != unused)
        tensors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
        deltas[module] = alpha / (r**0.5 if fields.get("use_rslora") else r) * B @ A
    folder.mkdir()
    save_file(tensors, folder / FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": [*targets, "gate", "q_proj"]}
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return deltas


@pytest.mark.parametrize("command", ["convert", "compress"])
@pytest.mark.parametrize("case", OLD)
def test_single_experts_of_old_models_are_what_peft_stacks(case, command, tmp_path):
    deltas = old_adapter(tmp_path / "old", **OLD[case])
    written = write(command, tmp_path / "old", tmp_path / "out")
    before = {name: p.detach().clone() for name, p in base("mixtral").named_parameters()}
    merged = PeftModel.from_pretrained(base("mixtral"), written).merge_and_unload()
    change = {
        name: p.detach() - before[name] for name, p in merged.named_parameters() if not torch.equal(p, before[name])
    }
    experts = [{leaf: deltas[f"{MIXTURE}.experts.{e}.{leaf}"] for leaf in ("w1", "w2", "w3")} for e in range(3)]
    want = {
        "mlp.experts.gate_up_proj": torch.stack([torch.cat([each["w1"], each["w3"]]) for each in experts]),
        "mlp.experts.down_proj": torch.stack([each["w2"] for each in experts]),
        "mlp.gate.weight": deltas[f"{MIXTURE}.gate"],
        "self_attn.q_proj.weight": deltas["model.layers.0.self_attn.q_proj"],
    }
    assert change.keys() == {f"model.layers.0.{name}" for name in want}
    for name, delta in want.items():
        torch.testing.assert_close(change[f"model.layers.0.{name}"], delta, atol=2e-5, rtol=1e-4, msg=name)


def test_a_part_of_the_experts_is_refused(tmp_path):
    old_adapter(tmp_path / "old", targets=("w1", "w2"))
    with pytest.raises(InputError, match=re.escape("experts.0.w3: has no ΔW, and PEFT stacks either all")):
        convert(formats.open_adapter(tmp_path / "old"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["convert", "compress"])
@pytest.mark.parametrize("damage", ["cut", "nan", "saved whole"])
def test_nothing_is_written_of_a_damaged_adapter(damage, command, made, tmp_path):
    folder, _ = made("norms")
    source = with_names(folder / "adapter", tmp_path / "source", lambda name: name)
    if damage == "cut":
        (source / FILE).write_bytes((source / FILE).read_bytes()[:-100])
    else:
        tensors = {name: tensor.clone() for name, tensor in load_file(source / FILE).items()}
        end = "lora_B.weight" if damage == "nan" else "norm.weight"
        tensors[next(name for name in tensors if name.endswith(end))][0] = torch.nan
        save_file(tensors, source / FILE)
    with pytest.raises(InputError, match="NaN" if damage != "cut" else FILE):
        write(command, source, tmp_path / "out")
    left = [path for path in tmp_path.rglob("*") if path.is_file() and source not in path.parents]
    assert left == [] and not (command == "convert" and (tmp_path / "out").exists())
