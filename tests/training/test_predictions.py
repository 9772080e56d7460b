"""What is said of predicted tokens is what all positions' logits say, of every family, method and task."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers as t
from torch import nn

from lorabench.models.base_model import load_base, load_tokenizer
from lorabench.spec.task import IGNORE, Told
from lorabench.tasks.completion import Completion
from lorabench.tasks.multiple_choice import MultipleChoice
from lorabench.tasks.seq2seq import Seq2seq
from lorabench.training import predictions
from lorabench.training.examples import collate
from lorabench.training.live import LiveTensors
from lorabench.training.passes import autocast, forward
from lorabench.training.predictions import log_probs, task_loss, told
from tests.conftest import make_spec
from tests.families import CLASSIFIERS, CONFIGS, make

CPU = torch.device("cpu")
CAUSAL = {name: config for name, config in CONFIGS.items() if name not in CLASSIFIERS}
CHANGED = {  # that do something to their logits, or share their head with the embeddings
    "gemma2-capped": partial(t.Gemma2Config, **CONFIGS["gemma2"].keywords | {"final_logit_softcapping": 5.0}),
    "cohere": partial(t.CohereConfig, logit_scale=0.25, **CONFIGS["llama"].keywords),
    "granite": partial(t.GraniteConfig, logits_scaling=3.0, **CONFIGS["llama"].keywords),
    "llama-tied": partial(t.LlamaConfig, tie_word_embeddings=True, **CONFIGS["llama"].keywords),
}
METHODS = {
    "lora-on-head": {"name": "lora", "rank": 2, "targets": r"(q_proj|lm_head)"},
    "lora-and-head": {"name": "lora", "rank": 2, "head": True, "embeddings": True},
    "full": {"name": "full"},
    "adalora": {"name": "adalora"},
    "adapter": {"name": "adapter"},
    "prompt": {"name": "prompt", "num_tokens": 3},
    "prefix": {"name": "prefix", "num_tokens": 3},
    "ptuning": {"name": "ptuning", "num_tokens": 3},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of three positions."""
    monkeypatch.setitem(predictions.CHUNK_BYTES, "cpu", 3 * 4 * 1024)


def batch_of(lengths=(11, 4, 7), prompts=(5, 1, 0), vocabulary=1000):
    """Examples of these lengths, with something to predict behind their prompts alone."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    labels = [[IGNORE] * prompt + row[prompt:] for row, prompt in zip(rows, prompts, strict=True)]
    return collate([{"input_ids": ids, "labels": own} for ids, own in zip(rows, labels, strict=True)], 2, CPU)


def livened(model: nn.Module) -> nn.Module:
    """What is zero or one becomes some number, so that everything tells."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(found, wanted, rtol=1e-5) -> None:
    assert found.keys() == wanted.keys() and wanted
    scale = max(float(each.abs().max()) for each in wanted.values())
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], rtol=rtol, atol=rtol * scale, msg=partial("{}: {}".format, name)
        )


def check_same(model, task, batch) -> None:
    """Loss, gradients and what is told, beside those of all logits."""
    logits = forward(model, batch)
    plain, read = task.loss(logits, batch), task_loss(model, task, batch)
    assert float(read.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    check_gradients(gradients(model, read), gradients(model, plain))
    ours, theirs = told(model, batch, task.asked(batch)), Told.of(logits.detach(), task.asked(batch))
    torch.testing.assert_close(ours.nats, theirs.nats, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.is_right, theirs.is_right) and torch.equal(ours.targets, theirs.targets)


def is_known(model) -> bool:
    return predictions._KNOWN[model] is not None


@pytest.mark.parametrize("name", [*CAUSAL, *CHANGED])
def test_each_family_says_the_same(name):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(CHANGED[name]()) if name in CHANGED else make(name, "cpu")
    check_same(livened(model).eval(), Completion(), batch_of())
    assert is_known(model)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_each_decoder_says_the_same(name):
    torch.manual_seed(0)
    model = livened(t.AutoModelForSeq2SeqLM.from_config(CONFIGS[name](decoder_start_token_id=2))).eval()
    check_same(model, Seq2seq(), batch_of(prompts=(0, 0, 0)))
    assert is_known(model)


def test_what_a_model_does_that_is_not_known_is_left_to_it():
    class Shifted(t.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.arange(out.logits.shape[-1]) / 100
            return out

    torch.manual_seed(0)
    model = Shifted(CONFIGS["llama"]()).eval()
    check_same(model, Completion(), batch_of())
    assert not is_known(model)


def test_a_task_with_a_loss_of_its_own_is_given_logits():
    class Doubled(Completion):
        def loss(self, logits, batch):
            return 2 * super().loss(logits, batch)

    torch.manual_seed(0)
    model, batch = make("llama", "cpu"), batch_of()
    single = task_loss(model, Completion(), batch)
    assert float(task_loss(model, Doubled(), batch).detach()) == pytest.approx(2 * float(single.detach()), rel=1e-6)


def tuned(spec):
    torch.manual_seed(0)
    return spec.method.attach(load_base(spec, CPU, {}), spec)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_learns_the_same(name, tiny_bases):
    model = tuned(make_spec(method=METHODS[name], model=tiny_bases["llama"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    check_same(model.eval(), Completion(), batch_of())


def test_a_head_with_dropout_draws_as_one(tiny_bases):
    model = tuned(make_spec(method=METHODS["lora-on-head"] | {"dropout": 0.5}, model=tiny_bases["llama"])).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    batch, losses = batch_of(), []
    for loss in (
        lambda: Completion().loss(forward(model, batch), batch),
        lambda: task_loss(model, Completion(), batch),
    ):
        torch.manual_seed(0)
        losses.append(float(loss().detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # summed otherwise; another draw differs by far more


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_rounds_no_more(method, tiny_bases):
    """Each way beside float32; LoRA on a quantized base, whose head is not."""
    quantization = {"quantization": "nf4"} if method == "lora" else {}
    changes = {"method": {"name": method}, "model": tiny_bases["llama"], "dtype": "bfloat16"} | quantization
    spec = make_spec(**changes)
    model, batch = tuned(spec).eval(), batch_of()
    with autocast(spec, CPU):
        plain = Completion().loss(forward(model, batch), batch)
    wanted = gradients(model, plain)
    with autocast(spec, CPU):
        read = task_loss(model, Completion(), batch)
    found = gradients(model, read)
    assert float(read.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    assert is_known(predictions.base_of(model))
    check_gradients(found, wanted, rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_log_probabilities_and_their_gradients(name):
    """Weighed position by position, at a temperature, with the head trained."""
    torch.manual_seed(0)
    model = livened(t.LlamaForCausalLM({**CAUSAL, **CHANGED}[name]())).eval()
    batch, weights = batch_of(), torch.randn(3, 11)
    targets = Completion().targets(batch)
    logits = forward(model, batch).float() / 0.7
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    plain = torch.where(targets != IGNORE, picked, 0.0)
    found = log_probs(model, batch, targets, 0.7)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    check_gradients(gradients(model, (found * weights).sum()), gradients(model, (plain * weights).sum()))


def test_choices_are_scored_by_their_tokens_alone():
    """Wrong ones too, whose tokens are no labels."""
    task = MultipleChoice(data="", choices="c", question="{q}", answer="a")
    rows = [
        {"q": "Two and two?", "c": ["four", "five or more", "x"], "a": 0},
        {"q": "Is it?", "c": ["no", "y"], "a": 1},
    ]
    scored = task.scored(rows, load_tokenizer("builtin:tiny-llama"), 64, {})
    batch = collate([example for choices in scored for example in choices], 2, CPU)
    torch.manual_seed(0)
    model = livened(make("llama", "cpu")).eval()
    wanted = task.score(forward(model, batch), batch)
    found = task.score_tokens(told(model, batch, task.asked(batch)), batch)
    assert [choice.log_likelihood for choice in found] == pytest.approx([c.log_likelihood for c in wanted], rel=1e-5)
    assert [choice._replace(log_likelihood=0) for choice in found] == [c._replace(log_likelihood=0) for c in wanted]
    assert all(choice.tokens and choice.log_likelihood < 0 for choice in found)


@pytest.mark.parametrize("trained", ["adapter", "all"])
def test_a_step_needs_little_memory_beyond_what_the_head_is_given(trained, monkeypatch):
    """The logits of 4 x 128 positions are 32 MiB, and are there three times where they are computed all at once."""
    monkeypatch.setitem(predictions.CHUNK_BYTES, "cpu", 2**20)
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(CONFIGS["llama"](vocab_size=16384))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or "q_proj" in name)
    batch = batch_of(lengths=[128] * 4, prompts=[0] * 4)
    peaks = []
    for loss in (
        lambda: Completion().loss(forward(model, batch), batch),
        lambda: task_loss(model, Completion(), batch),
    ):
        model.zero_grad()
        task_loss(model, Completion(), batch_of())  # what the model does to its logits is tried once
        with LiveTensors(model.parameters()) as live:
            loss().backward()
        peaks.append(live.peak / 2**20)
    assert peaks[0] > 96
    assert peaks[1] < (0.3 if trained == "adapter" else 0.4) * peaks[0]
