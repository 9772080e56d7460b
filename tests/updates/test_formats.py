import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from lorabench.config.decode import InputError
from lorabench.linalg.decompose import thin_svd
from lorabench.updates import formats
from lorabench.updates.layer import layer_kind
from lorabench.updates.update import Update, save_svds, save_updates

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=1)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8)
BERT = BertConfig(**SIZES, num_labels=3)
CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (2, 3))

    def forward(self, x):
        return self.conv(x)


def causal(config):
    return AutoModelForCausalLM.from_config(config)


CASES = {
    "llama": (lambda: causal(LLAMA), {"r": 3, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "llama-rslora": (lambda: causal(LLAMA), {"r": 4, "target_modules": ["v_proj"], "use_rslora": True}),
    "llama-patterns": (
        lambda: causal(LLAMA),
        {
            "r": 2,
            "target_modules": "all-linear",
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5, "q_proj": 3, "self_attn.k_proj": 1, "_proj": 7},
            "alpha_pattern": {"^model.layers.1.mlp.up_proj": 32, r"model.layers.\d.self_attn.v_proj": 4},
            "use_rslora": True,
        },
    ),
    "llama-embedding": (lambda: causal(LLAMA), {"r": 2, "target_modules": ["embed_tokens", "o_proj"]}),
    "llama-bias": (lambda: causal(LLAMA), {"r": 2, "target_modules": ["q_proj"], "lora_bias": True}),
    "gpt2-conv1d": (lambda: causal(GPT2), {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bert-head": (
        lambda: AutoModelForSequenceClassification.from_config(BERT),
        {"r": 2, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
    ),
    "convolution": (Convolution, {"r": 2, "target_modules": ["conv"]}),
}


def tuned(case):
    """A PEFT model whose factors are random, as if trained."""
    torch.manual_seed(0)
    make, options = CASES[case]
    model = get_peft_model(make(), LoraConfig(lora_alpha=10, init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    return model


def lora_layers(model):
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and (module.lora_A or module.lora_embedding_A):
            found[f"{name}.weight"] = module
    return found


def mathematical(delta, module):
    """PEFT's ΔW, which has the orientation of the stored weight, as (out, in)."""
    stored_transposed = isinstance(module.get_base_layer(), nn.Embedding) or getattr(module, "fan_in_fan_out", False)
    return (delta.T if stored_transposed else delta.flatten(1)).detach()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_updates_are_what_peft_would_merge(case, tmp_path):
    model = tuned(case)
    model.save_pretrained(tmp_path)
    expected = lora_layers(model)
    updates = {update.parameter: update for update in formats.read_updates(tmp_path)}
    assert updates.keys() == expected.keys() and len(updates) >= 1
    weights = dict(model.get_base_model().named_parameters())
    for parameter, module in expected.items():
        delta = mathematical(module.get_delta_weight("default"), module)
        assert torch.allclose(updates[parameter].dense(), delta, atol=1e-5)
        assert updates[parameter].scale_source == "config" and updates[parameter].shape == delta.shape
        assert any(name.replace("base_layer.", "") == parameter for name in weights)


@pytest.mark.parametrize("case", ["llama-patterns", "gpt2-conv1d"])
def test_layers_are_the_svd_of_the_merge_difference(case, tmp_path):
    model = tuned(case)
    model.save_pretrained(tmp_path)
    before = {name: module.get_base_layer().weight.detach().clone() for name, module in lora_layers(model).items()}
    conv1d = case == "gpt2-conv1d"
    merged = dict(model.merge_and_unload().named_parameters())
    for layer in formats.read_layers(tmp_path):
        difference = (merged[layer.parameter] - before[layer.parameter]).detach()
        exact = torch.linalg.svdvals(difference.double())[: len(layer.svd.S)]
        assert torch.allclose(layer.svd.S, exact, rtol=1e-4, atol=1e-6)
        assert layer.rank >= len(layer.svd.S) and layer.shape == (difference.T if conv1d else difference).shape


@pytest.fixture
def adapter(tmp_path):
    tuned("llama").save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)


def test_an_adapter_and_dense_changes_in_one_folder(adapter):
    head = torch.randn(3, 8)
    save_updates([Update(parameter="score.weight", B=head, base_norm=2.0)], adapter)
    norms = {"model.layers.0.self_attn.q_proj.weight": 1.5}
    (adapter / "base_norms.json").write_text(json.dumps(norms))
    layers = {layer.layer: layer for layer in formats.read_layers(adapter)}
    assert list(layers) == sorted(layers) and len(layers) == 7
    score, query = layers["score"], layers["model.layers.0.self_attn.q_proj"]
    assert (score.rank, score.base_norm, score.precision, score.scale_source) == (None, 2.0, "float32", None)
    assert (query.rank, query.base_norm, query.precision, query.kind, query.depth) == (3, 1.5, None, "q_proj", 0)
    assert layers["model.layers.1.self_attn.q_proj"].base_norm is None


def test_vectors_are_updates_but_not_layers(tmp_path):
    changes = {"norm.weight": torch.randn(6, 1), "head.weight": torch.randn(1, 6), "lin.weight": torch.randn(6, 4)}
    save_updates([Update(parameter=name, B=delta) for name, delta in changes.items()], tmp_path)
    updates = {update.parameter: update.dense() for update in formats.read_updates(tmp_path)}
    assert all(torch.equal(updates[name], delta) for name, delta in changes.items()) and len(updates) == 3
    assert [layer.layer for layer in formats.read_layers(tmp_path)] == ["head", "lin"]


def test_kept_vectors_have_every_singular_value(tmp_path):
    delta = torch.randn(9, 6)
    save_svds([Update(parameter="lin.weight", B=delta, base_norm=1.0)], tmp_path, keep=2)
    (layer,) = formats.read_layers(tmp_path)
    exact = thin_svd(delta)
    assert layer.shape == (9, 6) and layer.svd.U.shape == (9, 2) and layer.svd.Vh.shape == (2, 6)
    assert torch.allclose(layer.svd.S, exact.S, rtol=1e-5) and layer.base_norm == 1.0
    assert torch.allclose((layer.svd.U.T @ exact.U[:, :2]).abs(), torch.eye(2), atol=1e-4)
    with pytest.raises(InputError, match="svd:K"):
        next(formats.read_updates(tmp_path))


def test_kept_vectors_of_factors_know_their_rank(tmp_path):
    B, A = torch.randn(9, 3), torch.randn(3, 6)
    save_svds([Update(parameter="lin.weight", B=B, A=A)], tmp_path, keep=2)
    (layer,) = formats.read_layers(tmp_path)
    assert (layer.rank, layer.precision, layer.svd.U.shape) == (3, None, (9, 2))
    assert torch.allclose(layer.svd.S, torch.linalg.svdvals((B @ A).double())[:3], rtol=1e-5)


def test_a_dense_layer_keeps_a_bounded_number_of_vectors(tmp_path):
    save_updates([Update(parameter="lin.weight", B=torch.randn(80, 70))], tmp_path)
    (layer,) = formats.read_layers(tmp_path)
    assert layer.svd.U.shape == (80, formats.DENSE_VECTORS) and len(layer.svd.S) == 70


def test_one_layer_is_read_at_a_time(adapter):
    """Opening must not read: the first layers come though the last is damaged."""
    names = sorted(formats.open_layers(adapter))
    last = f"base_model.model.{names[-1].removesuffix('.weight')}.lora_B.weight"
    edit_tensors(adapter, lambda tensors: tensors[last].fill_(float("nan")))
    layers = formats.read_layers(adapter)
    assert [next(layers).parameter for _ in names[:-1]] == names[:-1]
    with pytest.raises(InputError, match=f"{ADAPTER}: {last}: holds NaN or Inf"):
        next(layers)


@pytest.mark.parametrize("size", [0, 7, 100, 2000])
def test_a_truncated_file(adapter, size):
    whole = (adapter / ADAPTER).read_bytes()
    (adapter / ADAPTER).write_bytes(whole[:size])
    with pytest.raises(InputError, match=f"{ADAPTER}: not a whole safetensors file"):
        list(formats.read_layers(adapter))


def test_a_missing_file(adapter):
    (adapter / ADAPTER).unlink()
    with pytest.raises(InputError, match=f"{ADAPTER}: no such file"):
        list(formats.read_layers(adapter))


def test_an_empty_folder_has_no_layers(tmp_path):
    assert list(formats.read_layers(tmp_path)) == []


def test_shapes_that_do_not_fit(adapter):
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(adapter, lambda tensors: tensors.update({name: torch.zeros(16, 2)}))
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj.*\(16, 2\).*\(3, 16\).*rank 3"):
        list(formats.read_layers(adapter))
    edit_tensors(adapter, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=f"{name}: no such tensor"):
        list(formats.read_layers(adapter))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "do not fit each other and rank 4"),
        ({"r": 0}, "r = 0: must be a whole number, at least 1"),
        ({"lora_alpha": None}, "lora_alpha = None: must be a number"),
        ({"peft_type": "PROMPT_TUNING"}, "not applicable: PROMPT_TUNING changes no weight, so that there is no ΔW"),
        ({"peft_type": "BOFT"}, "peft_type = BOFT: its ΔW cannot be read from the file; these can: LORA, ADALORA"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa_niter_4: .*initial factors"),
        ({"rank_pattern": {"q_proj(": 3}}, "rank_pattern: not a regular expression"),
    ],
)
def test_what_cannot_be_read_is_refused(adapter, changes, message):
    edit_config(adapter, **changes)
    with pytest.raises(InputError, match=f"{ADAPTER}.*{message}" if "fit" in message else f"{CONFIG}: {message}"):
        list(formats.read_layers(adapter))


def test_a_damaged_configuration(adapter):
    text = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=f"{CONFIG}: not valid JSON"):
        list(formats.read_layers(adapter))


@pytest.mark.parametrize(
    ("layer", "kind", "depth"),
    [
        ("model.layers.3.self_attn.q_proj", "q_proj", 3),
        ("transformer.h.11.mlp.c_proj", "mlp.c_proj", 11),
        ("transformer.h.0.attn.c_attn", "c_attn", 0),
        ("bert.encoder.layer.2.attention.output.dense", "attention.output.dense", 2),
        ("bert.encoder.layer.2.output.dense", "output.dense", 2),
        ("bert.pooler.dense", "dense", None),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "down.attn1.to_out.0", 1),
        ("lm_head", "lm_head", None),
        ("h.3.attn.c_proj[sBA]", "attn.c_proj[sBA]", 3),
        ("down_blocks.1.attn1.to_out.0[sBA]", "down.attn1.to_out.0[sBA]", 1),
        ("lora_unet_down_blocks_2_attentions_0_transformer_blocks_1_attn1_to_q", "down.attn1.to_q", 2),
        ("lora_unet_down_blocks_2_attentions_0_transformer_blocks_1_attn2_to_out_0", "down.attn2.to_out.0", 2),
        ("mid_block.resnets.0.conv1", "mid.conv1", 0),
        ("up_blocks.3.attentions.2.proj_in", "up.proj_in", 3),
        ("transformer_blocks.4.ff_context.net.0.proj", "ff_context.net.0.proj", 4),
        ("transformer_blocks.4.attn.add_q_proj", "add_q_proj", 4),
        ("single_transformer_blocks.7.attn.to_q", "single.to_q", 7),
        ("lora_te1_text_model_encoder_layers_11_self_attn_q_proj", "self_attn_q_proj", 11),
        ("lora_unet_single_blocks_37_linear1[mlp]", "linear1[mlp]", 37),
        ("lora_unet_conv2_in", "conv2_in", None),
    ],
)
def test_names_of_layers(layer, kind, depth):
    assert layer_kind(layer) == kind
    found = formats.LayerSVD(parameter=f"{layer}.weight", svd=thin_svd(torch.ones(2, 2)))
    assert (found.layer, found.kind, found.depth) == (layer, kind, depth)


@pytest.mark.parametrize("budget", [1, 2000, formats.BATCH_BYTES])
def test_layers_together_are_those_alone(tmp_path, monkeypatch, budget):
    """Of several shapes, ranks and kinds, factored and dense, in the order of their names."""
    g = torch.Generator().manual_seed(0)
    updates = []
    for index, (M, N, r) in enumerate([(9, 7, 2), (9, 7, 2), (7, 9, 2), (9, 7, 3), (9, 7, 2), (9, 7, 2)]):
        B, A = torch.randn(M, r, generator=g), torch.randn(r, N, generator=g)
        dense = index == 4
        updates.append(
            Update(parameter=f"layers.{index}.w.weight", B=B @ A if dense else B, A=None if dense else A, base_norm=2.0)
        )
    save_updates(updates, tmp_path)
    monkeypatch.setattr(formats, "BATCH_BYTES", budget)
    together = list(formats.load_layers(formats.open_adapter(tmp_path)))
    assert [layer.parameter for layer in together] == [update.parameter for update in updates]
    for layer, update in zip(together, updates, strict=True):
        exact = torch.linalg.svdvals(update.dense().double())[: len(layer.svd.S)]
        assert layer.svd.S[:2].tolist() == pytest.approx(exact[:2].tolist(), rel=1e-5)
        assert torch.allclose(
            layer.svd.U * layer.svd.S.float()[: layer.svd.U.shape[1]] @ layer.svd.Vh, update.dense(), atol=1e-5
        )
        assert layer.base_norm == 2.0 and layer.rank == (None if update.A is None else update.A.shape[0])
