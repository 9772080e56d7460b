"""Encoder-decoders: what is fed, predicted and written beside transformers' own; every method on a T5 and a BART."""

from __future__ import annotations

import copy

import pytest
import torch

from lorabench.config import plugins
from lorabench.config.decode import encode
from lorabench.models.base_model import load_tokenizer
from lorabench.spec.generate import Generate
from lorabench.training.passes import forward
from lorabench.updates.formats import read_updates
from tests.conftest import make_spec
from tests.methods.test_methods import add, load_base, tuned
from tests.training.test_generation import some_prompts, written

METHODS = plugins.names("methods")
BASES = ["t5", "bart"]
IMPOSSIBLE = {("bitfit", "t5"): "no biases"}
TASK = {"name": "seq2seq", "data": "builtin:arithmetic", "source": "{prompt}", "target": "{response}",
        "max_train": 16, "max_eval": 4}  # fmt: skip


def spec_of(base: str, encoder_decoders, method=None, task=None, **changes):
    method = method or {"name": "lora", "rank": 2}
    return make_spec(model=encoder_decoders[base], method=method, task=TASK | (task or {}), **({"lr": 5e-3} | changes))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [*METHODS])
def test_every_method_learns_and_adds_up(name, base, encoder_decoders, tmp_path):
    """W0 + ΔW, what is saved and loaded, and what is merged compute what the tuned model does, and so it writes."""
    if (name, base) in IMPOSSIBLE:
        return
    spec = spec_of(base, encoder_decoders, encode(plugins.example("methods", name)))
    model, batch, losses, examples = tuned(spec, steps=10)
    assert losses[-1] < losses[0]
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    same = {"atol": 2e-5, "rtol": 1e-4}
    with torch.no_grad():
        want = forward(model, batch)
        loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        torch.testing.assert_close(forward(loaded, batch), want, **same)
        if not spec.method.adds_computation:
            torch.testing.assert_close(
                forward(add(load_base(spec, examples), read_updates(tmp_path)), batch), want, **same
            )
            merged = spec.method.merge(copy.deepcopy(model))
            torch.testing.assert_close(forward(merged, batch), want, **same)
    tokenizer, prompts = load_tokenizer(spec.model), some_prompts()
    found = written(model, spec, Generate(max_new_tokens=6, batch_size=4), prompts)
    for prompt, text in zip(prompts, found, strict=True):
        assert text == tokenizer.decode(alone(model, prompt.ids, 6, tokenizer.eos_token_id), skip_special_tokens=True)


@torch.no_grad()
def alone(model, ids, new_tokens: int, end: int) -> list[int]:
    """Greedy, by a forward pass over everything for each token: the labels are what has been written, and one more."""
    found: list[int] = []
    while len(found) < new_tokens and end not in found:
        batch = {"input_ids": torch.tensor([[*map(int, ids)]]), "labels": torch.tensor([[*found, 0]])}
        found.append(int(forward(model, batch)[0, -1].argmax()))
    return found
