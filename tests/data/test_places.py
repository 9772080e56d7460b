"""What is wrong with a row is told once, with the file and line that its writer sees, also where it was held out."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from lorabench.config.decode import InputError
from lorabench.data.dataset import read_data
from lorabench.data.rows_file import place
from lorabench.spec.task import Task
from lorabench.tasks.classification import Classification
from lorabench.tasks.completion import Completion
from lorabench.tasks.regression import Regression
from lorabench.tasks.text import Text
from lorabench.training.examples import read_usable

ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(60)]


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """Each row of csv takes two lines, and a blank one is before each fifth row of jsonl."""
    file = folder / f"films.{kind}"
    lines = [("\n" if i % 5 == 0 else "") + json.dumps(row) for i, row in enumerate(rows)]
    cells = ["" if row["label"] is None else row["label"] for row in rows]
    match kind:
        case "jsonl.gz":
            file.write_bytes(gzip.compress("\n".join(lines).encode()))
        case "json":
            file.write_text(json.dumps(rows))
        case "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        case "csv":
            body = "".join(f'"{row["text"]}\nsecond",{cell}\n' for row, cell in zip(rows, cells, strict=True))
            file.write_bytes(b"\xef\xbb\xbf" + f"text,label\n{body}".replace("\n", "\r\n").encode())
        case "tsv":
            body = "".join(f'"{row["text"]}" quoted\t{cell}\n' for row, cell in zip(rows, cells, strict=True))
            file.write_text(f"text\tlabel\n{body}")
    return file


LINES = {"csv": lambda i: f"line {2 + 2 * i}", "tsv": lambda i: f"line {2 + i}", "json": lambda i: f"row {1 + i}",
         "parquet": lambda i: f"row {1 + i}", "jsonl.gz": lambda i: f"line {i + 1 + i // 5 + 1}"}  # fmt: skip
"""Of row i, from 0."""


def refused(task: Task) -> str:
    with pytest.raises(InputError) as error:
        read_usable(task)
    (problem,) = error.value.problems
    return problem


@pytest.mark.parametrize("kind", LINES)
def test_every_row_keeps_its_place(kind, tmp_path):
    file = written(tmp_path, kind, ROWS)
    found = read_data(str(file), label="label").splits
    where = {re.search(r"\d+", row["text"])[0]: place(row, 0) for rows in found.values() for row in rows}
    assert where == {str(i): f"{file}, {LINES[kind](i)}" for i in range(60)}


@pytest.mark.parametrize("kind", LINES)
def test_a_row_that_was_held_out_is_told_by_its_line(kind, tmp_path):
    """All rows of one split at a time lack a label: it is told once, of the first of them in the file."""
    texts = {
        split: {row["text"] for row in rows}
        for split, rows in read_data(str(written(tmp_path, "json", ROWS)), label="label").splits.items()
    }
    assert {split: len(found) for split, found in texts.items()} == {"train": 54, "validation": 3, "test": 3}
    for row in range(60):
        rows = [each | {"label": None} if i == row else each for i, each in enumerate(ROWS)]
        file = written(tmp_path, kind, rows)
        if row % 10 == 3 or rows[row]["text"] not in texts["train"]:
            problem = refused(Classification(data=str(file), max_train=2, max_eval=1))
            assert f'task.label = "label": {file}, {LINES[kind](row)} has no label' in problem


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Classification(data="", text="gone"), 'task.text = "gone": no such column in FILE. Choices: text, label'),
        (Regression(data="", label="gone"), 'task.label = "gone": no such column in FILE. Choices: text, label'),
        (Text(text="gone"), 'task.text = "gone": no such column in FILE'),
        (Completion(prompt="{gone}", response="{text}"), "task.prompt = \"{gone}\": no such column in FILE: \"gone\""),
        (Regression(data="", label="text"), "FILE, line 2 is no finite number"),
    ],
)  # fmt: skip
def test_one_cause_in_one_file_is_told_once(task, words, tmp_path):
    file = written(tmp_path, "tsv", ROWS)
    problem = refused(type(task)(**vars(task) | {"data": str(file)}))
    assert words.replace("FILE", str(file)) in problem


def test_data_that_are_no_file_of_the_user_are_told_by_split_and_row(tmp_path, monkeypatch):
    text = Text(data="builtin:english-docs", text="gone")
    assert [problem.partition(". Choices")[0] for problem in _problems(text)] == [
        f'{split} split: task.text = "gone": no such column in builtin:english-docs, {split}'
        for split in ("train", "validation", "test")
    ]
    hub = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS),
        validation=datasets.Dataset.from_list([*ROWS[:3], {"text": "a", "label": None}]),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub)
    assert 'validation split: task.label = "label": owner/films:big, validation, row 4 has no label' in refused(
        Classification(data="owner/films:big")
    )


def _problems(task: Task) -> list[str]:
    with pytest.raises(InputError) as error:
        read_usable(task)
    return error.value.problems


def test_a_class_that_train_lacks_is_told_with_its_count_and_file(tmp_path):
    for split, rows in {"train": ROWS, "validation": [*ROWS, *2 * [{"text": "a", "label": 7}]], "test": ROWS}.items():
        written(tmp_path, "tsv", rows).rename(tmp_path / f"{split}.tsv")
    problem = refused(Classification(data=str(tmp_path)))
    where = f'validation split: task.label = "label": 2 rows have the class "7" ({tmp_path}/validation.tsv, line 62, …)'
    assert problem.startswith(f"{where}, which no row of the training split has: add some there, or leave it out by")
    assert problem.endswith("task.unlabelled. Its classes: ['0', '1']")
    assert read_usable(Classification(data=str(tmp_path), unlabelled="7")).options["num_labels"] == 2


def test_no_class_is_held_out_as_a_whole(tmp_path):
    """Where most classes stand once too: of those that stand more often rows are held out."""
    rows = [{"text": f"{i}", "label": f"class {min(i, 25)}"} for i in range(40)]
    data = read_data(str(written(tmp_path, "json", rows)), label="label")
    labels = {split: {row["label"] for row in found} for split, found in data.splits.items()}
    assert labels["validation"] == labels["test"] == {"class 25"} and len(labels["train"]) == 26
    file = str(written(tmp_path, "json", rows[:25]))  # each is a class of its own
    problem = refused(Classification(data=file))
    assert re.search(r'films\.json, row \d+ has the class "class \d+", which no row of the training', problem)
    file = str(written(tmp_path, "tsv", [row | {"label": i / 7} for i, row in enumerate(rows)]))
    assert "holds scores, such as" in (problem := refused(Classification(data=file))) and "regression" in problem


@pytest.mark.parametrize("task", [Classification(data=""), Regression(data=""), Completion(response="{text}")])
def test_a_single_row_is_cut_up_where_it_is_running_text_alone(task, tmp_path):
    file = written(tmp_path, "tsv", ROWS[:1])
    assert f"{file}: 1 row is too few to hold some out" in refused(type(task)(**vars(task) | {"data": str(file)}))
    (tmp_path / "long.jsonl").write_text(json.dumps({"title": "a", "text": 100 * "words "}))
    assert len(read_usable(Text(data=str(tmp_path / "long.jsonl"))).rows["validation"]) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text\nfine\ncafé\n".encode("latin-1"), "line 3: the byte 0xe9 is not valid UTF-8: save it as UTF-8"),
        ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "line 1: the byte 0xe9"),
        ("a.tsv", "text\nfine\n".encode("utf-16"), "it is UTF-16, and must be UTF-8: `iconv -f UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b",}\n', "line 2, column 1"),
        ("a.jsonl", b'{"text": "a"},\n', "line 1, column 14: Extra data"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "line 2, column 1: Extra data: a file with an object a line"),
        ("a.json", b'[{"text": "a"},\n[1]]', "row 2 must be an object, not list"),
        ("a.json", b'{"text": "a",\n"text": "b"}', 'the key "text" stands twice'),
        ("a.tsv", b'text\tlabel\n"a\tb"\t1\n', "line 2: 3 cells, and the header has 2 (text, label); a tsv"),
        ("a.csv", b'text\n"a\nb"\n"never closed\n', "line 4: unexpected end of data"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_where(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_data(str(tmp_path / name))
    assert words in str(error.value) and str(error.value).startswith(f'task.data = "{tmp_path}/{name}": ')
