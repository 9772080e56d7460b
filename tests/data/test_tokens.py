"""What a tokenizer gives beside the tokens of a text is passed on: segments, beginnings of sequences, word marks."""

from __future__ import annotations

import contextlib
import json
import re
import shutil

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from lorabench.data.tokens import opening, prompt_and_response
from lorabench.models.base_model import BUILTIN, load_tokenizer
from lorabench.spec.task import IGNORE
from lorabench.tasks.classification import Classification
from lorabench.tasks.completion import Completion
from lorabench.tasks.text import Text
from lorabench.training.data_check import token_problems
from lorabench.training.examples import collate
from lorabench.training.passes import forward
from tests import families
from tests.conftest import make_spec

WORDS = ["<unk>", "<s>", "</s>", "▁Is", "▁it", "?", "\n", "yes", "▁yes", "▁", "A", "▁A", ":", "no", "▁no"]
CPU = torch.device("cpu")


def tokenizer_of(begins: bool) -> PreTrainedTokenizerFast:
    """One like Llama 2's: a word mark before each word, and with `begins` a token before each text."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    tokenizer.decoder = decoders.Metaspace()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def words(ids):
    return [WORDS[number] for number in ids if number != IGNORE]


@pytest.mark.parametrize("begins", [False, True])
def test_the_opening_is_what_stands_before_a_text(begins):
    tokenizer = tokenizer_of(begins)
    assert opening(tokenizer) == tokenizer("")["input_ids"] == ([1] if begins else [])


def test_each_block_of_text_begins_as_the_tokenizer_does():
    rows = [{"text": "Is it yes"}, {"text": "Is it no"}] * 3
    plain, begun = (list(Text().examples(rows, tokenizer_of(begins), 4, {})) for begins in (False, True))
    stream = words([token for example in plain for token in example["input_ids"]])
    assert stream == ["▁Is", "▁it", "▁yes", "</s>", "▁Is", "▁it", "▁no", "</s>"] * 3
    assert all(words(example["input_ids"])[0] == "<s>" and len(example["input_ids"]) == 4 for example in begun)
    assert words([token for example in begun for token in example["input_ids"][1:]]) == stream


def test_a_text_task_takes_no_rows():
    assert list(Text().examples([], tokenizer_of(True), 8, {})) == []


@pytest.mark.parametrize("begins", [False, True])
def test_a_response_is_cut_up_with_its_prompt(begins):
    """Alone it would begin with a word mark, which nothing stands for in the text."""
    tokenizer = tokenizer_of(begins)
    (example,) = Completion(prompt="Is it?\n", response="yes").examples([{}], tokenizer, 32, {})
    assert words(example["labels"]) == ["yes", "</s>"]
    assert example["input_ids"] == [*tokenizer("Is it?\nyes")["input_ids"], 2]


def test_a_space_before_the_response_is_of_its_first_word():
    before, answer = prompt_and_response(tokenizer_of(False), "A: ", "yes")
    assert (words(before), words(answer)) == (["▁A", ":"], ["▁yes"])


def test_without_offsets_the_prompts_tokens_tell():
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return tokenizer_of(False)(text, **options)

    assert prompt_and_response(Slow(), "Is it?\n", "yes") == prompt_and_response(tokenizer_of(False), "Is it?\n", "yes")
    before, answer = prompt_and_response(Slow(), "A: ", "yes")  # together they begin otherwise: apart
    assert (words(before), words(answer)) == (["▁A", ":", "▁"], ["▁yes"])


@pytest.mark.parametrize("prompt", ["Is it? no\n", "<s>Is it? no\n"])
@pytest.mark.parametrize("seq_len", [4, 5, 30])
def test_a_prompt_begins_once_also_where_it_is_cut(seq_len, prompt):
    (example,) = Completion(prompt=prompt, response="yes").examples([{}], tokenizer_of(True), seq_len, {})
    found = words(example["input_ids"])
    assert found[0] == "<s>" and found.count("<s>") == 1 and found[-3:] == ["\n", "yes", "</s>"]
    assert len(found) == min(seq_len, 8)


def test_a_response_ends_once():
    (example,) = Completion(prompt="A:", response="yes</s>").examples([{}], tokenizer_of(False), 9, {})
    assert words(example["labels"]) == ["yes", "</s>"]


@pytest.fixture(scope="module")
def bert(tiny_bases, tmp_path_factory):
    """A BERT with a tokenizer that gives segments, as the real one does."""
    folder = tmp_path_factory.mktemp("segments")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bases["bert"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", pair="<|bos|> $A <|eos|> $B:1 <|eos|>:1",
        special_tokens=[("<|bos|>", tokenizer.bos_token_id), ("<|eos|>", tokenizer.eos_token_id)],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bases["bert"]).eval()
    for weight in (model.bert.embeddings.token_type_embeddings.weight, model.classifier.weight):
        torch.nn.init.normal_(weight)  # as drawn by transformers, a segment would hardly be seen in the logits
    return AutoTokenizer.from_pretrained(folder), model


@torch.no_grad()
def test_segments_of_pairs_reach_the_model_as_transformers_encodes_them(bert):
    """Also a batch with padding, and one in which the first row's second text was cut off."""
    tokenizer, model = bert
    rows = [{"a": "one " * 30, "b": "two", "label": 0}, {"a": "a text", "b": "and more of it", "label": 1}]
    task = Classification(data="", text="a", text_pair="b")
    examples = list(task.examples(rows, tokenizer, 16, task.model_options(rows)))
    logits = forward(model, collate(examples, tokenizer.pad_token_id, CPU))
    for row, found in zip(rows, logits, strict=True):
        encoded = tokenizer(row["a"], row["b"], truncation=True, max_length=16, return_tensors="pt")
        assert encoded["token_type_ids"].any()
        torch.testing.assert_close(found, model(**encoded).logits[0], rtol=1e-4, atol=1e-5)
        without = model(input_ids=encoded["input_ids"]).logits[0]
        assert (found - without).abs().max() > 0.01


@torch.no_grad()
def test_segments_are_left_out_where_the_model_has_none(tiny_bases):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bases["llama"]).eval()
    model.config.pad_token_id = 2
    batch = collate([{"input_ids": [5, 6], "token_type_ids": [0, 1], "labels": 1}], 2, CPU)
    assert torch.equal(forward(model, batch), model(input_ids=batch["input_ids"]).logits)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A folder whose tokenizer ends a text as asked: `$A </s>`."""
    folder = tmp_path_factory.mktemp("t5")
    AutoModelForSequenceClassification.from_config(families.CONFIGS["t5"]()).save_pretrained(folder / "model")

    def make(name, template, pad=None):
        made = shutil.copytree(folder / "model", folder / name)
        tokenizer = AutoTokenizer.from_pretrained(BUILTIN / "tiny-llama")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<|eos|>", tokenizer.eos_token_id)]
        )
        tokenizer.pad_token = pad or tokenizer.pad_token
        tokenizer.save_pretrained(made)
        return str(made)

    return make


@pytest.mark.parametrize(
    ("template", "pad", "texts", "problem"),
    [
        ("$A <|eos|>", None, ["one", "two words"], None),
        (
            "$A",
            None,
            ["one", "two words"],
            r"number 1, and its tokenizer puts none at .* \(train split: .*/train\.jsonl, line 1\)",
        ),
        ("$A <|eos|>", "<|eos|>", ["one", "two words"], "and its tokenizer pads with that"),
        (
            "$A <|eos|>",
            None,
            ["one", "two<|eos|>words"],
            r"train split: .*\.jsonl, line 2 has 2 of them, rows before it 1",
        ),
    ],
)
def test_an_encoder_decoder_without_an_end_to_classify_by_is_refused(t5, tmp_path, template, pad, texts, problem):
    model = t5(tmp_path.name, template, pad)
    file = tmp_path / "data"
    file.mkdir()
    rows = "".join(json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate(texts))
    for split in ("train", "validation", "test"):
        (file / f"{split}.jsonl").write_text(rows)
    spec = make_spec(model=model, task={"name": "classification", "data": str(file)}, method={"name": "head"})
    found = token_problems(spec)
    if problem:
        assert len(found) == 1 and re.search(problem, found[0])
    else:
        assert not found
    tokenizer, network = load_tokenizer(model), AutoModelForSequenceClassification.from_pretrained(model)
    examples = tokenizer(texts)["input_ids"]
    batch = collate([{"input_ids": ids, "labels": 0} for ids in examples], tokenizer.pad_token_id, CPU)
    with pytest.raises((ValueError, RuntimeError, IndexError)) if problem else contextlib.nullcontext():
        forward(network, batch)
