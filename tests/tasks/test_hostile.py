"""Data files of any kind and content under every task: examples or an InputError, never another exception."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from dataclasses import fields
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from lorabench.config import plugins
from lorabench.config.decode import InputError, decode
from lorabench.spec.task import Task
from lorabench.training.examples import read_usable, tokenized

BUILTIN = {"tokens": "builtin:tiny-llama", "images": "builtin:tiny-vit"}
CASES = 300
"""Of each task."""
VALUES = [
    None, "", " ", "a text of some words", "x" * 300, "\ud800", "\x00\x1b[31m", "naïve", "-1", -1, -1.0, 0, "0", 0.0,
    1, 1.0, 2, 3.25, "4.50", 10**30, 1e300, float("nan"), float("inf"), True, [], ["a", "b"], {}, {"q": "deep"},
    {"q": None}, "yes", "no", "01000", "1_000", "nan", "<|eos|>", "\n", "\u2028", "{text}",
]  # fmt: skip
TALK = [{"role": role, "content": f"what the {role} says"} for role in ("system", "user", "assistant", "user")]
IMAGE = [[0, 128, 255], [3, 2, 1]]
NAMES = ["text", "label", "meta.q", "meta", "", "a b", "\x1b[0m", "{", "text[0]", "index"]
TEMPLATES = [
    "{text}", "{meta.q}", "{text", "{}", "{text[0]}", "{text!r:>9}", "{label:d}", "", "}", "{text:{label}}", "x",
    "{text} {text}", "{text}!",
]  # fmt: skip
OWN = {"chat": ["messages"], "image_classification": ["image"], "denoising": ["image", "label"]}
KINDS = ["jsonl", "jsonl", "jsonl", "json", "csv", "tsv", "parquet", "txt", "jsonl.gz"]


def cells(draw: random.Random, names: list[str], tame: bool) -> list[dict]:
    """Rows that may lack a column; of `tame` ones the columns are of one type each, but for a few cells."""
    kinds = {"label": [["yes", "no"], [0, 1], [0.0, 1.0, 2.5], [1, 3, 4]], "messages": [[TALK], [TALK, TALK[1:]]],
             "image": [[IMAGE], [IMAGE, IMAGE[1:]], ["here.png", "gone.png"]]}  # fmt: skip
    usual = {name: draw.choice(kinds.get(name, [["a text of some words", "another"]])) for name in names}
    return [
        {
            name: draw.choice(usual[name]) if tame and draw.random() > 0.001 else draw.choice(VALUES)
            for name in names
            if tame or draw.random() > 0.05
        }
        for _ in range(draw.choice([0, 2, 30, 60, 60]))
    ]


def written(draw: random.Random, kind: str, rows: list[dict]) -> bytes:
    """The file, at times damaged."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    match kind:
        case "jsonl" | "jsonl.gz":
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        case "json":
            content = json.dumps(rows if draw.random() < 0.7 else {n: [r.get(n) for r in rows] for n in names}).encode()
        case "csv":
            text = io.StringIO()
            lines = csv.writer(text)
            lines.writerows([names, *([row.get(name) for name in names] for row in rows)])
            content = text.getvalue().encode("utf-8", "replace")
        case "parquet":
            texts = [{n: row.get(n) if isinstance(row.get(n), str) else None for n in names} for row in rows]
            table = [{name: value and value.replace("\ud800", "?") for name, value in row.items()} for row in texts]
            buffer = io.BytesIO()
            parquet.write_table(pyarrow.Table.from_pylist(table), buffer)
            content = buffer.getvalue()
        case _:
            content = "\n".join("\t".join(str(value) for value in row.values()) for row in rows).encode(
                "utf-8", "replace"
            )
    if draw.random() < 0.15 and content:
        place = draw.randrange(len(content))
        content = content[:place] + draw.choice([b"", b"\xff", b'"', b"\t", b"\n,", b"{"]) + content[place + 1 :]
    return gzip.compress(content) if kind.endswith("gz") else content


def fill(draw: random.Random, folder: Path, name: str) -> str:
    """A data set in `folder` for a task: what `task.data` names."""
    names = draw.sample(NAMES, draw.randint(0, 3)) + OWN.get(name, [])
    names += draw.choice([["text", "label"], ["text", "label"], []])
    kind, tame = draw.choice(KINDS), draw.random() < 0.8
    splits = draw.choice([["train"], ["train", "validation"], ["train", "dev", "test"], ["train.part1", "train.part2"]])
    for split in splits:
        rows = cells(draw, list(dict.fromkeys(names)), tame)
        (folder / f"{split}.{kind}").write_bytes(written(draw, kind, rows))
    return str(folder if draw.random() < 0.8 else folder / f"{splits[0]}.{kind}")


def any_task(draw: random.Random, name: str, data: str) -> Task:
    kind = plugins.plugin_class("tasks", name)
    known = {field.name for field in fields(kind)}
    choices = {
        "text": ["text", "text", "meta.q", "gone"], "label": ["label", "label", "text"], "retain": [None, data],
        "text_pair": [None, None, "meta.q"], "columns": [None, None, None, "text,label", "label,label"],
        "question": ["{text}"] * 20 + TEMPLATES, "choices": ["text, label"] * 9 + ["meta", "text,gone"],
        "answer": ["label"], "answer_is": ["text"] * 9 + ["index", "letter"], "labels": [None] * 9 + ["meta.q"],
        "messages": ["messages"] * 9 + ["text"], "image": ["image"] * 9 + ["text"], "train_on": ["assistant", "last"],
        "template": [plugins.example("tasks", "chat").template] * 5 + [None, "{{", "{{ messages }}", "{{ 1 / 0 }}"],
        "prompt": TEMPLATES, "response": TEMPLATES, "source": TEMPLATES, "target": TEMPLATES, "max_target": [None, 4],
        "unlabelled": [None, None, "", "-1", "no"],
    }  # fmt: skip
    if name == "denoising":
        choices |= {"prompt": ["{}"] * 9 + TEMPLATES[:5], "condition": ["label"] * 9 + ["text", None]}
    return decode(kind, {"data": data} | {key: draw.choice(found) for key, found in choices.items() if key in known})


@pytest.mark.parametrize("name", plugins.names("tasks"))
def test_any_file_gives_examples_or_one_clear_error(name, tmp_path):
    unit, outcomes = plugins.plugin_class("tasks", name).unit, []
    model = "builtin:tiny-diffusion" if name == "denoising" else BUILTIN[unit]
    tokenizer = plugins.example("tasks", name).reads_with(model, None)
    for seed in range(CASES):
        draw = random.Random(f"{name} {seed}")
        folder = tmp_path / str(seed)
        folder.mkdir()
        task = any_task(draw, name, fill(draw, folder, name))
        try:
            splits = tokenized(task, read_usable(task), tokenizer, draw.choice([2, 16, 64]))
        except InputError as error:
            outcomes.append("refused")
            for problem in error.problems:
                assert problem.isprintable() and len(problem) < 900, (seed, problem)
        else:
            outcomes.append("read")
            assert splits["train"] and splits["validation"], seed
    assert outcomes.count("read") >= 5 and outcomes.count("refused") >= 20, outcomes
