"""Data from files: every kind gives the same rows, and what is wrong is said with its choices."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter

import pandas as pd
import pytest

from lorabench.config.decode import InputError
from lorabench.data.dataset import builtin_data, read_data

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
    wanted = [{key: str(value) for key, value in row.items()} for row in ROWS] if kind in ("csv", "tsv") else ROWS
    assert sorted(map(str, seen)) == sorted(map(str, wanted))
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
    assert rows[0] == {"sentence": "a fine film", "label": "1"}


def test_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("a fine film\t1\t0\n" * 30)
    with pytest.raises(InputError, match=r'task\.columns has the column "label" twice'):
        read_data(str(tmp_path), columns="text,label,label")


def test_the_fingerprint_is_of_the_content(tmp_path):
    file = write(tmp_path, "jsonl")
    before = read_data(str(tmp_path)).fingerprint
    assert read_data(str(file)).fingerprint == before
    file.write_text(file.read_text().replace("sentence", "phrase", 1))
    assert read_data(str(tmp_path)).fingerprint != before


def test_nothing_is_guessed(tmp_path):
    """A null beside 1990 leaves it a whole number, and 01000 keeps its zero."""
    rows = [{"year": None if i == 3 else 1990, "zip": "01000", "when": "2020-01-01"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_text("year,zip,when\n" + 40 * "1990,01000,2020-01-01\n")
    pd.DataFrame(rows).astype({"year": "Int64"}).to_parquet(tmp_path / "c.parquet")
    for name, year in (("a.jsonl", 1990), ("b.csv", "1990"), ("c.parquet", 1990)):
        seen = [row for part in read_data(str(tmp_path / name)).splits.values() for row in part]
        assert len(seen) == 40
        assert {repr(row["year"]) for row in seen} <= {repr(year), "None"}
        assert {(row["zip"], row["when"]) for row in seen} == {("01000", "2020-01-01")}


def test_what_is_held_out_has_the_classes_of_the_rest(tmp_path):
    """Rows whose classes alternate: by their places, one class would be in validation and the other in test."""
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"row {i}\t{i % 4}\n" for i in range(400)))
    data = read_data(str(tmp_path / "a.tsv"), label="label")
    counts = {split: Counter(row["label"] for row in rows) for split, rows in data.splits.items()}
    assert sum(map(Counter.total, counts.values())) == 400
    assert {*counts["validation"].values(), *counts["test"].values()} == {5}
    assert "at random (seed 0), alike in label" in data.note
    plain = read_data(str(tmp_path / "a.tsv"))
    assert plain.fingerprint != data.fingerprint  # other rows are held out: other data


def test_a_class_of_one_row_stays_in_train(tmp_path):
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "a\tcommon\n" * 60 + "b\trare\n")
    splits = read_data(str(tmp_path / "a.tsv"), label="label").splits
    assert [row["label"] for row in splits["train"]].count("rare") == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train.part1.jsonl", "train.part2.jsonl"], None),
        (["train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl"], None),
        (["train_10.jsonl", "train_9.jsonl"], None),
        (["train-00000-of-00002.jsonl"], "has 2 files, and 1 are there"),
        (["train.jsonl", "train.part1.jsonl"], "which is the train split"),
        (["train.en.jsonl", "train.de.jsonl"], "which is the train split"),
        (["train.jsonl", "train.jsonl.gz"], "which is the train split"),
        (["train.part1.jsonl", "train.part3.jsonl"], "train has parts 1 to 3, and part 2 is not there"),
        (["train-00001-of-00002.jsonl", "train-00005-of-00002.jsonl"], "part 2 is not there"),
    ],
)
def test_parts_of_a_split_are_read_whole_or_refused(names, words, tmp_path):
    for number, name in enumerate(names):
        (tmp_path / name).write_text("".join(json.dumps({"text": f"{number} {i}"}) + "\n" for i in range(30)))
    if words:
        with pytest.raises(InputError, match=words):
            read_data(str(tmp_path))
        return
    data = read_data(str(tmp_path))
    assert sum(map(len, data.splits.values())) == 60
    order = sorted(range(2), key=lambda n: [int(part) for part in re.findall(r"\d+", names[n])])
    assert data.splits["train"][0]["text"].startswith(str(order[0]))


@pytest.mark.parametrize(
    "name",
    ["validation.jsonl.zst", "validation.xlsx", "Validation.jsonl", "dev.JSONL", "val/part.jsonl", "valid-1.arrow"],
)
def test_no_rows_are_held_out_in_the_place_of_a_split_that_is_there(name, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' * 60)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"text": "b"}\n')
    (first, *_) = name.split("/")
    with pytest.raises(InputError, match=rf"{re.escape(first)} is (a folder|of no kind).*a split is validation\.\*"):
        read_data(str(tmp_path))


def test_what_is_no_data_may_have_the_name_of_a_split(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' * 60)
    for name in ("test.py", "train.log", "validation.md", "testament.csv", "devices", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "b"}\n')
    data = read_data(str(tmp_path))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 57, "validation": 3, "test": 1}


def test_columns_by_row_are_put_together_by_the_names_of_the_rows(tmp_path):
    """As pandas writes them, whatever their order."""
    file = tmp_path / "a.json"
    texts, labels = {str(i): f"text {i}" for i in range(60)}, {str(i): i % 2 for i in reversed(range(60))}
    file.write_text(json.dumps({"text": texts, "label": labels}))
    rows = [row for split in read_data(str(file)).splits.values() for row in split]
    assert {(row["text"], row["label"]) for row in rows} == {(f"text {i}", i % 2) for i in range(60)}
    file.write_text(json.dumps({"text": texts, "label": {str(i + 1): 0 for i in range(60)}}))
    with pytest.raises(InputError, match=r'row "(0|60)" is in one of the columns "text" and "label" alone'):
        read_data(str(file))


def test_a_single_text_is_cut_where_it_stands_and_keeps_its_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"meta": "x" * 9000, "body": "0123456789" * 100}))
    splits = read_data(str(file), text="body").splits
    assert {split: len(row["body"]) for split, (row,) in splits.items()} == {"train": 900, "validation": 50, "test": 50}
    assert all(row["meta"] == "x" * 9000 for (row,) in splits.values())


def test_two_names_for_one_split_are_refused(tmp_path):
    for name in ("train", "dev", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n' * 30)
    with pytest.raises(InputError, match=r"which is the validation split.*validation\.jsonl, dev\.jsonl"):
        read_data(str(tmp_path))


def test_builtin_data_is_there():
    columns = {"english-docs": "text", "python-code": "text", "arithmetic": "prompt", "questions": "question"}
    columns |= dict.fromkeys(("digits", "digits-16", "digits-outlined", "digits-turned"), "image")
    assert sorted(builtin_data()) == sorted(f"builtin:{name}" for name in columns)
    for name, column in columns.items():
        splits = read_data(f"builtin:{name}").splits
        assert all(splits[split][0][column] for split in ("train", "validation", "test"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.csv", None, ["nowhere.csv", "no such file"]),
        ("empty/", None, ["empty", "train.*", ".jsonl"]),
        ("train.jsonl", "{not json\n", ["train.jsonl", "cannot be read"]),
        ("train.csv", "text,label\nfine,1\nbad,0,9\n", ["line 3", "3 cells", "the header has 2 (text, label)"]),
        ("train.tsv", "text\tlabel\n\nfine\n", ["line 3", "1 cells"]),
        ("train.csv", 'text,label\n"never closed,1\n', ["train.csv", "line 2"]),
        ("train.csv", "text,text\na,b\n", ["line 1", '"text" twice']),
        ("train.jsonl", '{"text": "a"}\n[1]\n', ["line 2", "must be an object, not list"]),
        ("train.json", '{"text": ["a"], "label": [1, 2]}', ["not of one length"]),
        ("train.json", "[" * 100_000, ["nested too deeply"]),
        ("train.csv.gz", "no gzip", ["cannot be read"]),
        ("train.parquet", "no parquet", ["cannot be read"]),
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


@pytest.mark.parametrize(("suffix", "around"), [("jsonl", ""), ("json", "[]")])
def test_a_key_that_stands_twice_is_refused(tmp_path, suffix, around):
    file = tmp_path / f"a.{suffix}"
    file.write_text(around[:1] + '{"text": "a", "label": 1, "label": 0}' + around[1:])
    with pytest.raises(InputError, match=r'the key "?label"? stands twice in one object'):
        read_data(str(file))
