"""Adapters whose file alone does not tell the model's structure: stacked experts, replicated blocks, shards, resized
vocabularies. The oracle is PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from lorabench.config.decode import InputError
from lorabench.updates import formats
from lorabench.updates.layer import layer_kind

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
         "vocab_size": 30, "tie_word_embeddings": False}  # fmt: skip
LLAMA = LlamaConfig(**SIZES, num_hidden_layers=2)
EXPERTS = {
    "qwen3": Qwen3MoeConfig(**SIZES, num_hidden_layers=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
                            moe_intermediate_size=12, decoder_sparse_step=1),
    "mixtral": MixtralConfig(**SIZES, num_hidden_layers=1, num_local_experts=3),
    "transposed": GptOssConfig(**SIZES, num_hidden_layers=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2,
                               layer_types=["full_attention"]),
}  # fmt: skip
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


def model(config=LLAMA):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def saved(folder, config=LLAMA, **options):
    """The adapter's model, its factors random; the base in `base`, the adapter in `adapter`."""
    base = model(config)
    base.save_pretrained(folder / "base")
    torch.manual_seed(1)
    tuned = get_peft_model(base, LoraConfig(lora_alpha=8, init_lora_weights=False, **({"r": 2} | options)))
    tuned.save_pretrained(folder / "adapter")
    return tuned


def expert_updates(tuned):
    """PEFT's ΔW of each expert as (out, in)."""
    expected = {}
    for name, module in tuned.get_base_model().named_modules():
        if type(module).__name__ == "ParamWrapper":
            deltas = module.get_delta_weight("default").detach().double()
            name = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
            if deltas.dim() == 2:
                expected[f"{name.removesuffix('.weight')}.weight"] = deltas
                continue
            swapped = getattr(module.get_base_layer(), "is_transposed", False)
            expected |= {f"{name}[{i}].weight": delta.T if swapped else delta for i, delta in enumerate(deltas)}
    return expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {"target_parameters": [*BOTH, "mlp.gate.weight"]}),
        ("qwen3", {"target_parameters": BOTH[1:], "use_rslora": True}),
        ("mixtral", {"target_parameters": BOTH, "rank_pattern": {"experts.down_proj": 3},
                     "alpha_pattern": {"gate_up_proj": 5}}),
        ("transposed", {"target_parameters": BOTH}),
    ],
)  # fmt: skip
def test_one_update_an_expert(name, options, tmp_path):
    tuned = saved(tmp_path, EXPERTS[name], target_modules=["q_proj"], **options)
    expected = expert_updates(tuned)
    for base in (None, tmp_path / "base"):
        adapter = formats.open_adapter(tmp_path / "adapter", base=base)
        query = [name for name in adapter.entries if "q_proj" in name]
        assert {*adapter.entries} == {*expected, *query} and len(query) == 1 and adapter.left_out == ()
        for parameter, delta in expected.items():
            update = adapter.entries[parameter].load()
            assert update.shape == adapter.entries[parameter].shape == tuple(delta.shape)
            assert torch.allclose(update.dense().double(), delta, atol=1e-5), parameter
            assert not update.layer.endswith("]") or "[" not in layer_kind(update.layer)


@pytest.mark.parametrize(("name", "number"), [("mixtral", 6), ("transposed", 0)])
def test_a_stack_that_the_base_keeps_expert_by_expert_is_told(name, number, tmp_path):
    """As transformers saves a Mixtral: no matrix of it is the stack's, so none is taken for W0."""
    saved(tmp_path, EXPERTS[name], target_modules=["q_proj"], target_parameters=BOTH)
    adapter = formats.open_adapter(tmp_path / "adapter", base=tmp_path / "base")
    assert sum(entry.load().base_norm is not None for entry in adapter.entries.values()) <= 1
    notes = [note for note in adapter.notes if note.startswith("W0 of")]
    assert len(notes) == (number > 0) and all(f"of {number} layers, such as" in note for note in notes)


def test_experts_without_their_configuration_are_refused(tmp_path):
    saved(tmp_path / "two", EXPERTS["mixtral"], target_modules=[], target_parameters=BOTH)
    saved(tmp_path / "one", EXPERTS["mixtral"], target_modules=[], target_parameters=BOTH[:1])
    for folder in (tmp_path / "two" / "adapter", tmp_path / "one" / "adapter"):
        (folder / CONFIG).unlink()
        with pytest.raises(InputError, match=r"LoRA on stacked experts \(target_parameters\)"):
            formats.open_adapter(folder, alpha=8)


def test_which_parameter_is_which_is_told_by_the_base_or_not_at_all(tmp_path):
    """Names that no model of transformers has: their order is not known, and their shapes tell."""
    saved(tmp_path, EXPERTS["mixtral"], target_modules=[], target_parameters=BOTH)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    config["target_parameters"] = ["mlp.experts.first", "mlp.experts.second"]
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"which of its 2 LoRAs is that of first, second is not known"):
        formats.open_adapter(tmp_path / "adapter")
    stack = "model.layers.0.mlp.experts"
    save_file(
        {f"{stack}.first": torch.zeros(3, 16, 24), f"{stack}.second": torch.zeros(3, 48, 16)},
        tmp_path / "b.safetensors",
    )
    entries = formats.open_adapter(tmp_path / "adapter", base=tmp_path / "b.safetensors").entries
    assert entries[f"{stack}.first[0].weight"].shape == (16, 24)
    assert entries[f"{stack}.second[2].weight"].shape == (48, 16)


@pytest.mark.parametrize("dora", [False, True])
def test_replicated_blocks_have_each_a_lora_of_its_own(dora, tmp_path):
    options = {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]], "use_dora": dora}
    saved(tmp_path, **options)
    tuned = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    layers = {n: m for n, m in tuned.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    before = {name: module.get_base_layer().weight.detach().clone() for name, module in layers.items()}
    adapter = formats.open_adapter(tmp_path / "adapter", base=tmp_path / "base")
    assert "layer_replication: blocks 0 to 2 are the base's 0 to 1, 1" in adapter.notes and len(layers) == 3
    for name, module in layers.items():
        module.merge()
        delta = module.get_base_layer().weight.detach() - before[name]
        module.unmerge()  # the weight is that of another block too
        assert torch.allclose(adapter.entries[f"{name}.weight"].load().dense(), delta, atol=1e-5)


@pytest.mark.parametrize("told", [[[0, 10**12]], [0, 2], "all", [[0]], [["a", 2]]])
def test_replications_that_are_none(told, tmp_path):
    saved(tmp_path, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text()) | {"layer_replication": told}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"layer_replication = .*: must be a list of \[start, stop\]"):
        formats.open_adapter(tmp_path / "adapter")


def test_shards_are_one_adapter(tmp_path):
    llama = model()
    llama.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    llama.save_pretrained(tmp_path / "whole")
    llama.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    files = sorted((tmp_path / "shards").glob("adapter_model-*.safetensors"))
    whole = formats.open_adapter(tmp_path / "whole")
    for given in (tmp_path / "shards", files[0]):
        shards = formats.open_adapter(given)
        assert shards.entries.keys() == whole.entries.keys() and len(files) == 2 and shards.format == "peft"
        for name, entry in whole.entries.items():
            assert torch.equal(shards.entries[name].load().dense(), entry.load().dense())
    index = tmp_path / "shards" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": table["weight_map"] | {"another": files[0].name}}))
    with pytest.raises(InputError, match="names tensors that no shard holds: another"):
        formats.open_adapter(tmp_path / "shards")
    files[1].unlink()
    with pytest.raises(InputError, match="has 1 shards of an adapter of 2; missing are 2"):
        formats.open_adapter(tmp_path / "shards")


def test_a_resized_vocabulary_is_told_by_its_shapes(tmp_path):
    saved(tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    tensors = load_file(tmp_path / "adapter" / ADAPTER)
    name = "base_model.model.lm_head.weight"
    save_file(tensors | {name: torch.cat([tensors[name], torch.ones(3, 16)])}, tmp_path / "adapter" / ADAPTER)
    adapter = formats.open_adapter(tmp_path / "adapter", base=tmp_path / "base")
    assert any("lm_head.weight is (33, 16) for (30, 16)" in note for note in adapter.notes)
    assert adapter.others["lm_head.weight"].shape == (33, 16)
    assert "model.norm.weight" in adapter.vectors and "lm_head.weight" not in adapter.entries


def test_a_configuration_speaks_of_its_own_file_alone(tmp_path):
    saved(tmp_path, target_modules=["q_proj"])
    folder = tmp_path / "adapter"
    tensors = {"lora_unet_x.lora_up.weight": torch.ones(4, 2), "lora_unet_x.lora_down.weight": torch.ones(2, 3)}
    save_file(tensors | {"lora_unet_x.alpha": torch.tensor(2.0)}, folder / "other.safetensors")
    other = formats.open_adapter(folder / "other.safetensors")
    assert other.format == "kohya" and [*other.entries] == ["lora_unet_x.weight"] and other.config == {}
    assert formats.open_adapter(folder).format == "peft"
    copy = load_file(folder / ADAPTER)
    save_file(copy, folder / "step-100.safetensors")
    assert formats.open_adapter(folder / "step-100.safetensors").scale_source == "assumed"
    (folder / ADAPTER).rename(folder / "mine.safetensors")
    (folder / "step-100.safetensors").unlink()
    assert formats.open_adapter(folder / "mine.safetensors").scale_source == "config"
    with pytest.raises(
        InputError, match=rf"{ADAPTER}: no such file; beside .* lie mine.safetensors, other.safetensors"
    ):
        formats.open_adapter(folder)


def test_of_two_formats_the_one_that_uses_all_tensors(tmp_path):
    """Where each of two would leave some out, neither is taken."""
    lora = {"x.lora_A": torch.ones(2, 3), "x.lora_B": torch.ones(4, 2)}
    save_file(lora, tmp_path / "one.safetensors")
    assert formats.open_adapter(tmp_path / "one.safetensors").format == "loralib"
    more = {"y.lora_A.weight": torch.ones(2, 3), "y.lora_B.weight": torch.ones(4, 2)}
    save_file(lora | more, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="could be diffusers or loralib"):
        formats.open_adapter(tmp_path / "two.safetensors")


@pytest.mark.parametrize("norm", ["word", [1], True, 10**400])
def test_norms_that_are_no_numbers(norm, tmp_path):
    saved(tmp_path, target_modules=["q_proj"])
    norms = tmp_path / "adapter" / "base_norms.json"
    norms.write_text(json.dumps({"model.layers.0.self_attn.q_proj.weight": norm}))
    with pytest.raises(InputError, match=r"base_norms.json: (model.layers.0.*: must be a number|holds a whole number)"):
        formats.open_adapter(tmp_path / "adapter")
