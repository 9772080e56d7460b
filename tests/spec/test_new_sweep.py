"""The sweeps that `new` writes for one's own data: each passes `plan`, and reads the columns that are there."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorabench.cli import main
from lorabench.config.decode import InputError
from lorabench.data.columns import called, numbered
from lorabench.spec.new_sweep import MODELS, new_sweep
from lorabench.spec.sweep import read_sweep

NUMBERS = range(40)
ROWS: dict[str, Sequence[dict[str, Any]]] = {
    "text": [{"id": i, "body": f"def f{i}(x):\n    return x + {i}\n" * 8} for i in NUMBERS],
    "classification": [{"n": str(i), "review": f"the film number {i}", "mood": "", "label": "ab"[i % 2]}
                       for i in NUMBERS],
    "completion": [{"instruction": f"add {i}", "input": "", "output": str(i + 1)} for i in NUMBERS],
    "chat": [{"conversation": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
             for i in NUMBERS],
    "multiple_choice": [{"question": f"{i} + 1?", "options": [str(i), str(i + 1), "none"], "answer": "B"}
                        for i in NUMBERS],
    "regression": [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i % 7 / 2} for i in NUMBERS],
}  # fmt: skip
FOUND = {
    "text": {"text": "body"},
    "classification": {"text": "review", "label": "label"},
    "completion": {"prompt": "{instruction}\n{input}\n", "response": "{output}"},
    "chat": {"messages": "conversation"},
    "multiple_choice": {"question": "{question}", "choices": "options", "answer": "answer", "answer_is": "letter"},
    "regression": {"text": "sentence1", "text_pair": "sentence2", "label": "score"},
}


def written(name: str, folder: Path, suffix: str = ".jsonl") -> Path:
    file = folder / f"{name}{suffix}"
    with open(file, "w", newline="") as handle:
        if suffix == ".csv":
            writer = csv.DictWriter(handle, list(ROWS[name][0]))
            writer.writeheader()
            writer.writerows(ROWS[name])
        else:
            handle.writelines(json.dumps(row) + "\n" for row in ROWS[name])
    return file


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, ".jsonl") for name in ROWS), ("classification", ".csv"), ("txt", "")]
)
def test_what_is_written_can_be_planned(
    name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "txt":
        data, name = tmp_path / "prose.txt", "text"
        data.write_text("It was the best of times, it was the worst of times.\n" * 200)
        wanted = {"text": "text"}
    else:
        data, wanted = written(name, tmp_path, suffix), FOUND[name]
    sweep = tmp_path / "own.toml"
    assert main(["new", "--data", str(data), "-o", str(sweep)]) == 0
    task = tomllib.loads(sweep.read_text())["base"]["task"]
    assert task["name"] == name and task["data"] == str(data)
    assert {key: task[key] for key in wanted} == wanted
    capsys.readouterr()
    assert main(["plan", str(sweep), "--results", str(tmp_path / "results"), "--device", "cpu", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 24
    text = sweep.read_text()
    assert main(["new", "--data", str(data), "-o", str(sweep)]) == 2
    assert "is there already" in capsys.readouterr().err and sweep.read_text() == text


def test_a_table_without_a_header_gets_names_for_its_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SST-2 is passed on: else its first sentence would be a column's name."""
    data, sweep = tmp_path / "reviews.tsv", tmp_path / "own.toml"
    data.write_text("".join(f"the film number {i}\t{i % 2}\t0.{i}\n" for i in NUMBERS))
    assert main(["new", "--data", str(data), "-o", str(sweep)]) == 0
    task = tomllib.loads(sweep.read_text())["base"]["task"]
    assert (task["name"], task["columns"]) == ("classification", "text,label,column_3")
    assert (task["text"], task["label"]) == ("text", "label")
    capsys.readouterr()
    assert main(["plan", str(sweep), "--results", str(tmp_path / "results"), "--device", "cpu", "--json"]) == 0
    header = tmp_path / "named.tsv"
    header.write_text("words\tlabel\n" + data.read_text().replace("\t0.", " "))
    assert main(["new", "--data", str(header), "-o", str(tmp_path / "named.toml")]) == 0
    assert "columns" not in tomllib.loads((tmp_path / "named.toml").read_text())["base"]["task"]


def test_without_data_there_is_what_is_built_in(tmp_path: Path) -> None:
    for data, task in ((None, "text"), ("builtin:arithmetic", "completion")):
        (tmp_path / "a.toml").write_text(new_sweep(None, data, None))
        assert {run.task.name for run in read_sweep(tmp_path / "a.toml").runs} == {task}


def test_the_choices_of_a_question_may_be_columns(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "option_a": f"x{i}", "option_b": f"y{i}", "answer": i % 2 + 1} for i in NUMBERS]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    task = tomllib.loads(new_sweep(None, str(tmp_path / "q.json"), None))["base"]["task"]
    assert (task["name"], task["choices"], task["answer_is"]) == ("multiple_choice", "option_a, option_b", "number")


def test_a_model_of_a_kind_that_is_not_built_in_must_be_named(tmp_path: Path, monkeypatch) -> None:
    data = str(written("completion", tmp_path))
    base = tomllib.loads(new_sweep("seq2seq", data, None))["base"]
    assert (base["model"], base["task"]["name"]) == ("builtin:tiny-t5", "seq2seq")
    monkeypatch.delitem(MODELS, "AutoModelForSeq2SeqLM")
    with pytest.raises(InputError, match="--model: is missing: seq2seq needs one that AutoModelForSeq2SeqLM loads"):
        new_sweep("seq2seq", data, None)
    task = tomllib.loads(new_sweep("seq2seq", data, "t5-small"))["base"]["task"]
    assert (task["source"], task["target"]) == ("{input}", "{output}")


def test_data_that_no_task_knows_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text("".join(f'{{"x": {i}}}\n' for i in NUMBERS))
    with pytest.raises(InputError, match="no task is known by its columns, x: --task names one"):
        new_sweep(None, str(tmp_path / "n.jsonl"), None)
    with pytest.raises(
        InputError, match=r"--task chat: no columns of .* are known as what chat reads: x; `lorabench list"
    ):
        new_sweep("chat", str(tmp_path / "n.jsonl"), None)


def test_columns_are_known_by_their_words() -> None:
    assert called(["id", "Label", "my_label"], "label class") == "Label"
    assert called(["id", "my_label"], "class label") == "my_label" and called(["labelled"], "label") is None
    assert numbered(["q", "ending0", "ending1", "label"]) == ["ending0", "ending1"]
    assert numbered(["question", "A", "B", "C"]) == ["A", "B", "C"] and numbered(["text", "label"]) == []


def test_images_by_class_get_a_sweep_of_their_own(tmp_path):
    for number in range(8):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (9 * number, 0, 0)).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    base = tomllib.loads(new_sweep(None, str(tmp_path), None))["base"]
    wanted = {"name": "image_classification", "data": str(tmp_path), "image": "image", "label": "label"}
    assert (base["model"], base["task"]) == ("builtin:tiny-vit", wanted) and "seq_len" not in base
    assert (
        tomllib.loads(new_sweep("image_classification", None, None))["base"]["task"]["data"] == "builtin:digits-turned"
    )
