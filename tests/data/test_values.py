"""Values of rows: the one rule for what is missing, over tasks and splits; columns, labels and templates."""

from __future__ import annotations

import json
import math
from datetime import date

import pytest

from lorabench.config.decode import InputError, decode, encode
from lorabench.data.values import Template, are_scores, as_class, find, in_order, texts
from lorabench.spec.task import Task
from lorabench.tasks.classification import Classification
from lorabench.tasks.completion import Completion
from lorabench.tasks.regression import Regression
from lorabench.tasks.text import Text
from lorabench.training.examples import read_usable

TASKS = {
    "text": Text(data=""),
    "completion": Completion(data="", prompt="{q}", response="{text}"),
    "classification": Classification(data=""),
    "regression": Regression(data=""),
}


def rows(label=lambda i: i % 3, **changes):
    return [{"q": "ask", "text": f"text {i}", "label": label(i)} | changes for i in range(6)]


def usable(tmp_path, task: Task, **splits):
    for split in ("train", "validation", "test"):
        found = splits.get(split, rows())
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    table = encode(task) | {"data": str(tmp_path)}
    return read_usable(decode(type(task), {key: value for key, value in table.items() if key != "name"}))


def refusal(tmp_path, task, **splits) -> str:
    with pytest.raises(InputError) as error:
        usable(tmp_path, task, **splits)
    (problem,) = error.value.problems
    return problem


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("missing", [None, math.nan, "absent"])
def test_a_missing_text_is_refused_in_every_split_and_task(missing, name, split, tmp_path):
    found = rows()
    found[3] = {"q": "ask", "label": 1} | ({} if missing == "absent" else {"text": missing})
    problem = refusal(tmp_path, TASKS[name], **{split: found})
    assert problem.startswith(f"{split} split: task.") and f"{split}.jsonl, line 4 has no value" in problem


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("name", ["classification", "regression"])
@pytest.mark.parametrize("missing", [None, math.nan, "", " ", "absent"])
def test_a_missing_label_is_refused_or_left_out(missing, name, split, tmp_path):
    found = rows()
    del found[4]["label"]
    found[4] |= {} if missing == "absent" else {"label": missing}
    problem = refusal(tmp_path, TASKS[name], **{split: found})
    assert problem.startswith(f'{split} split: task.label = "label": {tmp_path}/{split}.jsonl, line 5 has no label')
    assert 'task.unlabelled = ""' in problem
    task = type(TASKS[name])(data="", unlabelled="")
    got = usable(tmp_path, task, **{split: found})
    assert len(got.rows[split]) == 5
    assert got.notes == {"task": f"1 of 6 rows of {split} left out, without a label"}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_minus_one_beside_the_classes_needs_a_word(split, tmp_path):
    """SNLI's -1 is no label, that of a sentiment of -1, 0, 1 is a class: nobody can tell by the data."""
    found = rows(lambda i: (0, 1, 2, -1, 2, 1)[i])
    problem = refusal(tmp_path, TASKS["classification"], **{split: found})
    assert f"{split} split" in problem and "line 4 has -1" in problem and 'task.unlabelled = "-1"' in problem
    out = usable(tmp_path, Classification(data="", unlabelled="-1"), **{split: found})
    assert out.options["label2id"] == {"0": 0, "1": 1, "2": 2} and len(out.rows[split]) == 5


def test_minus_one_may_be_a_class(tmp_path):
    signs = dict.fromkeys(("train", "validation", "test"), rows(lambda i: 2 * (i % 2) - 1))
    assert usable(tmp_path, TASKS["classification"], **signs).options["label2id"] == {"-1": 0, "1": 1}
    three = dict.fromkeys(("train", "validation", "test"), rows(lambda i: i % 3 - 1))
    as_they_are = Classification(data="", unlabelled="")
    assert usable(tmp_path, as_they_are, **three).options["label2id"] == {"-1": 0, "0": 1, "1": 2}


@pytest.mark.parametrize("name", ["classification", "regression"])
@pytest.mark.parametrize("test", [
    [{"index": 1, "sentence": "no label column, and another text"}] * 3,
    rows(lambda i: -1), rows(lambda i: -1.0), rows(lambda i: None), rows(lambda i: ""),
])  # fmt: skip
def test_a_test_split_without_labels_counts_as_none(name, test, tmp_path):
    got = usable(tmp_path, TASKS[name], test=test)
    assert got.rows["test"] == [] and "of test left out" in got.notes["task"]


@pytest.mark.parametrize(
    ("train", "validation", "classes"),
    [
        ([0, 1], [0.0, 1.0], ["0", "1"]),
        ([0.0, 1.0], ["0", "1"], ["0", "1"]),
        ([0, "1"], ["0", 1], ["0", "1"]),
        ([10, 9], [9, 10], ["9", "10"]),
        (["yes", " no"], ["no", "yes "], ["no", "yes"]),
        ([True, False], [False, True], ["False", "True"]),
        (["01", "1"], ["1", "01"], ["01", "1"]),
        ([-0.0, 1], [0, 1], ["0", "1"]),
    ],
)
def test_labels_are_compared_as_text(train, validation, classes, tmp_path):
    got = usable(tmp_path, TASKS["classification"], train=rows(lambda i: train[i % 2]),
                 validation=rows(lambda i: validation[i % 2]), test=rows(lambda i: None))  # fmt: skip
    assert list(got.options["label2id"]) == classes
    assert got.options["num_labels"] == 2


@pytest.mark.parametrize("wrong", [[1, 2], {"a": 1}])
@pytest.mark.parametrize(("name", "column"), [(name, "text") for name in TASKS] + [("classification", "label")])
def test_lists_and_objects_are_no_text(wrong, name, column, tmp_path):
    found = rows()
    found[1][column] = wrong
    problem = refusal(tmp_path, TASKS[name], validation=found)
    assert problem.startswith("validation split: task.") and ".jsonl, line 2" in problem and "no text" in problem


def test_the_problems_of_all_splits_are_told_at_once(tmp_path):
    with pytest.raises(InputError) as error:
        usable(
            tmp_path,
            TASKS["classification"],
            train=rows(text=None),
            validation=rows(lambda i: "new"),
            test=rows(text=3),
        )
    assert [problem.split(":")[0] for problem in error.value.problems] == ["train split"]
    with pytest.raises(InputError) as error:
        usable(tmp_path, TASKS["classification"], validation=rows(lambda i: "new"), test=rows(lambda i: 7, text=None))
    assert [problem.split(":")[0] for problem in error.value.problems] == ["validation split", *["test split"] * 2]


@pytest.mark.parametrize("scale", [lambda i: 0.8 * i, lambda i: float(i), lambda i: f"{i / 4:.2f}"])
def test_scores_are_no_classes(scale, tmp_path):
    splits = dict.fromkeys(("train", "validation", "test"), rows(scale))
    with pytest.raises(InputError) as error:
        usable(tmp_path, TASKS["classification"], **splits)
    problem = error.value.problems[0]
    assert problem.startswith("train split") and 'task.name = "regression"' in problem and len(problem) < 200
    assert usable(tmp_path, TASKS["regression"], **splits).options["num_labels"] == 1


def test_what_are_scores():
    assert are_scores(["1", "2.5"]) and are_scores(["0.0", "1.0", "2.0"])
    assert not are_scores(["0.0", "1.0"]) and not are_scores(["0", "1", "2"]) and not are_scores(["1.5", "good"])
    assert [as_class(text) for text in ("0.0", "1.", "-0.0", "-1.0", "01", "1.50", "1e3")] == [
        "0", "1", "0", "-1", "01", "1.50", "1e3"]  # fmt: skip
    assert in_order(["10", "9", "-1"]) == ["-1", "9", "10"] and in_order(["b", "10", "9"]) == ["10", "9", "b"]


def test_a_score_that_is_no_number_is_refused(tmp_path):
    problem = refusal(tmp_path, TASKS["regression"], test=rows(lambda i: "good" if i == 2 else i))
    where = f'test split: task.label = "label": {tmp_path}/test.jsonl, line 3'
    assert problem == f'{where} is no finite number: "good"'


def test_a_dotted_name_is_a_column_or_leads_into_a_value():
    flat, nested = {"meta.q": "flat", "meta": "word"}, {"meta": {"q": "nested"}}
    assert (find(flat, "meta.q"), find(nested, "meta.q"), find({"meta": "word"}, "meta.q")) == ("flat", "nested", None)
    assert texts([flat, nested], "task.text", "meta.q") == ["flat", "nested"]
    assert Template("task.prompt", "{meta.q}!").fill([flat, nested]) == ["flat!", "nested!"]
    with pytest.raises(InputError, match=r'no such column: "meta\.r"\. Choices: meta\.q, meta'):
        Template("task.prompt", "{meta.r}").fill([flat])


@pytest.mark.parametrize(
    ("template", "row", "wanted"),
    [
        ("{a}", {"a": 1990}, "1990"),
        ("{a}", {"a": 1.5}, "1.5"),
        ("{a:04d}", {"a": 7}, "0007"),
        ("{a!r}", {"a": [1]}, "[1]"),
        ("{a[1]}", {"a": ["x", "y"]}, "y"),
        ("{a[b]}", {"a": {"b": "z"}}, "z"),
        ("{a[0].b}", {"a": [{"b": "deep"}]}, "deep"),
        ("{{a}}", {"a": 1}, "{a}"),
        ("{a}", {"a": date(2020, 1, 2)}, "2020-01-02"),
        ("plain", {}, "plain"),
    ],
)
def test_templates_are_filled(template, row, wanted):
    assert Template("task.prompt", template).fill([row]) == [wanted]


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        ("{a}", {"a": None}, "row 1 has no value in"),
        ("{a.real}", {"a": 3}, "no such column"),  # a column's value has no attributes
        ("{a}", {"a": b"bytes"}, "a bytes is no text"),
        ("{a:d}", {"a": "7"}, "row 1: Unknown format code 'd'"),
        ("{a", {"a": 1}, "row 1: expected '}'"),
        ("{a:999999999999999999}", {"a": 1}, "row 1: MemoryError"),
        ("{}", {"a": 1}, "no such column"),
        ("{a[5]}", {"a": [1]}, 'row 1 has 1 items in "a", counted from 0, and no "a[5]"'),
        ("{a}", {"a": "\ud800"}, "no valid Unicode"),
    ],
)
def test_a_template_that_cannot_be_filled_says_why(template, row, words):
    with pytest.raises(InputError) as error:
        Template("task.prompt", template).fill([row])
    assert words in str(error.value)
