"""Data sets: `builtin:NAME`, a local file or folder, or a Hub data set -> rows by split, with a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show, show_path
from lorabench.data.image_folder import has_images, image_rows, image_splits, named_images
from lorabench.data.rows_file import SUFFIXES, Row, Source, kind, placed, read_rows, source_of
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
NO_DATA = (".py", ".ipynb", ".sh", ".md", ".log", ".yaml", ".yml", ".toml")
"""What may lie beside data under the name of a split."""
PART = re.compile(r"\D*(\d+)(?:-?of-?(\d+))?")
"""What numbers a part of a split, without its suffixes: `train.part2`, `train-00001-of-00004`."""
CUT_SEED = 0
"""Of the shuffle by which rows are held out; the same for every run, whatever its own seed."""


Read = tuple[dict[str, list[Row]], str]
"""The splits that a source has, and the fingerprint of their content."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows by split. `test` is empty where the source has none."""

    splits: dict[str, list[Row]]
    fingerprint: str
    """SHA-256 of the files' bytes, with those of images that they name, or the Hub's own fingerprint; where rows were
    held out, with these."""
    note: str = ""
    """How the splits were made, where the source did not give them."""
    held_out: tuple[str, ...] = ()
    """The splits that were cut out of `train`, and so are of its files."""


def read_data(
    source: str,
    revision: str | None = None,
    columns: str | None = None,
    label: str | None = None,
    is_running_text: bool = True,
    text: str = "text",
) -> Data:
    """The data set `source`. InputError with the choices if there is no such thing.

    `columns` names the columns of files without a header line, separated by commas. `label` is the column whose values
    rows that are held out have in the same shares as the rest. Of running text a single row is cut up, by its column
    `text`. `SOURCE@SPLIT` is that split of it alone, whatever its name, as the validation split of what has no other.
    """
    whole, split = _one_split(source)
    if split:
        found, fingerprint = _read(whole, revision, columns, {split: ALIASES.get(split, [split])})
        return _data({"validation": found[split]}, fingerprint)
    return _complete(*_read(source, revision, columns, ALIASES), label, text if is_running_text else None)


def _one_split(source: str) -> tuple[str, str]:
    """What stands before and behind `@`; nothing behind where it is a part of a file's name."""
    whole, _, split = source.rpartition("@")
    return (whole, split) if whole and re.fullmatch(r"\w+", split) and not os.path.exists(source) else (source, "")


def _read(source: str, revision: str | None, columns: str | None, names: dict[str, list[str]]) -> Read:
    """`names`: the splits that are asked for -> what each may be called."""
    if source.startswith("builtin:"):
        return _read_local(_builtin(source), columns, names, called=source)
    if os.path.exists(source):  # False also of a name that no file system takes
        return _read_local(Path(source), columns, names)
    if source.startswith((".", "/", "~")) or Path(source).suffix in SUFFIXES:
        raise InputError(f'task.data = "{show_path(source)}": no such file or folder')
    return _read_hub(source, revision, names)


def _builtin(source: str) -> Path:
    folder = BUILTIN / source.removeprefix("builtin:")
    if not os.path.exists(folder / "train.jsonl.gz"):
        choices = ", ".join(builtin_data())
        raise InputError(f"task.data = {show(source)}: no such built-in data set. Choices: {choices}")
    return folder


@cache
def builtin_data() -> tuple[str, ...]:
    return tuple(sorted(f"builtin:{path.parent.name}" for path in BUILTIN.glob("*/train.jsonl.gz")))


def _read_local(path: Path, columns: str | None, names: dict[str, list[str]], called: str = "") -> Read:
    """`called` is what messages say instead of the path, where that is none of the user's."""
    if names is not ALIASES and not path.is_dir():
        raise InputError(f'task.data = "{show_path(path)}@{next(iter(names))}": a single file has no splits')
    if path.is_dir() and not any(kind(file) in SUFFIXES for file in path.iterdir()) and has_images(path):
        return _read_images(path, names)
    files = _split_files(path, names) if path.is_dir() else {"train": [path]}
    digest = hashlib.sha256()
    splits: dict[str, list[Row]] = {}
    for split, parts in files.items():
        splits[split] = []
        for file in parts:
            content = _content(file)
            digest.update(f"{split} {len(content)} ".encode() + content)
            rows = read_rows(file, content, columns, f"{called}, {split}" if called else "")
            for image in named_images(rows, file.parent):
                content = _content(image)
                digest.update(f"{image.name} {len(content)} ".encode() + content)
            splits[split] += rows
        if not splits[split]:
            raise InputError(f'task.data = "{show_path(path)}": {show_path(parts[0].name)} holds no rows')
    return splits, digest.hexdigest()


def _read_images(folder: Path, names: dict[str, list[str]]) -> Read:
    """A row an image; the fingerprint is of their names and bytes, read one at a time."""
    digest = hashlib.sha256()
    splits: dict[str, list[Row]] = {}
    for split, classes in image_splits(folder, names).items():
        for name, files in classes.items():
            for file in files:
                content = _content(file)
                digest.update(f"{split} {name} {file.name} {len(content)} ".encode() + content)
        splits[split] = [*image_rows(classes)]
    return splits, digest.hexdigest()


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f'task.data = "{show_path(file)}": cannot be read: {error.strerror}') from None


def _split_files(folder: Path, names: dict[str, list[str]]) -> dict[str, list[Path]]:
    """`train.*`, `validation.*` (or valid, val, dev) and `test.*` of a folder, each one file or numbered parts."""
    known = [file for file in sorted(folder.iterdir()) if kind(file) in SUFFIXES and file.is_file()]
    files = {}
    for split, called in names.items():
        found = {name: [file for file in known if re.match(rf"{name}{NAMED}", file.name)] for name in called}
        found = {name: parts for name, parts in found.items() if parts}
        if len(found) > 1:
            raise _unclear(folder, split, [file for parts in found.values() for file in parts])
        for parts in found.values():
            files[split] = parts if len(parts) == 1 else _in_order(folder, split, parts)
            _check_whole(folder, split, files[split])
        if split not in files:
            _check_unread(folder, split, called)
    needed = next(iter(names))
    if needed not in files:
        needs = f"needs a file {needed}.* of a kind in {', '.join(SUFFIXES)}"
        there = "" if names is ALIASES else f". Choices: {clip(', '.join(file.name for file in known), 200)}"
        raise InputError(f'task.data = "{show_path(folder)}": {needs}{there}')
    return files


def _check_unread(folder: Path, split: str, names: list[str]) -> None:
    """InputError where what is a split by its name cannot be read: none is held out in its place."""
    named = re.compile(rf"({'|'.join(names)})({NAMED}|$)", re.IGNORECASE)
    unread = [file for file in sorted(folder.iterdir()) if named.match(file.name) and file.suffix not in NO_DATA]
    if unread:
        what = "a folder" if unread[0].is_dir() else "of no kind and name that is read"
        reads = f"a split is {split}.* of a kind in {', '.join(SUFFIXES)}"
        raise InputError(f'task.data = "{show_path(folder)}": {show_path(unread[0].name)} is {what}; {reads}')


def _in_order(folder: Path, split: str, files: list[Path]) -> list[Path]:
    """The numbered parts of one split. InputError where the files are no such parts: none is read by half."""
    numbers = {file: number for file in files if (number := _number(file)) is not None}
    if len(set(numbers.values())) < len(files) or len(set(map(kind, files))) > 1:
        raise _unclear(folder, split, files)
    first, last = min(numbers.values()), max(numbers.values())
    if last - first >= len(files):
        lacking = next(number for number in range(first, last) if number not in numbers.values())
        says = f"{split} has parts {first} to {last}, and part {lacking} is not there"
        raise InputError(f'task.data = "{show_path(folder)}": {says}')
    return sorted(files, key=numbers.__getitem__)


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
            raise InputError(f'task.data = "{show_path(folder)}": {says}')


def _unclear(folder: Path, split: str, files: Iterable[Path]) -> InputError:
    names = clip(", ".join(file.name for file in files), 200)
    which = f"which is the {split} split? One file, or numbered parts of one: {names}"
    return InputError(f'task.data = "{show_path(folder)}": {which}')


def _read_hub(source: str, revision: str | None, names: dict[str, list[str]]) -> Read:
    where = f"task.data = {show(source)}"
    try:
        import datasets
    except ImportError:
        raise InputError(f"{where}: is no local path, and Hub data needs `pip install datasets`") from None
    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, revision=revision)
    except Exception as error:  # datasets raises a dozen kinds for "not there", "no network", "no such config"
        reason = f"{type(error).__name__}: {clip(str(error).partition(chr(10))[0], 300)}"
        raise InputError(f"{where}: neither a local path nor a Hub data set that could be loaded: {reason}") from error
    found = {split: next((alias for alias in aliases if alias in loaded), None) for split, aliases in names.items()}
    needed = next(iter(names))
    if not found[needed]:
        raise InputError(f'{where}: has no split "{needed}". Choices: {clip(", ".join(loaded))}')
    splits = {
        split: placed(enumerate(loaded[alias].to_list(), 1), Source(name=f"{show_path(source)}, {alias}"))
        for split, alias in found.items()
        if alias
    }
    counted = loaded if names is ALIASES else found.values()
    return splits, ",".join(f"{alias}:{loaded[alias]._fingerprint}" for alias in counted if alias)


def _complete(splits: dict[str, list[Row]], fingerprint: str, label: str | None, text: str | None) -> Data:
    """Cut validation and test out of train where the source does not give them."""
    train = splits["train"]
    missing = [split for split in SPLITS[1:] if split not in splits] if "validation" not in splits else []
    if not missing:
        return _data(splits, fingerprint)
    if len(train) == 1 and (text or len(train[0]) == 1):  # one long text: cut by position
        splits = splits | _cut_text(train[0], text or next(iter(train[0])), missing)
        note = f"1/{HELD_OUT} of the text each, at its end"
    else:
        held = _held_out([None if label is None else find(row, label) for row in train], len(missing))
        splits = splits | {split: [train[i] for i in places] for split, places in zip(missing, held, strict=True)}
        out = {place for places in held for place in places}
        splits["train"] = [row for i, row in enumerate(train) if i not in out]
        fingerprint = hashlib.sha256(f"{fingerprint} {json.dumps(held)}".encode()).hexdigest()
        note = f"1/{HELD_OUT} each, at random (seed {CUT_SEED}){f', alike in {clip(label)}' if label else ''}"
    if not all(splits.get(split) for split in ("train", *missing)):
        raise _too_few(train, missing)
    return _data(splits, fingerprint, f"{' and '.join(missing)} cut out of train, {note}", tuple(missing))


def _too_few(rows: list[Row], missing: list[str]) -> InputError:
    splits, count = " and ".join(missing), "1 row is" if len(rows) == 1 else f"{len(rows)} rows are"
    way = f"a folder with train.* beside {' and '.join(f'{split}.*' for split in missing)} says which they are"
    return InputError(f"task.data: {source_of(rows)}: {count} too few to hold some out for {splits}; {way}")


def _data(splits: dict[str, list[Row]], fingerprint: str, note: str = "", held_out: tuple[str, ...] = ()) -> Data:
    whole = {split: splits.get(split, []) for split in SPLITS}
    return Data(splits=whole, fingerprint=fingerprint, note=note, held_out=held_out)


def _held_out(labels: list[Any], num_splits: int) -> list[list[int]]:
    """The rows of each split to cut out: shuffled, sorted by label, and dealt one in HELD_OUT; stratified so.

    One row of each label always stays. Where most labels stand once they count as one, unless train then lacks some
    that others would do for; where none stands twice they are no classes at all, as their task will say.
    """
    places = list(range(len(labels)))
    random.Random(CUT_SEED).shuffle(places)
    by_label: dict[str, list[int]] = {}
    for place in places:
        by_label.setdefault(str(labels[place]), []).append(place)
    if 2 * len(by_label) > len(places):
        held = _dealt([places], num_splits)
        stay = set(places).difference(*held)
        if len(by_label) == len(places) or {str(labels[place]) for place in stay} == by_label.keys():
            return held
    return _dealt(by_label.values(), num_splits)


def _dealt(groups: Iterable[list[int]], num_splits: int) -> list[list[int]]:
    dealt = [place for alike in groups for place in alike[1:]]
    return [sorted(dealt[offset::HELD_OUT]) for offset in range(num_splits)]


def _cut_text(row: Row, column: str, missing: list[str]) -> dict[str, list[Row]]:
    """Nothing where the column holds no text, as its task will say."""
    text = find(row, column)
    if not isinstance(text, str):
        return {}
    size = len(text) // HELD_OUT
    end = len(text) - size * len(missing)
    parts = {"train": [row | {column: text[:end]}]}
    for i, split in enumerate(missing):
        parts[split] = [row | {column: text[end + i * size : end + (i + 1) * size]}]
    return parts
