"""What is said of predicted tokens is what all positions' logits say, of every family, method and task."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t
from torch import nn

from lorabench.methods.lora import Lora
from lorabench.spec.task import IGNORE, LanguageModeling, Told
from lorabench.tasks.completion import Completion
from lorabench.tasks.seq2seq import Seq2seq
from lorabench.tasks.text import Text
from lorabench.training import predictions
from lorabench.training.examples import collate
from lorabench.training.passes import forward
from lorabench.training.predictions import log_probs, task_loss, told
from tests.conftest import make_spec
from tests.families import CLASSIFIERS, CONFIGS, make

CPU = torch.device("cpu")
CAUSAL = [name for name in CONFIGS if name not in CLASSIFIERS]
OWN = {  # that do something to their logits
    "gemma2": t.Gemma2Config(final_logit_softcapping=5.0, **CONFIGS["gemma2"].keywords),
    "cohere": t.CohereConfig(logit_scale=0.25, **CONFIGS["llama"].keywords),
    "granite": t.GraniteConfig(logits_scaling=3.0, **CONFIGS["llama"].keywords),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(predictions.CHUNK_BYTES, "cpu", 3 * 4 * 1024)


def batch_of(lengths=(11, 4, 7), prompts=(5, 1, 0), segments=()):
    """Examples of these lengths, with something to predict behind their prompts alone."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 1000, (length,), generator=generator).tolist() for length in lengths]
    labels = [[IGNORE] * prompt + row[prompt:] for row, prompt in zip(rows, prompts, strict=True)]
    return collate([{"input_ids": ids, "labels": own} for ids, own in zip(rows, labels, strict=True)], 2, CPU)


def livened(model: nn.Module) -> nn.Module:
    """All that is zero or one becomes some number, so that logits differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(model, task, batch, rtol=1e-6) -> None:
    """Loss, gradients and what is told, beside those of all logits."""
    logits = forward(model, batch)
    plain, read = task.loss(logits, batch), task_loss(model, task, batch)
    assert float(read.detach()) == pytest.approx(float(plain.detach()), rel=rtol)
    wanted, found = gradients(model, plain), gradients(model, read)
    assert found.keys() == wanted.keys()
    scale = max(float(each.abs().max()) for each in wanted.values())
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
    ours, theirs = told(model, batch, task.asked(batch)), Told.of(logits, task.asked(batch))
    torch.testing.assert_close(ours.nats, theirs.nats, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.is_right, theirs.is_right) and torch.equal(ours.targets, theirs.targets)


def is_known(model) -> bool:
    return predictions._KNOWN[model] is not None


@pytest.mark.parametrize("name", [*CAUSAL, *OWN])
def test_each_family_says_the_same(name):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(OWN[name]) if name in OWN else make(name, "cpu")
    check_same(livened(model).eval(), Completion(), batch_of())
    assert is_known(model)
