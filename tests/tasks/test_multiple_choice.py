"""Multiple choice beside EleutherAI's lm-evaluation-harness, and what of its data is refused."""

from __future__ import annotations

import json
import random
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorabench.config.decode import InputError
from lorabench.data.dataset import read_data
from lorabench.data.tokens import context_and_continuation, opening
from lorabench.models.base_model import load_tokenizer, resolve
from lorabench.processes.distributed import Place, World
from lorabench.spec.task import IGNORE
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.tasks.multiple_choice import MultipleChoice, Scored
from lorabench.training.evaluation import metrics_of
from lorabench.training.examples import collate, prepare
from lorabench.training.execute import Options, execute
from tests.conftest import make_spec
from tests.data.test_tokens import tokenizer_of

CPU = torch.device("cpu")
ROW = {"q": "Two and two?", "c": ["four", "five and more", "ten"], "a": 1}


def task(**changes) -> MultipleChoice:
    return MultipleChoice(**({"data": "", "question": "{q}", "choices": "c", "answer": "a"} | changes))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tiny-llama")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(resolve("builtin:tiny-llama"), dtype=torch.float32).eval()


def write_questions(folder: Path, number: int = 40) -> str:
    """Beginnings of the built-in text's sentences, with three or four ends of which one is theirs, as train, validation
    and test. In every other question letters of two bytes; a space, line ends or nothing at the end of questions.
    """
    draw = random.Random(0)
    text = " ".join(row["text"] for row in read_data("builtin:english-docs").splits["validation"])
    found = [words for sentence in re.split(r"[.:]\s", text) if 9 <= len(words := sentence.split()) <= 40]
    for split in ("train", "validation", "test"):
        rows = []
        for count in range(number):
            sentence, *others = draw.sample(found, draw.choice([3, 4]))
            choices = [" ".join(words[-draw.randint(1, 7) :]) for words in (sentence, *others)]
            question = " ".join(sentence).removesuffix(choices[0]).rstrip() + ["", "", " ", "\n", "?\n\n"][count % 5]
            if count % 2:
                choices = [choice.replace(draw.choice("aeiout"), "é") for choice in choices]
            right, *wrong = choices
            answer = draw.randrange(len(choices))
            rows.append({"question": question, "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    return write_questions(tmp_path_factory.mktemp("questions"))


def scores(task, model, tokenizer, rows, size=7) -> list[list[Scored]]:
    examples = [example for choices in task.scored(rows, tokenizer, 256, {}) for example in choices]
    batches = [collate(examples[first : first + size], 2, CPU) for first in range(0, len(examples), size)]
    with torch.no_grad():
        return [task.score(model(batch["input_ids"], batch.get("attention_mask")).logits, batch) for batch in batches]


LETTERED = "{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nAnswer:"
"""As MMLU asks."""


@pytest.mark.parametrize(("before", "choice_is"), [(" ", "text"), ("", "text"), (" ", "letter")])
def test_scores_are_those_of_the_evaluation_harness(before, choice_is, questions, model, tokenizer):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file = f"{questions}/test.jsonl"
    asked = LETTERED if choice_is == "letter" else "{question}"
    config = {
        "task": "questions", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": lambda row: asked.format(**row),
        "doc_to_choice": (lambda row: list("ABCD"[: len(row["choices"])])) if choice_is == "letter" else "choices",
        "doc_to_target": "answer", "target_delimiter": before,
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }  # fmt: skip
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=[config], bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_defaults=False),  # else it reads ten thousand files of its own tasks
    )  # fmt: skip
    ours = task(question=asked, choices="choices", answer="answer", before=before, choice_is=choice_is)
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    found = scores(ours, model, tokenizer, rows)
    samples = sorted(theirs["samples"]["questions"], key=lambda sample: sample["doc_id"])
    likelihoods = [float(response[0]) for sample in samples for response in sample["filtered_resps"]]
    assert [choice.log_likelihood for batch in found for choice in batch] == pytest.approx(likelihoods, abs=1e-4)
    metrics, wanted = ours.metrics(0.0, found), theirs["results"]["questions"]
    for name, their_name in {"accuracy": "acc", "accuracy_norm": "acc_norm", "accuracy_byte": "acc_bytes"}.items():
        assert metrics[name] == pytest.approx(wanted[f"{their_name},none"], abs=1e-3)


@pytest.mark.parametrize("begins", [None, False, True])
def test_question_and_choice_are_cut_up_as_by_the_evaluation_harness(begins, tokenizer):
    """By the built-in tokenizer, and one like Llama 2's, with and without a token before each text."""
    from lm_eval.api.model import TemplateLM

    tokenizer = tokenizer if begins is None else tokenizer_of(begins)
    theirs = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    for context, continuation in product(
        ("Is it?", "Is it? ", "Is it\n", "A:\n\n ", "it"), (" yes", "yes", "\nno", "no")
    ):
        wanted = TemplateLM._encode_pair(theirs, context, continuation)
        head, tail = context_and_continuation(tokenizer, context, continuation)
        assert ([*opening(tokenizer), *head], tail) == wanted


def test_an_empty_question_is_what_begins_a_sequence(tokenizer):
    (choices,) = task().scored([ROW | {"q": ""}], tokenizer, 64, {})
    assert [choice["input_ids"][0] for choice in choices] == [tokenizer.bos_token_id] * 3
    assert [tokenizer.decode(choice["input_ids"][1:]) for choice in choices] == [f" {text}" for text in ROW["c"]]
    (choices,) = task().scored([ROW | {"q": ""}], tokenizer_of(True), 64, {})
    assert [choice["input_ids"].count(1) for choice in choices] == [1] * 3


def test_the_right_choice_is_learned_alone_and_the_loss_is_its_own(model, tokenizer):
    (example,), (choices,) = task().examples([ROW], tokenizer, 64, {}), task().scored([ROW], tokenizer, 64, {})
    predicted = [token for token in example["labels"] if token != IGNORE]
    assert tokenizer.decode(example["input_ids"]) == "Two and two? five and more"
    assert tokenizer.decode(predicted) == " five and more"
    assert [tokenizer.decode(choice["input_ids"]) for choice in choices] == [
        f"Two and two? {text}" for text in ROW["c"]
    ]
    assert [set(choice["labels"]) == {IGNORE} for choice in choices] == [True, False, True]
    batch = collate([example], 2, CPU)
    with torch.no_grad():
        wanted = model(**batch).loss
    batch = collate(choices, 2, CPU)
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
    assert float(task().loss(logits, batch)) / task().count(batch) == pytest.approx(float(wanted), rel=1e-5)
    (of_right,) = [choice for choice in task().score(logits, batch) if choice.is_right]
    assert -of_right.log_likelihood / of_right.tokens == pytest.approx(float(wanted), rel=1e-5)


def test_each_accuracy_divides_by_its_own_length():
    """Two questions, whose choices come in batches that part them."""
    long = Scored(number=0, is_right=True, log_likelihood=-9.0, tokens=3, characters=9, bytes=18)
    short = Scored(number=1, is_right=False, log_likelihood=-4.0, tokens=2, characters=2, bytes=4)
    accents = Scored(number=1, is_right=False, log_likelihood=-8.0, tokens=1, characters=5, bytes=20)
    found = task().metrics(1.0, [[long], [short, long], [accents]])
    assert found == {
        "loss": 1.0, "accuracy": 0.0, "accuracy_norm": 1.0, "accuracy_byte": 0.5, "accuracy_token": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer_is", "answer"), [("index", 1.0), ("index", "1"), ("number", 2), ("letter", "b"), ("text", "five and more")]
)
def test_an_answer_may_be_written_in_several_ways(answer_is, answer, tokenizer):
    (example,) = task(answer_is=answer_is).examples([ROW | {"a": answer}], tokenizer, 64, {})
    assert tokenizer.decode(example["input_ids"]).endswith("? five and more")


def test_choices_may_have_labels_or_columns_of_their_own(tokenizer):
    arc = {"q": "Which?", "choices": {"text": ["one", "two"], "label": ["3", "4"]}, "a": "4"}
    wide = {"q": "Which?", "first": "one", "second": 2, "a": "1"}
    for row, fields in (
        (arc, {"choices": "choices.text", "labels": "choices.label"}),
        (wide, {"choices": "first, second"}),
    ):
        (choices,) = task(**fields).scored([row], tokenizer, 64, {})
        assert [set(choice["labels"]) == {IGNORE} for choice in choices] == [True, False]


@pytest.mark.parametrize(
    ("row", "fields", "problem"),
    [
        (
            {"a": 3},
            {},
            'task.answer = "a": row 1 is none of its choices (task.answer_is = "index"): "3"; choices: 0, 1, 2',
        ),
        ({"a": "D"}, {"answer_is": "letter"}, '"D"; choices: A, B, C'),
        ({"a": "six"}, {"answer_is": "text"}, '"six"; choices: four, five and more, ten'),
        ({"a": None}, {}, 'task.answer = "a": row 1 has no answer'),
        ({}, {"answer": "b"}, 'task.answer = "b": no such column. Choices: q, c, a'),
        ({"c": "four"}, {}, 'task.choices = "c": row 1 is a str, and no list: "four"'),
        ({"c": ["four"]}, {}, 'task.choices = "c": row 1 needs two choices or more'),
        ({"c": ["four", ""]}, {}, 'task.choices = "c": row 1 has a choice that is empty'),
        ({"c": ["four", None]}, {}, 'task.choices = "c": row 1 has no value'),
        ({}, {"choices": "q, d"}, 'task.choices = "d": no such column. Choices: q, c, a'),
        ({"l": ["x"]}, {"labels": "l"}, 'task.labels = "l": row 1 has 1 labels, and 3 choices'),
        ({"c": ["four", "word " * 99]}, {}, "for which seq_len = 32 has no room"),
        ({"c": ["x"] * 27}, {"choice_is": "letter"}, 'task.choice_is = "letter": row 1 has 27 choices, more than'),
    ],
)
def test_what_is_wrong_of_a_row_is_told(row, fields, problem, tokenizer):
    with pytest.raises(InputError, match=re.escape(problem)):
        rows = task(**fields).usable("validation", [ROW | row], {})
        list(task(**fields).scored(rows, tokenizer, 32, {}))


def test_a_test_split_without_answers_counts_as_none():
    for answer in (None, "", -1):
        assert task().usable("test", [ROW | {"a": answer}] * 2, {}) == []
    with pytest.raises(InputError, match="row 2 has no answer"):
        task().usable("test", [ROW, ROW | {"a": None}], {})


def test_a_long_question_is_cut_from_the_left(tokenizer):
    (choices,) = task().scored([ROW | {"q": "a long question " * 50 + "is it?"}], tokenizer, 24, {})
    assert all(len(choice["input_ids"]) == 24 for choice in choices)
    assert tokenizer.decode(choices[0]["input_ids"]).endswith(" question is it? four")


def test_max_eval_counts_questions_and_ranks_score_as_one_does(questions, model):
    spec = make_spec(
        seq_len=128,
        batch_size=5,
        task={"name": "multiple_choice", "data": questions, "max_train": 12, "max_eval": 9},
    )
    examples = prepare(spec)
    numbers = [example["number"] for example in examples.splits["validation"]]
    assert len(examples.splits["train"]) == 12 and numbers.count(0) == 9 and len(numbers) > 18
    alone, gathered = metrics_of(model, spec, examples, "validation"), []

    class Rank(World):
        def gather(self, value):
            gathered.append(value)
            return gathered

    for rank in range(2):
        found = metrics_of(model, spec, examples, "validation", world=Rank(place=Place(rank=rank, size=2)))
    assert found == pytest.approx(alone, rel=1e-5)
    assert set(alone) == {f"valid_{name}" for name in MultipleChoice.reports}


def test_a_run_learns_what_answers_have_in_common(tmp_path):
    """Which of two words follows: the one that always does."""
    for split, count in {"train": 32, "validation": 8, "test": 8}.items():
        rows = [
            {"question": f"The film number {i} was", "a": "good", "b": "bad", "answer": "good"} for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = {"name": "multiple_choice", "data": str(tmp_path), "choices": "a, b", "answer_is": "text"}
    spec, store = make_spec(task=choice, steps=20, lr=1e-2, batch_size=4, serving=False), Store(tmp_path / "results")
    assert execute(spec, store, Options(device="cpu", log_to_file=False)) == Status.DONE
    measures = store.read(spec.id).measures
    assert measures["valid_accuracy"] == measures["test_accuracy_norm"] == 1.0
    assert measures["valid_loss"] < measures["base_valid_loss"]


def test_it_may_be_a_test_set_of_another_task(questions, tmp_path):
    """A text model's accuracy on questions, by the names of its own set."""
    choice = {"name": "multiple_choice", "data": questions, "max_eval": 3}
    table = {"name": "text", "max_train": 8, "max_eval": 2, "tests": {"quiz": choice}}
    spec, store = make_spec(task=table, seq_len=128, steps=1, serving=False), Store(tmp_path)
    assert [example["number"] for example in prepare(spec).splits["test_quiz"]].count(0) == 3
    assert execute(spec, store, Options(device="cpu", log_to_file=False)) == Status.DONE
    assert {f"test_quiz_{name}" for name in MultipleChoice.reports} <= store.read(spec.id).measures.keys()
