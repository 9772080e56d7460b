"""Tasks: what is predicted, how the loss is taken, and metrics beside scikit-learn and transformers."""

from __future__ import annotations

import dataclasses
import math
from itertools import islice

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.models.base_model import load_tokenizer, resolve
from lorabench.spec.task import IGNORE
from lorabench.tasks.classification import Classification
from lorabench.tasks.completion import Completion
from lorabench.tasks.regression import Regression
from lorabench.tasks.text import Text
from lorabench.training.examples import Order, collate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sk():
    from sklearn import metrics  # slow to import, and only this worker needs it

    return metrics


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tiny-llama")


OF_IMAGES = {"image_classification": "builtin:tiny-vit", "denoising": "builtin:tiny-diffusion"}


@pytest.mark.parametrize("name", plugins.names("tasks"))
def test_every_task_has_a_loss_that_falls_on_the_right_answer(name, tokenizer, labelled):
    task = plugins.example("tasks", name)
    rows = [{"source": "a", "text": f"text number {i} " * 9, "label": i % 2} for i in range(8)]
    talk = [{"role": "user", "content": "yes or no?"}, {"role": "assistant", "content": "yes"}]
    rows = [row | {"messages": talk, "question": row["text"], "score": row["label"]} for row in rows]
    rows = [row | {"image": [[0, 9 * row["label"]], [255, 4]]} for row in rows]
    rows = [row | {"choices": ["a", f"b {row['label']}"], "answer": row["label"]} for row in rows]
    if name in ("classification", "regression"):
        task = dataclasses.replace(task, data=labelled)
    if name in OF_IMAGES:
        tokenizer = task.reads_with(OF_IMAGES[name], None)
    options = task.model_options(task.usable("train", rows, {}))
    batch = collate([each for item in task.scored(rows, tokenizer, 16, options) for each in item], 2, CPU)
    if name == "denoising":  # each image of a row or of the grid by itself, whatever else is in the batch
        assert task.count(batch) == 8 * task.eval_times
        assert float(task.loss(batch["labels"] + 2, batch)) / task.count(batch) == pytest.approx(4)
        assert float(task.loss(batch["labels"], batch)) == 0
        return
    if name == "regression":
        right = batch["labels"][:, None]
        assert float(task.loss(right + 2, batch)) / task.count(batch) == pytest.approx(4)  # mean squared error
        assert task.metrics(0.0, [task.score(right, batch)]) == pytest.approx({"loss": 0, "pearson": 1, "spearman": 1})
        return
    if name.endswith("classification"):
        right = torch.nn.functional.one_hot(batch["labels"], 2).float()
    else:
        following = batch["labels"] if name == "seq2seq" else batch["labels"].roll(-1, 1)
        right = torch.nn.functional.one_hot(following.clamp(min=0), 1024).float()
    count = task.count(batch)
    even = float(task.loss(torch.zeros_like(right), batch)) / count
    assert even == pytest.approx(math.log(right.shape[-1]), rel=1e-5)
    assert float(task.loss(50 * right, batch)) / count < 1e-6
    assert any(value == 1.0 for value in task.metrics(0.0, [task.score(right, batch)]).values())


def test_text_blocks_are_the_documents_joined(tokenizer):
    rows = [{"text": "one document"}, {"text": "and another " * 20}]
    blocks = list(Text().examples(rows, tokenizer, 8, {}))
    stream = [token for block in blocks for token in block["input_ids"]]
    assert tokenizer.decode(stream).startswith("one document<|eos|>and another")
    assert all(len(block["input_ids"]) == 8 and block["labels"] == block["input_ids"] for block in blocks)


def test_language_model_loss_is_the_one_of_transformers(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(resolve("builtin:tiny-llama")).eval()
    task = Completion(prompt="{q}", response="{a}")
    rows = [{"q": "def f(x):", "a": " return x"}, {"q": "class A", "a": ": pass  # a longer answer"}]
    batch = collate(list(task.examples(rows, tokenizer, 32, {})), tokenizer.pad_token_id, CPU)
    with torch.no_grad():
        out = model(**batch)
    assert float(task.loss(out.logits, batch)) / task.count(batch) == pytest.approx(float(out.loss), rel=1e-5)


def test_completion_predicts_the_response_only(tokenizer):
    example = Completion(prompt="Q: {q}\n", response="{a}").examples(
        [{"q": "two and two?", "a": "four"}], tokenizer, 64, {}
    )[0]
    predicted = [token for token in example["labels"] if token != IGNORE]
    assert tokenizer.decode(predicted) == "four<|eos|>"
    assert tokenizer.decode(example["input_ids"]) == "Q: two and two?\nfour<|eos|>"


@pytest.mark.parametrize("seq_len", [2, 5, 9])
def test_completion_keeps_the_response_where_the_prompt_is_long(seq_len, tokenizer):
    task = Completion(prompt="{q}", response="{a}")
    example = task.examples([{"q": "long prompt " * 30, "a": "yes"}], tokenizer, seq_len, {})[0]
    assert len(example["input_ids"]) == len(example["labels"]) == seq_len
    assert sum(token != IGNORE for token in example["labels"]) >= 1


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classification_metrics_are_those_of_scikit_learn(classes, sk):
    rng = np.random.default_rng(classes)
    true, logits = rng.integers(0, classes, 200), torch.tensor(rng.normal(size=(200, classes)))
    logits[np.arange(200), true] += 1.0
    task = Classification(data="x")
    scores = [task.score(logits[part], {"labels": torch.tensor(true[part])}) for part in (slice(0, 77), slice(77, 200))]
    got, predicted = task.metrics(0.5, scores), logits.argmax(-1).numpy()
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(true, predicted))
    assert got["macro_f1"] == pytest.approx(sk.f1_score(true, predicted, average="macro"))
    assert got["matthews"] == pytest.approx(sk.matthews_corrcoef(true, predicted))
    assert got["majority"] == pytest.approx(np.bincount(true).max() / 200)


@pytest.mark.parametrize(("true", "predicted", "macro_f1"), [([1, 1], [1, 1], 1.0), ([0, 0, 1], [0, 2, 1], 5 / 9)])
def test_macro_f1_is_of_the_classes_that_occur_or_are_predicted(true, predicted, macro_f1):
    """Of the three classes that the training split has."""
    assert Classification(data="x").metrics(0.5, [(predicted, true, 3)])["macro_f1"] == pytest.approx(macro_f1)


def test_metrics_are_scikit_learn_s_whatever_is_absent(sk):
    rng = np.random.default_rng(0)
    for _ in range(100):
        classes, rows = rng.integers(2, 8), rng.integers(1, 9)
        true, predicted = rng.integers(0, classes, (2, rows))
        got = Classification(data="x").metrics(0.5, [(predicted.tolist(), true.tolist(), int(classes))])
        assert got["macro_f1"] == pytest.approx(sk.f1_score(true, predicted, average="macro"))
        assert got["matthews"] == pytest.approx(sk.matthews_corrcoef(true, predicted))


def test_labels_may_be_words_and_an_unlabelled_split_counts_as_none(tokenizer):
    task = Classification(data="x", text="a", text_pair="b")
    rows = [{"a": "one", "b": "two", "label": word} for word in ("yes", "no", "maybe")]
    options = task.model_options(rows)
    assert options["label2id"] == {"maybe": 0, "no": 1, "yes": 2}
    assert [e["labels"] for e in task.examples(rows, tokenizer, 16, options)] == [2, 1, 0]
    assert task.usable("test", [row | {"label": -1} for row in rows], options) == []
    with pytest.raises(InputError, match="perhaps"):
        task.usable("validation", [rows[0] | {"label": "perhaps"}], options)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Text(text="body"), ["task.text", "body", "label"]),
        (Completion(prompt="{question}"), ["task.prompt", "question", "label"]),
        (Classification(data="x", text="sentence"), ["task.text", "sentence", "label"]),
        (Classification(data="x", label="class"), ["task.label", "class", "label"]),
    ],
)
def test_a_missing_column_is_named_with_the_choices(task, words):
    rows = [{"text": "some text " * 9, "label": i} for i in range(4)]
    with pytest.raises(InputError) as error:
        task.usable("validation", rows, {"label2id": {}})
    assert all(word in str(error.value) for word in words)


def test_padding_is_masked():
    examples = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(examples, 2, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORE, IGNORE]]
    assert "attention_mask" not in collate(examples[:1], 2, CPU)


def test_data_order_sees_every_example_once_an_epoch():
    order = Order(10, 4, seed=1)
    seen = [i for step in range(5) for i in order.indices(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert Order(10, 4, seed=1).indices(3) == seen[12:16]  # no memory of the steps before
    assert Order(10, 4, seed=2).indices(0) != seen[:4]


def test_no_more_of_a_text_is_tokenized_than_is_taken(tokenizer):
    rows, seen = [{"text": f"document {i} " * 9} for i in range(50)], []

    class Noting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, **options):
            seen.extend(texts if isinstance(texts, list) else [])
            return tokenizer(texts, **options)

    whole = list(Text().examples(rows, tokenizer, 8, {}))
    assert [*islice(Text().examples(rows, Noting(), 8, {}), 3)] == whole[:3] and 0 < len(seen) < len(rows)
    seen.clear()
    assert [*Text().examples(rows, Noting(), 8, {})] == whole and seen == [row["text"] for row in rows]


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys_ties_included(seed):
    rng = np.random.default_rng(seed)
    predicted, true = rng.integers(0, 6, (2, 40)).astype(float) / 4 if seed % 2 else rng.normal(size=(2, 40))
    halves = [(predicted[:25].tolist(), true[:25].tolist()), (predicted[25:].tolist(), true[25:].tolist())]
    found = Regression(data="x").metrics(0.5, halves)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, true).statistic, abs=1e-12)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, true).statistic, abs=1e-12)
