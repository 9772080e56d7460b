"""Data sets: `builtin:NAME`, a local file or folder, or a Hub data set -> rows by split, with a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.data.rows_file import SUFFIXES, Row, kind, read_rows
from lorabench.data.values import find

BUILTIN = Path(__file__).parent / "builtin"
SPLITS = ("train", "validation", "test")
ALIASES = {
    "train": ["train"],
    "validation": ["validation", "valid", "val", "dev", "validation_matched", "dev_matched"],
    "test": ["test"],
}
HELD_OUT = 20
"""Where a source has no validation (or test) split, each is one row of this many of `train` (5%)."""
NAMED = r"(\.|[-_]?(part|shard)?[-_]?\d)"
"""What follows a split's name in the names of its files."""
PART = re.compile(r"\D*(\d+)(?:-?of-?(\d+))?")
"""What numbers a part of a split, without its suffixes: `train.part2`, `train-00001-of-00004`."""
CUT_SEED = 0
"""Of the shuffle by which rows are held out; the same for every run, whatever its own seed."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows by split. `test` is empty where the source has none."""

    splits: dict[str, list[Row]]
    fingerprint: str
    """SHA-256 of the files' bytes, or the Hub's own fingerprint; where rows were held out, with these."""
    note: str = ""
    """How the splits were made, where the source did not give them."""


def read_data(source: str, revision: str | None = None, columns: str | None = None, label: str | None = None) -> Data:
    """The data set `source`. InputError with the choices if there is no such thing.

    `columns` names the columns of files without a header line, separated by commas. `label` is the column whose values
    rows that are held out have in the same shares as the rest.
    """
    if source.startswith("builtin:"):
        return _read_local(_builtin(source), columns, label)
    if os.path.exists(source):  # False also of a name that no file system takes
        return _read_local(Path(source), columns, label)
    if source.startswith((".", "/", "~")) or Path(source).suffix in SUFFIXES:
        raise InputError(f'task.data = "{source}": no such file or folder')
    return _read_hub(source, revision, label)


def _builtin(source: str) -> Path:
    folder = BUILTIN / source.removeprefix("builtin:")
    if not (folder / "train.jsonl.gz").exists():
        choices = sorted(f"builtin:{path.parent.name}" for path in BUILTIN.glob("*/train.jsonl.gz"))
        raise InputError(f'task.data = "{source}": no such built-in data set. Choices: {", ".join(choices)}')
    return folder


def _read_local(path: Path, columns: str | None, label: str | None) -> Data:
    files = _split_files(path) if path.is_dir() else {"train": [path]}
    digest = hashlib.sha256()
    splits: dict[str, list[Row]] = {}
    for split, parts in files.items():
        splits[split] = []
        for file in parts:
            content = _content(file)
            digest.update(f"{split} {len(content)} ".encode() + content)
            splits[split] += read_rows(file, content, columns)
        if not splits[split]:
            raise InputError(f'task.data = "{path}": {parts[0].name} holds no rows')
    return _complete(splits, digest.hexdigest(), label)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f'task.data = "{file}": cannot be read: {error.strerror}') from None


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """`train.*`, `validation.*` (or valid, val, dev) and `test.*` of a folder, each one file or numbered parts."""
    known = [file for file in sorted(folder.iterdir()) if kind(file) in SUFFIXES and file.is_file()]
    files = {}
    for split, names in ALIASES.items():
        found = {name: [file for file in known if re.match(rf"{name}{NAMED}", file.name)] for name in names}
        found = {name: parts for name, parts in found.items() if parts}
        if len(found) > 1:
            raise _unclear(folder, split, [file for parts in found.values() for file in parts])
        for parts in found.values():
            files[split] = parts if len(parts) == 1 else _in_order(folder, split, parts)
            _check_whole(folder, split, files[split])
    if "train" not in files:
        raise InputError(f'task.data = "{folder}": needs a file train.* of a kind in {", ".join(SUFFIXES)}')
    return files


def _in_order(folder: Path, split: str, files: list[Path]) -> list[Path]:
    """The numbered parts of one split. InputError where the files are no such parts: none is read by half."""
    numbers = {file: _number(file) for file in files}
    if None in numbers.values() or len(set(numbers.values())) < len(files) or len(set(map(kind, files))) > 1:
        raise _unclear(folder, split, files)
    return sorted(files, key=lambda file: numbers[file] or 0)


def _number(file: Path) -> int | None:
    match = PART.fullmatch(_stem(file))
    return int(match[1]) if match else None


def _stem(file: Path) -> str:
    return file.name[: file.name.rindex(kind(file))]


def _check_whole(folder: Path, split: str, files: list[Path]) -> None:
    """InputError where a file says of how many it is one, and others are missing."""
    for file in files:
        match = PART.fullmatch(_stem(file))
        if match and match[2] and int(match[2]) != len(files):
            says = f"{file.name} says that {split} has {int(match[2])} files, and {len(files)} are there"
            raise InputError(f'task.data = "{folder}": {says}')


def _unclear(folder: Path, split: str, files: Iterable[Path]) -> InputError:
    names = ", ".join(file.name for file in files)
    names = names if len(names) <= 200 else f"{names[:199]}…"
    return InputError(
        f'task.data = "{folder}": which is the {split} split? One file, or numbered parts of one: {names}'
    )


def _read_hub(source: str, revision: str | None, label: str | None) -> Data:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f'task.data = "{source}": is no local path, and Hub data needs `pip install datasets`'
        ) from None
    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, revision=revision)
    except Exception as error:  # datasets raises a dozen kinds for "not there", "no network", "no such config"
        message = f'task.data = "{source}": neither a local path nor a Hub data set that could be loaded'
        raise InputError(f"{message}: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    splits = {
        split: loaded[alias].to_list()
        for split, aliases in ALIASES.items()
        for alias in [next((a for a in aliases if a in loaded), None)]
        if alias
    }
    if "train" not in splits:
        raise InputError(f'task.data = "{source}": has no split "train" but {", ".join(loaded)}')
    fingerprint = ",".join(f"{split}:{loaded[split]._fingerprint}" for split in loaded)
    return _complete(splits, fingerprint, label)


def _complete(splits: dict[str, list[Row]], fingerprint: str, label: str | None) -> Data:
    """Cut validation and test out of train where the source does not give them."""
    train = splits["train"]
    missing = [split for split in SPLITS[1:] if split not in splits] if "validation" not in splits else []
    if not missing:
        return _data(splits, fingerprint)
    if len(train) == 1:  # one long text: cut by position
        splits = splits | _cut_text(train[0], missing)
        note = f"1/{HELD_OUT} of the text each, at its end"
    else:
        held = _held_out([None if label is None else find(row, label) for row in train], len(missing))
        splits = splits | {split: [train[i] for i in places] for split, places in zip(missing, held, strict=True)}
        out = {place for places in held for place in places}
        splits["train"] = [row for i, row in enumerate(train) if i not in out]
        fingerprint = hashlib.sha256(f"{fingerprint} {json.dumps(held)}".encode()).hexdigest()
        note = f"1/{HELD_OUT} each, at random (seed {CUT_SEED}){f', alike in {label}' if label else ''}"
    if not all(splits.get(split) for split in ("train", *missing)):
        raise InputError(f"task.data: {len(train)} rows are too few to hold some out for {' and '.join(missing)}")
    return _data(splits, fingerprint, f"{' and '.join(missing)} cut out of train, {note}")


def _data(splits: dict[str, list[Row]], fingerprint: str, note: str = "") -> Data:
    return Data(splits={split: splits.get(split, []) for split in SPLITS}, fingerprint=fingerprint, note=note)


def _held_out(labels: list[Any], num_splits: int) -> list[list[int]]:
    """The rows of each split to cut out: shuffled, sorted by label, and dealt one in HELD_OUT; stratified so.

    One row of each label always stays. Where most labels stand once they are no classes, and count as one.
    """
    places = list(range(len(labels)))
    random.Random(CUT_SEED).shuffle(places)
    by_label: dict[str, list[int]] = {}
    for place in places:
        by_label.setdefault(str(labels[place]), []).append(place)
    if 2 * len(by_label) > len(places):
        by_label = {"": places}
    dealt = [place for alike in by_label.values() for place in alike[1:]]
    return [sorted(dealt[offset::HELD_OUT]) for offset in range(num_splits)]


def _cut_text(row: Row, missing: list[str]) -> dict[str, list[Row]]:
    key = max((key for key in row if isinstance(row[key], str)), key=lambda key: len(row[key]), default=None)
    if key is None:
        return {}
    text, size = row[key], len(row[key]) // HELD_OUT
    end = len(text) - size * len(missing)
    parts = {"train": [{key: text[:end]}]}
    for i, split in enumerate(missing):
        parts[split] = [{key: text[end + i * size : end + (i + 1) * size]}]
    return parts
