"""Encoder-decoders: what is read, learned and written beside transformers' own; every method on a T5 and on a BART."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model

from lorabench.config import plugins
from lorabench.config.decode import InputError, encode
from lorabench.data.dataset import read_data
from lorabench.launch import plan
from lorabench.launch.plan import refusals
from lorabench.methods._peft import tuner_layers
from lorabench.models.base_model import load_tokenizer, skeleton
from lorabench.models.remarks import remarks
from lorabench.models.targets import CONVOLUTIONS, PRESETS, head_modules, linear_layers, match, quantized_layers
from lorabench.spec.generate import Generate
from lorabench.spec.measures import MEASURES
from lorabench.spec.sweep import read_sweep
from lorabench.spec.task import IGNORE
from lorabench.store.generations import read_generations
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.tasks.seq2seq import AT_ONCE, Seq2seq
from lorabench.training.examples import collate, prepare
from lorabench.training.execute import Options, execute
from lorabench.training.passes import forward
from lorabench.updates.formats import read_updates
from tests import families
from tests.conftest import make_spec
from tests.methods.test_methods import CPU, add, load_base, tuned
from tests.training.test_generation import some_prompts, written

ROOT = Path(__file__).parents[2]
METHODS = plugins.names("methods")
BASES = ["t5", "bart"]
IMPOSSIBLE = {("bitfit", "t5"): "no biases"}
TASK = {"name": "seq2seq", "data": "builtin:arithmetic", "source": "{prompt}", "target": "{response}",
        "max_train": 16, "max_eval": 4}  # fmt: skip
SAME = {"atol": 2e-5, "rtol": 1e-4}
_IDS = {"d_model": 32, "vocab_size": 64, "max_position_embeddings": 64, "decoder_start_token_id": 1} | families._IDS
KINDS = {
    "t5": families.CONFIGS["t5"](),
    "t5-gated": families.CONFIGS["t5-gated"](tie_word_embeddings=False),
    "bart": families.CONFIGS["bart"](decoder_start_token_id=1),
    "mbart": t.MBartConfig(**families._SIDES, **_IDS),  # begins with what stands last, a language's name
    "m2m_100": t.M2M100Config(**families._SIDES, **_IDS),  # says by no method of its own what its decoder is given
    "pegasus": t.PegasusConfig(**families._SIDES, **_IDS),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tiny-llama")


def spec_of(base: str, encoder_decoders, method=None, task=None, **changes):
    method = method or {"name": "lora", "rank": 2}
    return make_spec(model=encoder_decoders[base], method=method, task=TASK | (task or {}), **({"lr": 5e-3} | changes))


def a_batch() -> dict[str, torch.Tensor]:
    """Of sources and targets of other lengths than one another."""
    draw = np.random.default_rng(0)
    sizes = ((7, 3), (4, 9), (5, 1))
    return collate(
        [dict(zip(("input_ids", "labels"), (draw.integers(3, 60, n).tolist() for n in size), strict=True))
         for size in sizes], 2, CPU,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_one_that_transformers_takes_of_the_labels(kind):
    torch.manual_seed(0)
    model, batch, task = t.AutoModelForSeq2SeqLM.from_config(KINDS[kind]).eval(), a_batch(), Seq2seq(**_fields(TASK))
    assert batch["input_ids"].shape == (3, 7) and batch["labels"].shape == (3, 9)
    with torch.no_grad():
        want, logits = model(**batch), forward(model, batch)
    torch.testing.assert_close(logits, want.logits, atol=1e-6, rtol=1e-6)
    assert task.count(batch) == 13
    assert float(task.loss(logits, batch)) / 13 == pytest.approx(float(want.loss), rel=1e-6)
    right = (logits.argmax(-1) == batch["labels"])[batch["labels"] != IGNORE]
    assert task.score(logits, batch) == (int(right.sum()), 13)


def _fields(task: dict) -> dict:
    return {key: value for key, value in task.items() if key != "name"}


def test_source_and_target_are_cut_apart_and_what_is_cut_has_no_end(tokenizer):
    task = Seq2seq(data="x", source="{a}", target="{b}", max_target=4)
    rows = [{"a": "one two three four five six", "b": "yes"}, {"a": "one", "b": "a target that is far too long for it"}]
    (first, second), end = task.examples(rows, tokenizer, 6, {}), tokenizer.eos_token_id
    whole = [tokenizer(row[key])["input_ids"] for row in rows for key in "ab"]
    assert first == {"input_ids": whole[0][:6], "labels": [*whole[1], end][:4]} and first["labels"][-1] == end
    assert second == {"input_ids": whole[2], "labels": whole[3][:4]}
    prompts = task.prompts(rows, tokenizer, 6)
    assert [p.ids.tolist() for p in prompts] == [first["input_ids"], second["input_ids"]]
    assert [(p.text, p.reference) for p in prompts] == [(row["a"], row["b"]) for row in rows]
    assert task.longest(6) == (6, 4) and replace(task, max_target=None).longest(6) == (6, 6)


def test_the_tokens_around_a_text_stay_where_it_is_cut():
    """As a BART has them; of the target the end is what it learns to stop by."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", *"abcdef"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    wrapped = t.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")
    task, row = Seq2seq(data="x", source="{a}", target="{b}", max_target=3), {"a": "a b c d e", "b": "a b c"}
    (example,) = task.examples([row], wrapped, 4, {})
    assert example == {"input_ids": [0, 3, 4, 1], "labels": [0, 3, 4]}
    (example,) = task.examples([row | {"b": "a"}], wrapped, 4, {})
    assert example["labels"] == [0, 3, 1]
    with pytest.raises(InputError, match="seq_len = 2: leaves no room beside"):
        list(task.examples([row], wrapped, 2, {}))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_presets_mean_what_they_mean_elsewhere(kind):
    """PEFT's own choice for both is query and value, of encoder, decoder and the attention between them."""
    with torch.device("meta"):
        model, other = (t.AutoModelForSeq2SeqLM.from_config(KINDS[kind]) for _ in range(2))
    assert head_modules(model) == ["lm_head"]
    attention, mlp = match(model, "attention"), match(model, "mlp")
    assert sorted([*attention, *mlp]) == sorted(match(model, "all-linear")) == sorted(linear_layers(model))
    assert len(attention) == 2 * 4 + 2 * 8 and len(mlp) == 2 * 2 + 2 * 2
    theirs = get_peft_model(other, LoraConfig(task_type="SEQ_2_SEQ_LM"))
    assert [name for name, _ in tuner_layers(theirs)] == match(model, "query-value")
    assert len(match(model, "query-value", "1")) == 6 and set(match(model, "query")) < set(match(model, "query-value"))
    assert all(match(model, preset) for preset in PRESETS if preset != CONVOLUTIONS)
    with pytest.raises(InputError, match="convolutions"):
        match(model, CONVOLUTIONS)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_adds_up_and_writes(name, base, encoder_decoders, tmp_path):
    """W0 + ΔW, what is saved and loaded, and what is merged compute what the tuned model does."""
    spec = spec_of(base, encoder_decoders, encode(plugins.example("methods", name)))
    if (name, base) in IMPOSSIBLE:
        assert any(IMPOSSIBLE[name, base] in problem for problem in refusals([spec]))
        return
    model, batch, losses, examples = tuned(spec, steps=6)
    assert losses[-1] < losses[0]
    spec.method.save(model, lambda: load_base(spec, examples), tmp_path, "updates")
    with torch.no_grad():
        want = forward(model, batch)
        loaded = spec.method.load(load_base(spec, examples), tmp_path, spec).eval()
        torch.testing.assert_close(forward(loaded, batch), want, **SAME)
        if not spec.method.adds_computation:
            summed = add(load_base(spec, examples), read_updates(tmp_path))
            torch.testing.assert_close(forward(summed, batch), want, **SAME)
            torch.testing.assert_close(forward(spec.method.merge(copy.deepcopy(model)), batch), want, **SAME)
    tokenizer, prompts = load_tokenizer(spec.model), some_prompts()
    found = written(model, spec, Generate(max_new_tokens=4, batch_size=4), prompts)
    tokens = [alone(model, prompt.ids, 4, tokenizer.eos_token_id) for prompt in prompts]
    assert found == tokenizer.batch_decode(tokens, skip_special_tokens=True) and any(found)


@torch.no_grad()
def alone(model, ids, new_tokens: int, end: int) -> list[int]:
    """Greedy, by a forward pass over everything for each token: the labels are what has been written, and one more."""
    found: list[int] = []
    while len(found) < new_tokens and end not in found:
        batch = {"input_ids": torch.tensor([[*map(int, ids)]]), "labels": torch.tensor([[*found, 0]])}
        found.append(int(forward(model, batch)[0, -1].argmax()))
    return found


@pytest.mark.parametrize("base", BASES)
def test_what_is_written_is_what_transformers_generates(base, encoder_decoders):
    """One source at a time; without what a BART's configuration asks for besides, an end where the length runs out."""
    spec = spec_of(base, encoder_decoders)
    model, prompts, tokenizer = load_base(spec, prepare(spec)), some_prompts(), load_tokenizer(spec.model)
    found = written(model, spec, Generate(max_new_tokens=8, batch_size=3), prompts)
    plain = t.AutoModelForSeq2SeqLM.from_pretrained(spec.model)
    plain.generation_config.forced_eos_token_id = None
    wanted = [
        plain.generate(input_ids=torch.tensor(p.ids[None].astype(int)), max_new_tokens=8, do_sample=False)[0]
        for p in prompts
    ]
    assert found == tokenizer.batch_decode(wanted, skip_special_tokens=True) and len(set(found)) > 1


def test_a_run_from_its_data_to_its_record(encoder_decoders, tmp_path):
    """Its answers again by rouge-score; of one set named thrice the losses are one; what is served is measured."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and only this worker needs it

    task = {"max_target": 40, "retain": TASK["data"], "tests": {"again": TASK["data"]}, "max_eval": 5,
            "generate": {"max_new_tokens": 12, "metrics": ["rougeL", "exact_match"], "splits": "both"}}  # fmt: skip
    method = {"name": "lora", "rank": 4, "targets": "all-linear"}
    spec = spec_of("t5", encoder_decoders, method, task, steps=30, lr=2e-2, seq_len=12, batch_size=4, serving=True)
    assert refusals([spec]) == []
    store = Store(tmp_path)
    store.write_spec(spec)
    assert execute(spec, store, Options(device="cpu")) == Status.DONE
    record = store.read(spec.id)
    found, scorer = record.measures, RougeScorer(["rougeL"])
    assert found["retain_loss_before"] == found["base_valid_loss"] > found["valid_loss"] == found["retain_loss_after"]
    assert found["forgetting"] == pytest.approx(found["valid_loss"] - found["base_valid_loss"])
    assert found["test_again_loss"] == found["test_loss"] and found["test_again_rougeL"] == found["test_rougeL"]
    rows = read_generations(store.folder(spec.id) / "generations.jsonl")
    for split, name in (("validation", "valid"), ("test", "test")):
        scores = [scorer.score(r.reference, r.output)["rougeL"].fmeasure for r in rows if r.split == split]
        assert len(scores) == 5 and found[f"{name}_rougeL"] == pytest.approx(np.mean(scores))
    assert found["test_rougeL"] > 0
    of_text = {name for name in MEASURES if "images" not in name}
    served = {name for name in of_text if name.startswith(("prefill_", "decode_", "added_", "mixed_", "swapped_"))}
    assert served <= set(found) and "serving" not in record.provenance and found["merge_error"] < 1e-3
    steps = [json.loads(line) for line in (store.folder(spec.id) / "steps.jsonl").read_text().splitlines()]
    assert len([row for row in steps if "grad_norm" in row]) == 30


def test_the_shipped_sweep_runs_on_what_is_built_in(tmp_path):
    """Nothing of it is refused, and two steps of one of its runs go from the data to answers."""
    sweep, store = read_sweep(ROOT / "sweeps" / "seq2seq.toml"), Store(tmp_path)
    assert refusals(sweep.runs) == []
    spec = replace(sweep.runs[0], steps=2, task=replace(sweep.runs[0].task, max_train=16, max_eval=4))
    store.write_spec(spec)
    assert execute(spec, store, Options(device="cpu")) == Status.DONE
    found = store.read(spec.id).measures
    assert found["valid_loss"] < found["base_valid_loss"] and found["test_exact_match"] == 0.0
    rows, given = read_generations(store.folder(spec.id) / "generations.jsonl"), read_data(spec.task.data)
    assert [(r.prompt, r.reference) for r in rows] == [(r["prompt"], r["response"]) for r in given.splits["test"][:4]]


def test_tokens_of_both_sides_count(encoder_decoders):
    from lorabench.training.base import Base
    from lorabench.training.batches import Rows
    from lorabench.training.meter import Meter
    from lorabench.training.state import Training

    spec = spec_of("t5", encoder_decoders, batch_size=8, micro_batch_size=4)
    training = Training.attach(spec, Base.read(spec, CPU), Meter.of_run(spec, CPU))
    parts, work = Rows(training).next()
    read = [int((part["input_ids"] != 2).sum()) for part in parts]
    learned = [int((part["labels"] != IGNORE).sum()) for part in parts]
    assert [len(part["input_ids"]) for part in parts] == [4, 4]
    assert (work.tokens, work.labels) == (sum(read) + sum(learned), sum(learned))
    assert work.shapes == tuple((*part["input_ids"].shape, part["labels"].shape[1]) for part in parts)
    assert work.padded == sum(part[key].numel() for part in parts for key in ("input_ids", "labels"))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"source": "{question}"}, ["task.source", "question", "Choices: prompt"]),
        ({"target": "no column"}, ["task.target", "every target would be the same"]),
        ({"generate": {"answer": "none"}}, ["test split: task.generate.answer", "whose target is"]),
        ({"max_target": 200}, ["task.max_target = 200: must be at most 128"]),
        ({"generate": {"max_new_tokens": 200}}, ["task.generate.max_new_tokens = 200: must be at most 128"]),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(task, words, encoder_decoders):
    (problem, *_) = refusals([spec_of("bart", encoder_decoders, task=task)])
    assert all(word in problem for word in words), problem


def test_what_is_empty_is_refused(tokenizer):
    task = Seq2seq(data="x", source="{a}", target="{b}")
    with pytest.raises(InputError, match=r'task\.source = "\{a\}": row 2 leaves nothing to read'):
        list(task.examples([{"a": "one", "b": ""}, {"a": "", "b": "two"}], tokenizer, 8, {}))
    with pytest.raises(InputError, match=r"task\.max_target = 0: must be at least 1"):
        make_spec(task=TASK | {"max_target": 0})
    with pytest.raises(
        InputError, match=r'task\.retain\.other\.name = "text": needs another kind of model than seq2seq'
    ):
        make_spec(task=TASK | {"retain": {"other": {"name": "text", "data": "builtin:english-docs"}}})


def test_of_rows_behind_those_that_are_asked_for_nothing_is_read(tokenizer):
    task = Seq2seq(data="x", source="{a}", target="{b}")
    rows = [{"a": f"number {n}", "b": "two"} for n in range(AT_ONCE + 3)] + [{"a": "", "b": "two"}]
    apart = [example for row in rows[:AT_ONCE] for example in task.examples([row], tokenizer, 8, {})]
    assert [*islice(task.examples(rows, tokenizer, 8, {}), AT_ONCE)] == apart
    with pytest.raises(InputError, match=rf"row {AT_ONCE + 4} leaves nothing to read"):
        list(task.examples(rows, tokenizer, 8, {}))


def test_a_model_that_cannot_do_it_is_refused(encoder_decoders, tmp_path):
    assert "a llama cannot do" in refusals([make_spec(task=TASK)])[0]
    model = t.AutoModelForSeq2SeqLM.from_pretrained(encoder_decoders["t5"])
    model.config.decoder_start_token_id = None
    model.save_pretrained(tmp_path)
    load_tokenizer(encoder_decoders["t5"]).save_pretrained(tmp_path)
    assert "no decoder_start_token_id" in refusals([make_spec(model=str(tmp_path), task=TASK)])[0]
    embeddings = {"name": "lora", "rank": 2, "embeddings": True}
    for base in BASES:
        assert "read one matrix" in refusals([spec_of(base, encoder_decoders, embeddings)])[0]


def test_the_plan_counts_an_output_matrix_of_its_own(encoder_decoders, tmp_path):
    """A Flan-T5's configuration reads to transformers as if it were the input embedding; its files hold another."""
    model = t.AutoModelForSeq2SeqLM.from_config(KINDS["t5-gated"])
    model.lm_head.weight = torch.nn.Parameter(torch.randn(1024, 32))
    model.save_pretrained(tmp_path)
    load_tokenizer(encoder_decoders["t5"]).save_pretrained(tmp_path)
    spec = make_spec(model=str(tmp_path), task=TASK, method={"name": "full"})
    loaded = load_base(spec, prepare(spec))
    assert loaded.lm_head.weight is not loaded.shared.weight
    assert plan.count(spec).num_trainable == sum(p.numel() for p in loaded.parameters())


@pytest.mark.parametrize("base", BASES)
def test_what_is_quantized_is_known_before(base, encoder_decoders):
    """Of a T5 transformers keeps `wo` as it is: ΔW and W0 of it are of exact weights."""
    spec = spec_of(base, encoder_decoders, quantization="nf4")
    loaded = load_base(spec, prepare(spec))
    names = [name for name, module in loaded.named_modules() if type(module).__name__ == "Linear4bit"]
    assert names == [*quantized_layers(skeleton(spec, {}))]
    remark = remarks(spec, loaded)["quantization"]
    assert remark == remarks(spec, skeleton(spec, {}))["quantization"]
    assert ("layer.2.DenseReluDense.wo, which bitsandbytes leaves as it is" in remark) == (base == "t5")


@pytest.mark.parametrize("sizes", [{"num_decoder_layers": 3}, {"num_decoder_layers": 1}, {"d_kv": 4}])
def test_a_prefix_is_of_the_decoder_s_shape(sizes, encoder_decoders, tmp_path):
    """A small Flan-T5's keys are narrower than it is; PEFT alone takes the model's width and the encoder's depth."""
    config = families.CONFIGS["t5"](**sizes)
    t.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    load_tokenizer(encoder_decoders["t5"]).save_pretrained(tmp_path)
    model, *_ = tuned(make_spec(model=str(tmp_path), task=TASK, method={"name": "prefix", "num_tokens": 5}), steps=1)
    (trained,) = [p for p in model.parameters() if p.requires_grad]
    assert trained.shape == (5, config.num_decoder_layers * 2 * config.num_heads * config.d_kv)
