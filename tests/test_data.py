"""Data from files: every kind gives the same rows, and what is wrong is said with its choices."""

from __future__ import annotations

import gzip
import json

import pandas as pd
import pytest

from lorabench.data import read_data
from lorabench.decode import InputError

ROWS = [{"text": f'sentence "{i}" with a quote', "label": i % 3} for i in range(40)]


def write(folder, kind):
    frame = pd.DataFrame(ROWS)
    file = folder / f"train.{kind}"
    match kind:
        case "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case "jsonl.gz":
            file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
        case "json":
            file.write_text(json.dumps(ROWS))
        case "csv":
            frame.to_csv(file, index=False)
        case "tsv":
            file.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS))
        case "parquet":
            frame.to_parquet(file)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    write(tmp_path, kind)
    data = read_data(str(tmp_path))
    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [36, 2, 2]
    seen = [row for rows in data.splits.values() for row in rows]
    assert sorted(map(str, seen)) == sorted(map(str, ROWS))
    assert "cut out of train" in data.note


def test_splits_that_are_given_are_kept(tmp_path):
    for name, rows in {"train": ROWS[:30], "dev": ROWS[30:35], "test": ROWS[35:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_data(str(tmp_path))
    assert data.splits == {"train": ROWS[:30], "validation": ROWS[30:35], "test": ROWS[35:]}
    assert data.note == ""


def test_a_text_is_cut_by_position(tmp_path):
    text = "".join(f"line {i}\n" for i in range(2000))
    (tmp_path / "book.txt").write_text(text)
    splits = read_data(str(tmp_path / "book.txt")).splits
    assert "".join(splits[name][0]["text"] for name in ("train", "validation", "test")) == text
    assert len(splits["validation"][0]["text"]) == len(text) // 20


def test_columns_name_a_file_without_header(tmp_path):
    (tmp_path / "train.tsv").write_text("a fine film\t1\n" * 30)
    rows = read_data(str(tmp_path), columns="sentence,label").splits["train"]
    assert rows[0] == {"sentence": "a fine film", "label": 1}


def test_the_fingerprint_is_of_the_content(tmp_path):
    file = write(tmp_path, "jsonl")
    before = read_data(str(tmp_path)).fingerprint
    assert read_data(str(file)).fingerprint == before
    file.write_text(file.read_text().replace("sentence", "phrase", 1))
    assert read_data(str(tmp_path)).fingerprint != before


def test_builtin_data_is_there():
    for name in ("english-docs", "python-code"):
        splits = read_data(f"builtin:{name}").splits
        assert all(splits[split][0]["text"] for split in ("train", "validation", "test"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.csv", None, ["nowhere.csv", "no such file"]),
        ("empty/", None, ["empty", "train.*", ".jsonl"]),
        ("train.jsonl", "{not json\n", ["train.jsonl", "cannot be read"]),
        ("train.xlsx", "?", ["train.xlsx", "unknown kind", ".parquet"]),
        ("train.jsonl", '{"text": "only one"}\n{"text": "and two"}\n', ["validation"]),
    ],
)
def test_bad_data_is_named(name, content, words, tmp_path):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        read_data(str(path))
    assert all(word in str(error.value) for word in words), error.value
