"""What is written is what the model would write to each prompt alone, without a cache: token by token."""

from __future__ import annotations

import hashlib
import json
import tomllib

import numpy as np
import pytest
import torch

from lorabench.config import plugins
from lorabench.config.decode import InputError, decode
from lorabench.launch.plan import refusals
from lorabench.models.base_model import load_tokenizer
from lorabench.processes.distributed import World
from lorabench.spec.generate import Generate
from lorabench.spec.measures import MEASURES
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import parse_sweep
from lorabench.spec.task import Prompt
from lorabench.store.generations import read_generations
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training import generation
from lorabench.training.data_check import usable_of
from lorabench.training.execute import Options, execute
from lorabench.training.passes import autocast, forward
from lorabench.training.scoring import Answer, scores
from tests.conftest import make_spec
from tests.methods.test_methods import CPU, IMPOSSIBLE, attach, method_spec, prepare, take_steps

METHODS = plugins.names("methods")
LENGTHS = (1, 9, 4, 17, 2)


def trained(name: str, base: str, tiny_bases, labelled, **changes):
    spec = method_spec(name, base, tiny_bases, labelled, **changes)
    examples = prepare(spec)
    model = attach(spec, examples)
    take_steps(spec, model, examples, 3)
    return spec, model.eval()


def some_prompts() -> list[Prompt]:
    generator = np.random.default_rng(0)
    return [Prompt(ids=generator.integers(3, 1000, n).astype(np.int32), text=str(n), reference="") for n in LENGTHS]


@torch.no_grad()
def alone(model, spec, ids, new_tokens: int, end: int) -> list[int]:
    """Greedy, by a forward pass over everything for each token."""
    found = list(map(int, ids))
    for _ in range(new_tokens):
        with autocast(spec, CPU):
            logits = forward(model, {"input_ids": torch.tensor([found])})[0, -1]
        found.append(int(logits.argmax()))
        if found[-1] == end:
            break
    return found[len(ids) :]


def written(model, spec, generate: Generate, prompts: list[Prompt], **options) -> list[str]:
    return [answer.output for answer in generation.answers(model, spec, generate, prompts, **options)]


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_gives_what_each_prompt_gives_alone(name, base, tiny_bases, labelled):
    if (name, base) in IMPOSSIBLE:
        pytest.skip(IMPOSSIBLE[name, base])
    spec, model = trained(name, base, tiny_bases, labelled)
    tokenizer, prompts = load_tokenizer(spec.model), some_prompts()
    found = written(model, spec, Generate(max_new_tokens=6, batch_size=4), prompts)
    end = tokenizer.eos_token_id
    for prompt, text in zip(prompts, found, strict=True):
        tokens = alone(model, spec, prompt.ids, 6, end)
        assert text == tokenizer.decode([t for t in tokens if t != end], skip_special_tokens=True)


def test_what_a_base_s_own_configuration_asks_for_is_left_out(tiny_bases, labelled):
    """A temperature, a penalty of repetition, a least length: they would be another decoding than the spec's."""
    spec, model = trained("lora", "llama", tiny_bases, labelled)
    generate, prompts = Generate(max_new_tokens=8), some_prompts()
    before = written(model, spec, generate, prompts)
    own = model.get_base_model().generation_config
    own.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, min_new_tokens=8, num_beams=3
    )
    assert written(model, spec, generate, prompts) == before
    assert model.get_base_model().generation_config is own and own.num_beams == 3


def test_an_answer_ends_at_the_end_and_begins_behind_the_tail(tiny_bases, labelled, monkeypatch):
    spec, model = trained("lora", "llama", tiny_bases, labelled)
    tokenizer = load_tokenizer(spec.model)
    texts = tokenizer("= 4", add_special_tokens=False)["input_ids"]
    row = torch.tensor([[*texts, tokenizer.eos_token_id, *texts]])
    monkeypatch.setattr(generation, "_generate", lambda *_: row)
    prompt = Prompt(ids=np.array([5]), text="3 + 1 =", reference="4", tail="=")
    assert written(model, spec, Generate(), [prompt]) == [tokenizer.decode(texts).removeprefix("=")]


def test_draws_are_by_their_seed_and_leave_the_others_alone(tiny_bases, labelled):
    spec, model = trained("lora", "llama", tiny_bases, labelled)
    prompts, state = some_prompts(), torch.get_rng_state()
    first, again, other = (
        written(model, spec, Generate(max_new_tokens=6, temperature=1.0, seed=seed), prompts) for seed in (0, 0, 1)
    )
    greedy = written(model, spec, Generate(max_new_tokens=6), prompts)
    cold = written(model, spec, Generate(max_new_tokens=6, temperature=1e-4), prompts)
    assert first == again != other and cold == greedy != first
    assert torch.equal(torch.get_rng_state(), state)


def test_several_ranks_take_the_batches_in_turn(tiny_bases, labelled, monkeypatch):
    spec, model = trained("lora", "llama", tiny_bases, labelled)
    generate, prompts = Generate(max_new_tokens=4, batch_size=2), some_prompts()
    want = generation.answers(model, spec, generate, prompts)
    shares: list = []
    monkeypatch.setattr(World, "gather", lambda self, value: shares.append(value) or [value, *shares[:-1]])
    from lorabench.processes.distributed import Place

    with pytest.raises(KeyError):  # the first has seen its own share alone
        generation.answers(model, spec, generate, prompts, world=World(place=Place(rank=0, size=2)))
    found = generation.answers(model, spec, generate, prompts, world=World(place=Place(rank=1, size=2)))
    assert found == want and sorted(len(share) for share in shares) == [2, 3]


def addition(folder):
    """A data set, unless it is there."""
    if (folder / "train.jsonl").exists():
        return str(folder)
    for split, first in {"train": 0, "validation": 40, "test": 60}.items():
        rows = [{"q": f"{n} + 1 ", "a": f"= {n + 1}"} for n in range(first, first + 20)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def writing_spec(folder, **changes) -> RunSpec:
    task = {"name": "completion", "data": addition(folder), "prompt": "{q}", "response": "{a}", "max_eval": 5}
    task["generate"] = {"max_new_tokens": 4, "metrics": ["exact_match", "bleu"], "answer": r"= (\d+)", "splits": "both"}
    return make_spec(**({"task": task} | changes))


def test_a_run_keeps_what_it_wrote_and_that_can_be_scored_again(tmp_path):
    spec, store = writing_spec(tmp_path), Store(tmp_path / "results")
    store.write_spec(spec)
    assert execute(spec, store, Options(device="cpu")) == Status.DONE
    record, file = store.read(spec.id), store.folder(spec.id) / "generations.jsonl"
    assert record.generations_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    rows = read_generations(file)
    assert [(row.split, row.number) for row in rows] == [(s, n) for s in ("validation", "test") for n in range(1, 6)]
    for split, key in (("validation", "valid"), ("test", "test")):
        mine = [row for row in rows if row.split == split]
        texts = [Answer(prompt=row.prompt, reference=row.reference, output=row.output) for row in mine]
        again, own = scores(texts, spec.task.generation)
        assert own == [row.scores for row in mine]
        assert again == {name: record.measures[f"{key}_{name}"] for name in again}
        assert record.measures[f"base_{key}_num_generated"] == 5
    assert record.measures["generate_seconds"] > 0 and set(record.measures) <= set(MEASURES)
    file.write_text("")
    assert store.verified(store.state(spec.id)).status == Status.CORRUPT


def test_a_run_stopped_while_it_writes_ends_with_the_same_bits(tmp_path, monkeypatch):
    whole, stopped = Store(tmp_path / "whole"), Store(tmp_path / "stopped")
    spec = writing_spec(tmp_path, seed=1)
    for store in (whole, stopped):
        store.write_spec(spec)
    execute(spec, whole, Options(device="cpu"))
    real, seen = generation._generate, []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 4:  # the base's two splits, and the first of the tuned model's
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(generation, "_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(spec, stopped, Options(device="cpu"))
    monkeypatch.setattr(generation, "_generate", real)
    assert execute(spec, stopped, Options(device="cpu")) == Status.DONE
    ours, theirs = (store.folder(spec.id) / "generations.jsonl" for store in (whole, stopped))
    assert ours.read_bytes() == theirs.read_bytes()
    first, second = whole.read(spec.id), stopped.read(spec.id)
    names = [name for name in first.measures if "exact_match" in name or "bleu" in name]
    assert len(names) == 24 and all(first.measures[name] == second.measures[name] for name in names)


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        ({"metrics": []}, r"task\.generate\.metrics = \[\]: needs at least one"),
        ({"metrics": ["exact"]}, r"task\.generate\.metrics.*exact_match"),
        ({"metrics": ["bleu", "bleu"]}, "names one twice"),
        ({"metrics": ["bleu"], "answer": "x"}, r'is for metrics = \["exact_match"\] alone'),
        ({"answer": "("}, "not a regular expression"),
        ({"top_p": 0.5}, "temperature above 0"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"length": 3}, "unknown key"),
        ({"answer": "x*"}, "matches an empty text"),
        ({"temperature": 1.0, "seed": 2**32}, r"task\.generate\.seed = 4294967296: must be less than"),
        (3, "must be a table with the fields of generate"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_read(generate, message):
    with pytest.raises(InputError, match=message):
        make_spec(task={"name": "completion", "data": "builtin:python-code", "generate": generate})


def test_a_reference_without_an_answer_and_a_split_that_is_not_there(tmp_path):
    spec = writing_spec(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"q": "1 + 1 ", "a": "= two"}\n')
    assert refusals([spec])[0].startswith("test split: task.generate.answer = ") and "= two" in refusals([spec])[0]
    (tmp_path / "test.jsonl").unlink()
    usable_of.cache_clear()
    assert refusals([writing_spec(tmp_path, task=spec.to_json()["task"] | {"max_train": 7})]) == [
        'test split: task.generate.splits = "both": there is no such split; use "validation"'
    ]


def test_specs_without_it_keep_their_ids():
    spec = make_spec(task={"name": "completion", "data": "builtin:python-code"})
    assert "generate" not in spec.to_json()["task"]


SWEEP = """
[base]
model = "builtin:tiny-llama"
task = { name = "completion", data = "builtin:arithmetic", generate = { max_new_tokens = 4, splits = "SPLITS" } }
method = { name = "lora", rank = 2 }
[[grid]]
lr = [1e-3, 1e-2]
[select]
by = "MEASURE"
"""


@pytest.mark.parametrize(
    ("splits", "measure", "words"),
    [
        ("test", "valid_exact_match", "measured by no run of this sweep"),
        ("both", "base_valid_exact_match", "measured by no run of this sweep, or cannot be used here"),
        ("both", "valid_exact_match_low", "cannot be used here"),
        ("test", "valid_rouge1", "measured by no run of this sweep"),
    ],
)
def test_nothing_is_selected_by_what_no_run_measures(splits, measure, words):
    with pytest.raises(InputError, match=words):
        parse_sweep(tomllib.loads(SWEEP.replace("SPLITS", splits).replace("MEASURE", measure)))
    right = SWEEP.replace("SPLITS", "both").replace("MEASURE", "valid_exact_match")
    assert parse_sweep(tomllib.loads(right)).select.by == "valid_exact_match"


def test_answers_that_would_be_lost_or_not_fit_are_refused(tmp_path):
    task = writing_spec(tmp_path).to_json()["task"]
    with pytest.raises(InputError, match=r"tasks 1: task\.generate: only the last task's prompts"):
        decode(RunSpec, {"method": {"name": "lora"}, "tasks": [task, {"name": "text"}]})
    long = writing_spec(tmp_path, task=task | {"generate": task["generate"] | {"max_new_tokens": 500}})
    assert refusals([long])[0].startswith("task.generate.max_new_tokens = 500: must, with seq_len = 32, be at most 512")
