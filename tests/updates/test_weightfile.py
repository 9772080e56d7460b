"""Weights on disk against the models that transformers loads from the same files."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from lorabench.config.decode import InputError
from lorabench.models.weights import is_transposed
from lorabench.updates import weightfile
from lorabench.updates.weightfile import WeightFiles

COMMON = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**COMMON, vocab_size=30)),
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**COMMON, vocab_size=30)),
    "electra": lambda: t.ElectraModel(t.ElectraConfig(**COMMON, vocab_size=30, embedding_size=8)),
    "albert": lambda: t.AlbertModel(t.AlbertConfig(**COMMON, vocab_size=30, embedding_size=8)),
    "deberta": lambda: t.DebertaV2Model(t.DebertaV2Config(**COMMON, vocab_size=30, relative_attention=True)),
    "distilbert": lambda: t.DistilBertModel(t.DistilBertConfig(dim=16, hidden_dim=24, n_layers=1, n_heads=2)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=8)),
    "openai-gpt": lambda: t.OpenAIGPTModel(t.OpenAIGPTConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=30)),
    "gpt_bigcode": lambda: t.GPTBigCodeModel(t.GPTBigCodeConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=30)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**COMMON, vocab_size=30)),
    "opt": lambda: t.OPTModel(t.OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2)),
    "t5": lambda: t.T5Model(t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=30)),
    "whisper": lambda: t.WhisperModel(
        t.WhisperConfig(
            d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            vocab_size=60, pad_token_id=1, decoder_start_token_id=2,
        )
    ),
    "clip": lambda: t.CLIPTextModel(t.CLIPTextConfig(**COMMON, vocab_size=30, bos_token_id=0, eos_token_id=1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_those_of_the_model_as_out_in(kind, tmp_path):
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(tmp_path)
    files = WeightFiles(tmp_path)
    model = type(MODELS[kind]()).from_pretrained(tmp_path)
    parameters = {name: p for name, p in model.named_parameters() if files.find(name)}
    assert len(parameters) >= len(files.names) - 1
    for name, parameter in parameters.items():
        stored = parameter.detach()
        transposed = is_transposed(model.get_submodule(name.rpartition(".")[0])) and stored.ndim == 2
        expected = stored.T if transposed else stored.reshape(len(stored), -1) if stored.ndim > 1 else stored[:, None]
        assert torch.equal(files.read(name), expected), name
        assert files.shape(name) == tuple(expected.shape)


def test_the_models_with_conv1d_are_those_of_transformers():
    """Reads transformers' source: which models make Conv1D layers, under which names."""
    types, names = set(), set()
    for file in Path(t.__file__).parent.glob("models/*/modeling_*.py"):
        found = re.findall(r"self\.(\w+) = Conv1D\(", file.read_text("utf-8"))
        if found:
            names |= set(found)
            config = file.with_name(file.name.replace("modeling", "configuration")).read_text("utf-8")
            types |= set(re.findall(r'^    model_type = "(.+)"', config, re.MULTILINE))
    types -= {"clvp_encoder"}  # built of Linear layers under other names
    assert types == set(weightfile.CONV1D_TYPES) and names == set(weightfile.CONV1D_NAMES)


def test_shards_read_as_one(tmp_path):
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len(weightfile.weight_files(tmp_path / "many")) > 2
    one, many = WeightFiles(tmp_path / "one"), WeightFiles(tmp_path / "many")
    assert one.names == many.names
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names)


def test_a_torch_file_and_a_single_file(tmp_path):
    model = MODELS["gpt2"]()
    model.save_pretrained(tmp_path)
    torch.save(model.transformer.state_dict(), tmp_path / "pytorch_model.bin")
    single = WeightFiles(tmp_path / "pytorch_model.bin")
    folder = WeightFiles(tmp_path)
    name = "transformer.h.0.attn.c_attn.weight"
    assert single.find(name) == "h.0.attn.c_attn.weight" and single.shape(name) == (48, 16)
    assert torch.equal(single.read(name), folder.read(name))
    (tmp_path / "config.json").unlink()
    assert single.read(name).shape == WeightFiles(tmp_path / "pytorch_model.bin").read(name).shape == (48, 16)


def made(folder, **tensors):
    save_file(
        {name.replace("__", "."): tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return WeightFiles(folder)


def test_names_with_another_prefix(tmp_path):
    x = torch.ones(2, 3)
    files = made(
        tmp_path,
        model__layers__0__q__weight=x, model__layers__1__q__weight=x, lm_head__weight=x, bert__pool__weight=x,
    )  # fmt: skip
    found = {
        "model.layers.0.q.weight": "model.layers.0.q.weight",
        "layers.0.q.weight": "model.layers.0.q.weight",
        "base_model.model.model.layers.1.q.weight": "model.layers.1.q.weight",
        "model.pool.weight": "bert.pool.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "q.weight": None,  # a block's number is no wrapper
        "layers.2.q.weight": None,
        "ool.weight": None,
        "head.weight": None,
    }
    assert {name: files.find(name) for name in found} == found
    with pytest.raises(InputError, match=r"layers\.2\.q\.weight: no such weight; it has bert\.pool\.weight.*4 in all"):
        files.read("layers.2.q.weight")


def test_a_name_that_could_mean_two_weights_is_not_found(tmp_path):
    x = torch.ones(2, 3)
    files = made(tmp_path, encoder__block__0__q__weight=x, decoder__block__0__q__weight=x)
    assert files.find("block.0.q.weight") is None


def test_half_precision_is_read_as_float32(tmp_path):
    torch.manual_seed(0)
    stored = {"a__weight": torch.randn(4, 5).bfloat16(), "b__weight": torch.randn(4, 5).to(torch.float8_e4m3fn)}
    files = made(tmp_path, **stored, c__weight=torch.randn(2, 2).double())
    assert [files.dtype(name) for name in files.names] == ["bfloat16", "float8_e4m3fn", "float64"]
    assert [files.read(name).dtype for name in files.names] == [torch.float32, torch.float32, torch.float64]
    assert all(torch.equal(files.read(name.replace("__", ".")), x.float()) for name, x in stored.items())


def shard_to(folder, target):
    save_file({"a.weight": torch.ones(2, 2)}, folder / "model-1.safetensors")
    index = {"weight_map": {"a.weight": "model-1.safetensors", "b.weight": target}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "link"])
def test_an_index_cannot_lead_outside_the_folder(target, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"b.weight": torch.ones(2, 2)}, tmp_path / "secret.safetensors")
    (folder / "link").symlink_to(tmp_path / "secret.safetensors")
    shard_to(folder, target)
    with pytest.raises(InputError, match=r"index\.json: weight_map: .*: leads outside the folder"):
        WeightFiles(folder)


def test_a_shard_that_links_to_itself_is_no_file(tmp_path):
    (tmp_path / "model-2.safetensors").symlink_to("model-2.safetensors")
    shard_to(tmp_path, "model-2.safetensors")
    with pytest.raises(InputError, match=r"model-2\.safetensors"):
        WeightFiles(tmp_path)


def test_the_hubs_cache_may_link_to_its_blobs(tmp_path):
    folder, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file({"b.weight": torch.ones(2, 2)}, blobs / "0123")
    (folder / "model-2.safetensors").symlink_to(blobs / "0123")
    shard_to(folder, "model-2.safetensors")
    assert WeightFiles(folder).names == ["a.weight", "b.weight"]


def test_a_missing_shard_and_an_empty_folder(tmp_path):
    shard_to(tmp_path, "model-2.safetensors")
    with pytest.raises(InputError, match=r"model-2\.safetensors: no such file"):
        WeightFiles(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: holds no weights"):
        WeightFiles(tmp_path / "empty")


def test_one_weight_is_read_at_a_time(tmp_path):
    """The rest may be damaged."""
    files = made(tmp_path, a__weight=torch.ones(2, 2), b__weight=torch.full((2, 2), float("inf")))
    assert load_file(tmp_path / "model.safetensors")["b.weight"].isinf().all()
    assert torch.equal(files.read("a.weight"), torch.ones(2, 2))
    with pytest.raises(InputError, match=r"b\.weight: holds NaN or Inf"):
        files.read("b.weight")


TIED = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**COMMON, vocab_size=30, tie_word_embeddings=True)),
    "gpt2": MODELS["gpt2"],
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**COMMON, vocab_size=30)),
    "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**COMMON, vocab_size=30)),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=30)
    ),
}


def head_of(model):
    (name,) = (n for n, module in model.named_modules() if module is model.get_output_embeddings())
    return f"{name}.weight"


@pytest.mark.parametrize("told", [True, False], ids=["told", "default"])
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_output_matrix_is_the_input_embedding(kind, told, tmp_path):
    torch.manual_seed(0)
    TIED[kind]().save_pretrained(tmp_path)
    if not told:
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        config.pop("tie_word_embeddings")
        file.write_text(json.dumps(config))
    model, files = type(TIED[kind]()).from_pretrained(tmp_path), WeightFiles(tmp_path)
    head = head_of(model)
    assert head not in files.names
    if kind == "llama" and not told:  # whose default is not tied
        assert files.find(head) is None
        return
    expected = model.get_output_embeddings().weight.detach()
    assert files.find(head) == head and files.shape(head) == files.stored_shape(head) == tuple(expected.shape)
    assert torch.equal(files.read(head), expected) and files.dtype(head) == "float32"
    assert torch.equal(model.get_input_embeddings().weight.detach(), expected)


def test_a_head_of_its_own_is_not_the_embedding(tmp_path):
    model = t.LlamaForCausalLM(t.LlamaConfig(**COMMON, vocab_size=30, tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(WeightFiles(tmp_path).read("lm_head.weight"), model.lm_head.weight.detach())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert WeightFiles(tmp_path).find("lm_head.weight") is None  # it is lacking, and not tied
