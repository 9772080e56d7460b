"""What is wrong with data is told by `plan`, with the choices, before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorabench.cli import main

ROWS = [{"text": f"some words {i}", "label": i % 2, "q": f"question {i}", "a": f"answer {i}"} for i in range(60)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def labelled(*labels: Any) -> str:
    return lines([row | {"label": label} for row, label in zip(ROWS, labels, strict=False)])


FILES = {
    "good.jsonl": lines(ROWS),
    "one.jsonl": labelled(*60 * [1]),
    "sorted.jsonl": labelled(*30 * [0], *30 * [1]),
    "bare.tsv": "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS),
    "bare.csv": "".join(f"{row['text']},{row['label']}\n" for row in ROWS),
    "split/train.jsonl": lines(ROWS),
    "split/validation.jsonl": lines(ROWS[:5]),
    "hollow/train.jsonl": lines(ROWS),
    "hollow/validation.jsonl": "",
    "unsaid/train.jsonl": lines(ROWS),
    "unsaid/validation.jsonl": labelled(*5 * [None]),
    "short.txt": "hi",
}
CLASSES, PAIRS, TEXT = 'name = "classification"\n', 'name = "completion"\n', 'name = "text"\n'
HEADER = "These are the first line; where that is no header, name the columns by task.columns (any task but text)"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (TEXT + 'data = "./nowhere"', ['task.data = "./nowhere": no such file or folder']),
        (TEXT + 'data = "nothing.csv"', ['task.data = "nothing.csv": no such file or folder']),
        (
            TEXT + 'data = "builtin:java-code"',
            ['task.data = "builtin:java-code": no such built-in data set. Choices: builtin:arithmetic, '
             "builtin:digits, builtin:digits-16, builtin:digits-outlined, builtin:digits-turned, builtin:english-docs, "
             "builtin:python-code, builtin:questions"],
        ),
        (TEXT + 'data = "good.jsonl"\nretain = "nothing.txt"', ['task.retain = "nothing.txt": no such file or folder']),
        (
            CLASSES + 'data = "good.jsonl"\nlabel = "class"',
            ['train split: task.label = "class": no such column in good.jsonl. Choices: text, label, q, a'],
        ),
        *(
            (
                CLASSES + f'data = "{name}"',
                [f'train split: task.{key} = "{key}": no such column in {name}. Choices: some words 0, 0. {HEADER}'
                 for key in ("text", "label")],
            )
            for name in ("bare.tsv", "bare.csv")
        ),
        (
            CLASSES + 'data = "bare.tsv"\ncolumns = "body,label"',
            ['train split: task.text = "text": no such column in bare.tsv. Choices: body, label'],
        ),
        (
            PAIRS + 'data = "good.jsonl"\nprompt = "constant text"\nresponse = "{a}"',
            ['train split: task.prompt = "constant text": names no column in braces: every prompt would be the same. '
             "Choices: text, label, q, a"],
        ),
        (
            PAIRS + 'data = "split"\nprompt = "constant"\nresponse = "{{a}}"',
            ['train split: task.prompt = "constant": names no column in braces: every prompt would be the same. '
             "Choices: text, label, q, a",
             'train split: task.response = "{{a}}": names no column in braces: every response would be the same. '
             "Choices: text, label, q, a"],
        ),
        (
            PAIRS + 'data = "good.jsonl"\nprompt = "{question}"\nresponse = "{a}"',
            ['train split: task.prompt = "{question}": no such column in good.jsonl: "question". '
             "Choices: text, label, q, a"],
        ),
        (CLASSES + 'data = "hollow"', ['task.data = "hollow": validation.jsonl holds no rows']),
        (
            CLASSES + 'data = "unsaid"\nunlabelled = ""',
            ['validation split: task.label = "label": no row of unsaid/validation.jsonl has a label'],
        ),
        (TEXT + 'data = "short.txt"', ["train split: seq_len = 32: is longer than the whole text (3 tokens)"]),
        (
            CLASSES + 'data = "one.jsonl"',
            ["train split: task.label = \"label\": needs at least two classes, found ['1']"],
        ),
        (
            CLASSES + 'data = "sorted.jsonl"\nmax_train = 10',
            ['train split: task.max_train = 10: so many rows of train are all of the class "0": take more, or shuffle '
             "the file"],
        ),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_refused_by_plan(
    task: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    base = 'model = "builtin:tiny-llama"\nmethod.name = "lora"\nseq_len = 32\nsteps = 2\nseed = [0, 1]\n'
    Path("s.toml").write_text(f"[base]\n{base}[base.task]\n{task}\n")
    assert main(["plan", "s.toml"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"lorabench: error: s: {problem}" for problem in expected]


def test_classes_that_the_first_rows_have_are_enough(tmp_path: Path) -> None:
    from lorabench.tasks.classification import Classification
    from lorabench.training.examples import read_usable

    (tmp_path / "sorted.jsonl").write_text(FILES["sorted.jsonl"])
    read_usable(Classification(data=str(tmp_path / "sorted.jsonl"), max_train=40))
