"""Examples laid end to end: what each says, learns and sees is what it does alone."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as t

from lorabench.config.decode import InputError
from lorabench.models.flat import NAME, attend_by_example
from lorabench.spec.task import IGNORE
from lorabench.tasks.completion import Completion
from lorabench.training.base import Base
from lorabench.training.batches import Work
from lorabench.training.evaluation import metrics_of
from lorabench.training.examples import LENGTHS, collate, end_to_end
from lorabench.training.meter import Meter
from lorabench.training.passes import forward
from lorabench.training.state import Training
from lorabench.training.step import forward_backward
from lorabench.training.trial import check_flat, try_out
from tests.conftest import make_spec
from tests.families import CONFIGS
from tests.training.test_predictions import CAUSAL, CPU, batch_of, check_gradients, livened

APART = {*CAUSAL} - {"falcon", "bloom", "mamba", "mamba2", "qwen3-next", "gpt-oss"}
"""Families that tell examples apart."""
WINDOWED = {  # in which an example is longer than what its tokens attend to
    "mistral": t.MistralConfig(sliding_window=4, **CONFIGS["mistral"].keywords),
    "gemma2": t.Gemma2Config(sliding_window=4, **CONFIGS["gemma2"].keywords),
    "gemma3": t.Gemma3TextConfig(sliding_window=4, layer_types=["sliding_attention", "full_attention"],
                                 **CONFIGS["gemma3"].keywords),
    "llama4": t.Llama4TextConfig(attention_chunk_size=4, **CONFIGS["llama4"].keywords),
}  # fmt: skip


def model_of(config):
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", sorted(CAUSAL))
def test_the_families_that_cannot_are_told_by_trial(name):
    """On random weights as a configuration gives them, as a plan does."""
    spec, model = make_spec(padding="free"), model_of(CAUSAL[name]())
    if name in APART:
        check_flat(spec, model)
    else:
        with pytest.raises(InputError, match=rf'padding = "free": {type(model).__name__} cannot tell examples apart'):
            check_flat(spec, model)
    check_flat(make_spec(), model)


@pytest.mark.parametrize("name", [*sorted(APART), *(f"{name}, windowed" for name in WINDOWED)])
def test_each_example_says_what_it_says_alone(name):
    family, _, is_windowed = name.partition(", ")
    model = livened(model_of(WINDOWED[family] if is_windowed else CAUSAL[family]()))
    batch, lengths = batch_of(), (11, 4, 7)
    with torch.no_grad():
        alone = [{"input_ids": ids[None, :length]} for ids, length in zip(batch["input_ids"], lengths, strict=True)]
        wanted = [forward(model, each) for each in alone]
        attend_by_example(model)
        found = forward(model, end_to_end(batch)).split(lengths, 1)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_example_moves_by_what_another_is(attention, checkpointing):
    """The loss of one has no gradient at the others' tokens, and at its own the one that it has alone."""
    model = livened(model_of(CAUSAL["llama"]())).train()
    model.set_attn_implementation(attention)
    attend_by_example(model)
    assert (model.config._attn_implementation == NAME) is (attention == "sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch, embedded = batch_of(prompts=(0, 0, 0)), []
    model.get_input_embeddings().register_forward_hook(lambda *given: embedded.append(given[-1]))
    row = end_to_end(batch)
    for place, (start, length) in enumerate(((0, 11), (11, 4), (15, 7))):
        own = torch.full_like(row["labels"], IGNORE)
        own[:, start : start + length] = row["labels"][:, start : start + length]
        (gradient,) = torch.autograd.grad(Completion().loss(forward(model, row), row | {"labels": own}), embedded[-1])
        alone = {key: batch[key][place : place + 1, :length] for key in ("input_ids", "labels")}
        (wanted,) = torch.autograd.grad(Completion().loss(forward(model, alone), alone), embedded[-1])
        torch.testing.assert_close(gradient[:, start : start + length], wanted, rtol=1e-4, atol=1e-6)
        assert wanted.any() and not gradient[:, :start].any() and not gradient[:, start + length :].any()


def data_of(folder) -> str:
    for split, size in {"train": 8, "validation": 5}.items():
        rows = [{"q": "what is " * (1 + 3 * n % 7), "a": "that " * (1 + n % 4)} for n in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


CHOICES = {"question": "{q}", "choices": "q, a", "answer": "a", "answer_is": "text"}


def step_of(spec) -> tuple[float, dict[str, torch.Tensor], Work, dict[str, float]]:
    """The loss of a run's first step, its gradients and what there was to do; validation before it."""
    training = Training.attach(spec, Base.read(spec, CPU), Meter.of_run(spec, CPU))
    found = metrics_of(training.model, spec, training.examples, "validation")
    parts, work = spec.objective.batches(training, lambda: None).next()
    training.model.train()
    loss = forward_backward(training, parts, spec.objective.batches(training, lambda: None)) / max(work.labels, 1)
    return float(loss), {n: p.grad for n, p in training.model.named_parameters() if p.grad is not None}, work, found


@pytest.mark.parametrize("method", ["lora", "full", "adapter"])
@pytest.mark.parametrize("task", ["completion", "multiple_choice"])
def test_a_run_learns_and_measures_the_same(method, task, tmp_path):
    own = {"prompt": "{q}", "response": "{a}"} if task == "completion" else CHOICES
    changes = {"task": {"name": task, "data": data_of(tmp_path)} | own, "method": {"name": method}, "batch_size": 4}
    changes |= {"micro_batch_size": 2} if method == "lora" else {}
    loss, wanted, padded, measured = step_of(make_spec(**changes))
    ours, found, free, also = step_of(make_spec(padding="free", **changes))
    assert ours == pytest.approx(loss, rel=1e-5)
    check_gradients(found, wanted, rtol=1e-4)
    assert also == pytest.approx(measured, rel=1e-5) and len(also) > 2
    assert (free.tokens, free.labels) == (padded.tokens, padded.labels)
    assert free.padded == free.tokens < padded.padded
    assert [rows for rows, _ in free.shapes] == [1] * 4


def test_what_cannot_be_free_of_padding_is_refused_when_it_is_read(labelled, tmp_path):
    classes = {"name": "classification", "data": labelled}
    pairs = {"name": "seq2seq", "source": "{q}", "target": "{a}"}
    text = {"name": "text"}
    generate = {"max_new_tokens": 2, "answer": "d", "metrics": ["exact_match"]}
    written = {"name": "completion", "prompt": "{q}", "response": "{a}", "generate": generate}
    for changes, reason in (
        ({"task": classes}, 'task.name = "classification" has a label an example'),
        ({"task": pairs}, 'task.name = "seq2seq" pads what it reads'),
        ({"task": text, "method": {"name": "prompt"}}, "method prompt puts its vectors in front of a row"),
        ({"task": text, "method": {"name": "prefix"}}, "method prefix puts its vectors in front of a row"),
        ({"task": written, "objective": {"name": "grpo", "group": 2}}, "objective grpo weighs its answers row by row"),
    ):
        make_spec(**changes)
        with pytest.raises(InputError, match=f'^padding = "free": .*{reason}.*use padding = "longest"$'):
            make_spec(padding="free", **changes)
    with pytest.raises(InputError, match=r'padding = "none": .*Choices: longest, free'):
        make_spec(padding="none")


def test_a_plan_tells_what_a_model_cannot(tmp_path):
    folder = tmp_path / "mamba"
    CAUSAL["mamba"]().save_pretrained(folder)
    spec = make_spec(model=str(folder), padding="free")
    with pytest.raises(InputError, match="MambaForCausalLM cannot tell examples apart"):
        try_out(spec, {})
    assert not try_out(make_spec(model=str(folder)), {})


def test_runs_that_pad_keep_their_ids():
    assert make_spec(padding="longest").id == make_spec().id != make_spec(padding="free").id
    assert "padding" not in make_spec().to_json()


def test_a_row_tells_where_its_examples_are():
    examples = [{"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    row = end_to_end(collate(examples, 2, CPU))
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert row["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, 9]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert row[LENGTHS].tolist() == [3, 2] and "attention_mask" not in row
