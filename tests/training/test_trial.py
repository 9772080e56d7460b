"""What is found on a small random model of the same architecture, before anything starts."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
import transformers as t

from lorabench.config.decode import InputError
from lorabench.launch import plan as plans
from lorabench.methods.lora import Lora
from lorabench.models import base_model as models
from lorabench.training import trial
from tests import families
from tests.conftest import make_spec

DECODERS = {
    name: partial(getattr(t, f"{kind}Config"), is_decoder=True, **families._PLAIN)
    for name, kind in {"bert": "Bert", "roberta": "Roberta", "big_bird": "BigBird", "electra": "Electra"}.items()
}
XLNET = partial(t.XLNetConfig, d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=1024)
LARGE = {
    "llama": t.LlamaConfig,
    "gpt-oss": partial(t.GptOssConfig, num_hidden_layers=4),
    "deepseek-v3": partial(t.DeepseekV3Config, num_hidden_layers=4),
    "bert": t.BertConfig,
}


@pytest.fixture
def spec_of(tmp_path):
    made = {}

    def make(config, **changes):
        """One folder for each configuration: what is known of a folder's model is kept."""
        if id(config) not in made:
            folder = tmp_path / str(len(made))
            config.save_pretrained(folder)
            t.AutoTokenizer.from_pretrained(models.BUILTIN / "tiny-llama").save_pretrained(folder)
            made[id(config)] = (config, str(folder))
        return make_spec(model=made[id(config)][1], **changes)

    return make


@pytest.mark.parametrize("family", [name for name in families.CONFIGS if name not in families.CLASSIFIERS])
def test_no_causal_model_is_refused(family, spec_of):
    spec = spec_of(families.CONFIGS[family]())
    trial.check_causal(spec, trial.small(spec, {}))


@pytest.mark.parametrize("name", DECODERS)
def test_an_encoder_is_refused_unless_it_is_a_decoder(name, spec_of):
    spec = spec_of(DECODERS[name]())
    trial.check_causal(spec, trial.small(spec, {}))
    spec = spec_of(type(DECODERS[name]())(**families._PLAIN))
    with pytest.raises(
        InputError, match=r'is no causal language model: .*task\.name = "text" would give it the answers'
    ):
        trial.check_causal(spec, trial.small(spec, {}))


def test_a_model_that_permutes_its_input_is_refused_and_one_that_is_none_too(spec_of):
    spec = spec_of(XLNET())
    with pytest.raises(InputError, match="XLNetLMHeadModel is no causal language model"):
        trial.try_out(spec, {})
    with pytest.raises(InputError, match=r'a t5 cannot do task\.name = "text"'):
        plans.count(spec_of(families.CONFIGS["t5"]()))


@pytest.mark.parametrize("name", LARGE)
def test_a_large_model_is_tried_narrow(name, spec_of):
    spec = spec_of(LARGE[name]())
    small = trial.small(spec, {})
    assert sum(p.numel() for p in small.parameters()) < trial.LARGEST
    assert small.state_dict().keys() == models.skeleton(spec, {}).state_dict().keys()


def test_what_could_not_be_saved_is_refused_before_anything_starts(monkeypatch, spec_of):
    spec = spec_of(families.CONFIGS["gpt2"](), method={"name": "lora", "rank": 3, "targets": "mlp"})
    trial.try_out(spec, {})

    def broken(self, model, load_base):
        raise AttributeError("'Experts' object has no attribute 'weight'")

    monkeypatch.setattr(Lora, "layer_updates", broken)
    trial._try_out.cache_clear()
    with pytest.raises(InputError, match=r"lora.*: what it learns on GPT2LMHeadModel cannot be saved: AttributeError"):
        plans.count(spec)
    trial._try_out.cache_clear()


def test_a_model_that_cannot_be_computed_with_the_method_is_refused_before_the_first_step(spec_of, monkeypatch):
    """As Llama 4's router, a Linear of two outputs, was in its first step."""
    spec = spec_of(families.CONFIGS["gpt2"](), method={"name": "lora", "targets": "mlp"})
    trial._try_out.cache_clear()
    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.GPT2MLP.forward", _no_tensor)
    with pytest.raises(InputError, match=r'"lora": GPT2LMHeadModel cannot be computed with it: AttributeError: .tuple'):
        trial.check_saving(spec, trial.models.skeleton(spec, {}, torch.device("cpu")))


def test_a_model_that_is_stored_in_bfloat16_is_tried_with_weights_in_float32(untried):
    """As it runs: either without autocast in float32, or with it, which lets the two meet."""
    spec = make_spec(model="builtin:tiny-llama-arithmetic", method={"name": "vera", "rank": 4})
    assert trial.check_saving(spec, trial.small(spec, {})) == ""


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning"])
def test_soft_prompts_are_refused_where_a_classifier_takes_none(method, spec_of, untried):
    task = {"name": "classification", "data": "builtin:english-docs"}
    spec = spec_of(families.CONFIGS["bart"](), method={"name": method}, task=task)
    with pytest.raises(InputError, match=rf'"{method}": BartForSequenceClassification cannot be computed with it'):
        trial.try_out(spec, {})


@pytest.mark.parametrize("family", ["mixtral", "llama", "gpt2", "qwen3-moe", "gemma3", "phi3", "opt"])
def test_soft_prompts_are_taken_by_language_models(family, spec_of, untried):
    for method in ("prompt", "prefix", "ptuning"):
        assert trial.try_out(spec_of(families.CONFIGS[family](), method={"name": method}), {}) == ""


def _no_tensor(self, states):
    return self.c_fc((states, states))


@pytest.fixture
def untried():
    """Nothing is kept of what other tests have tried, or made of it."""

    def forget():
        trial._KEPT.clear()
        for cached in (trial._try_out, plans._know):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize(
    "method",
    [
        {"name": "adapter"},
        {"name": "hybrid", "lora": {"rank": 2}, "adapter": {"reduction": 8}},
        {"name": "oft"},
        {"name": "oft", "block_size": 16},
        {"name": "peft", "type": "MISS", "config": {"r": 8}},
    ],
    ids=lambda method: "-".join([method["name"], *map(str, [*method][1:])]),
)
def test_what_does_not_fit_the_narrowest_model_is_tried_on_a_wider_one(method, spec_of, monkeypatch, untried):
    spec = spec_of(families.CONFIGS["gpt2"](), method=method)
    with pytest.raises(InputError):
        small = trial.small(spec, {})
        spec.method.attach(small, spec)
    assert trial.try_out(spec, {}) == ""

    def broken(self, *_):
        raise AttributeError("no such weight")

    monkeypatch.setattr(type(spec.method), "save", broken)
    trial._try_out.cache_clear()
    with pytest.raises(InputError, match=r"what it learns on GPT2LMHeadModel cannot be saved: AttributeError: no such"):
        trial.try_out(spec, {})


def test_what_could_not_be_tried_is_said(spec_of, monkeypatch, untried):
    spec = spec_of(families.CONFIGS["gpt2"](), method={"name": "lora", "targets": "mlp"})
    attach = Lora.attach

    def attach_without_numbers(self, model, spec):
        if next(model.parameters()).device.type != "meta":
            raise ValueError("as with some methods\nof tomorrow")
        return attach(self, model, spec)

    monkeypatch.setattr(Lora, "attach", attach_without_numbers)
    (note,) = plans.notes([spec])
    assert note == (
        f"{spec.model}: trial: whether what lora learns can be saved was not tried: no small model takes it: "
        "ValueError: as with some methods of tomorrow"
    )
    monkeypatch.setattr(trial, "LARGEST", 1)
    trial._KEPT.clear()
    trial._try_out.cache_clear()
    assert trial.try_out(spec, {}).endswith("was tried: no small model can be made of its configuration")


def test_runs_that_differ_in_amounts_are_tried_once(spec_of):
    trial._try_out.cache_clear()
    config = families.CONFIGS["llama"]()
    for rank in (1, 2, 4):
        trial.try_out(spec_of(config, method={"name": "lora", "rank": rank}, seed=rank), {})
    assert trial._try_out.cache_info().misses == 1


def test_methods_are_tried_on_the_same_models_and_leave_them_as_they_were(spec_of, monkeypatch, untried):
    made, make = [], trial._made
    monkeypatch.setattr(trial, "_made", lambda *given: made.append(given) or make(*given))
    config = families.CONFIGS["gpt2"]()
    for name in ("full", "lora", "ia3", "adapter", "prefix", "bitfit"):
        spec = spec_of(config, method={"name": name})
        assert trial.try_out(spec, {}) == ""
    assert len(made) == 1
    tried = trial.small(spec, {}).state_dict()
    trial._KEPT.clear()
    for name, tensor in trial.small(spec, {}).state_dict().items():
        assert torch.equal(tried.pop(name), tensor)
    assert not tried


def test_a_padding_token_without_an_embedding_is_refused(tmp_path):
    shutil.copytree(models.BUILTIN / "tiny-llama", tmp_path / "model")
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    spec, rows = make_spec(model=str(tmp_path / "model")), len(tokenizer) - 1
    for refused in (partial(plans.count, spec), partial(models.load_base, spec, torch.device("cpu"), {})):
        with pytest.raises(InputError, match=rf'of {rows + 1} tokens pads with "\[PAD\]", number {rows}.*of {rows}:'):
            refused()


def test_the_share_that_is_quantized_is_said(spec_of):
    config = families.CONFIGS["qwen3-moe"]()
    spec = spec_of(config, quantization="nf4", method={"name": "lora", "targets": "attention"})
    base = models.skeleton(spec, {})
    linear = sum(p.numel() for name, p in base.named_parameters() if "self_attn" in name and p.ndim > 1)
    share = linear / sum(p.numel() for p in base.parameters())
    (note,) = plans.notes([spec])
    assert f"quantization: {share:.1%} of the parameters are nf4; not mlp.experts.gate_up_proj, mlp.exp" in note


def test_what_all_linear_does_not_reach_is_said(spec_of):
    config = families.CONFIGS["qwen3-moe"]()
    assert plans.notes([spec_of(config)]) == []
    (note,) = plans.notes([spec_of(config, method={"name": "loha"})])
    assert (
        "all-linear does not reach mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate with method loha" in note
    )
    (note,) = plans.notes([spec_of(families.CONFIGS["mamba"]())])
    assert "mixer.A_log, mixer.conv1d, mixer.dt_proj, mixer.out_proj with method lora" in note


@pytest.mark.parametrize("method", [{"rank": 8}, {"rank": 4, "rank_pattern": {"q_proj": 32}}])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rank_that_fits_the_model_alone_is_no_problem_of_the_small_one(init, method):
    """Both begin with singular vectors or an orthogonal factor of W0, of which a narrow layer has few."""
    trial.try_out(make_spec(method={"name": "lora", "init": init} | method), {})
