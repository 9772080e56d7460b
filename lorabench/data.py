"""Data sets: `builtin:NAME`, a local file or folder, or a Hub data set -> rows by split, with a fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.decode import InputError

BUILTIN = Path(__file__).parent / "builtin"
SPLITS = ("train", "validation", "test")
ALIASES = {
    "train": ["train"],
    "validation": ["validation", "valid", "val", "dev", "validation_matched"],
    "test": ["test"],
}
SUFFIXES = [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"]
HELD_OUT = 20
"""Where a source has no validation (or test) split, every 20th row of `train` becomes one (5% each)."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows by split. `test` is empty where the source has none with labels."""

    splits: dict[str, list[dict[str, Any]]]
    fingerprint: str
    """SHA-256 of the files' bytes, or the Hub's own fingerprint."""
    note: str = ""
    """How the splits were made, where the source did not give them."""


def read_data(source: str, revision: str | None = None, columns: str | None = None) -> Data:
    """The data set `source`. InputError with the choices if there is no such thing.

    `columns` names the columns of files without a header line, separated by commas.
    """
    if source.startswith("builtin:"):
        return _read_local(_builtin(source), columns)
    if Path(source).exists():
        return _read_local(Path(source), columns)
    if source.startswith((".", "/", "~")) or Path(source).suffix in SUFFIXES:
        raise InputError(f'task.data = "{source}": no such file or folder')
    return _read_hub(source, revision)


def _builtin(source: str) -> Path:
    folder = BUILTIN / source.removeprefix("builtin:")
    if not (folder / "train.jsonl.gz").exists():
        choices = sorted(f"builtin:{path.parent.name}" for path in BUILTIN.glob("*/train.jsonl.gz"))
        raise InputError(f'task.data = "{source}": no such built-in data set. Choices: {", ".join(choices)}')
    return folder


def _read_local(path: Path, columns: str | None) -> Data:
    files = _split_files(path) if path.is_dir() else {"train": path}
    digest = hashlib.sha256()
    splits = {}
    for split, file in files.items():
        content = file.read_bytes()
        digest.update(f"{split} {len(content)} ".encode() + content)
        splits[split] = _read_file(file, columns)
        if not splits[split]:
            raise InputError(f'task.data = "{path}": {file.name} holds no rows')
    return _complete(splits, digest.hexdigest())


def _split_files(folder: Path) -> dict[str, Path]:
    """`train.*`, `validation.*` (or valid, val, dev) and `test.*` of a folder."""
    files = {}
    for split, names in ALIASES.items():
        for name in names:
            found = [file for file in sorted(folder.glob(f"{name}.*")) if _suffix(file) in SUFFIXES]
            if found:
                files[split] = found[0]
                break
    if "train" not in files:
        raise InputError(f'task.data = "{folder}": needs a file train.* of a kind in {", ".join(SUFFIXES)}')
    return files


def _suffix(file: Path) -> str:
    return file.with_suffix("").suffix if file.suffix in (".gz", ".xz") else file.suffix


def _read_file(file: Path, columns: str | None) -> list[dict[str, Any]]:
    import pandas as pd

    header: dict[str, Any] = {"header": None, "names": columns.split(",")} if columns else {}
    try:
        match _suffix(file):
            case ".txt":
                if file.suffix == ".txt":
                    return [{"text": file.read_text("utf-8")}]
                frame = pd.DataFrame({"text": [pd.io.common.get_handle(file, "rt", compression="infer").handle.read()]})
            case ".jsonl":
                frame = pd.read_json(file, lines=True, dtype=False, convert_dates=False)
            case ".json":
                frame = pd.read_json(file, dtype=False, convert_dates=False)
            case ".csv":
                frame = pd.read_csv(file, keep_default_na=False, **header)
            case ".tsv":
                # No quoting: a quotation mark in a sentence is text (GLUE's own files are written so).
                frame = pd.read_csv(file, sep="\t", quoting=3, keep_default_na=False, **header)
            case ".parquet":
                frame = pd.read_parquet(file)
            case suffix:
                raise InputError(f'task.data = "{file}": unknown kind "{suffix}". Choices: {", ".join(SUFFIXES)}')
    except (ValueError, UnicodeDecodeError, OSError) as error:
        raise InputError(f'task.data = "{file}": cannot be read: {error}') from None
    return frame.to_dict("records")


def _read_hub(source: str, revision: str | None) -> Data:
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
        raise InputError(f"{message}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    splits = {
        split: loaded[alias].to_list()
        for split, aliases in ALIASES.items()
        for alias in [next((a for a in aliases if a in loaded), None)]
        if alias
    }
    if "train" not in splits:
        raise InputError(f'task.data = "{source}": has no split "train" but {", ".join(loaded)}')
    fingerprint = ",".join(f"{split}:{loaded[split]._fingerprint}" for split in loaded)
    return _complete(splits, fingerprint)


def _complete(splits: dict[str, list[dict[str, Any]]], fingerprint: str) -> Data:
    """Cut validation and test out of train where the source does not give them."""
    made = []
    train = splits["train"]
    missing = [split for split in SPLITS[1:] if split not in splits]
    if len(train) == 1 and "validation" in missing:  # one long text: cut by position
        splits, made = splits | _cut_text(train[0], missing), missing
    elif "validation" in missing:
        for offset, split in enumerate(missing):
            splits[split] = train[offset::HELD_OUT]
        splits["train"] = [row for i, row in enumerate(train) if i % HELD_OUT >= len(missing)]
        made = missing
    if not (splits["train"] and splits.get("validation")):
        raise InputError(f"task.data: {len(train)} rows are too few to hold some out for validation")
    note = f"{' and '.join(made)} cut out of train, 1/{HELD_OUT} each" if made else ""
    return Data(splits={split: splits.get(split, []) for split in SPLITS}, fingerprint=fingerprint, note=note)


def _cut_text(row: dict[str, Any], missing: list[str]) -> dict[str, list[dict[str, Any]]]:
    key = max((key for key in row if isinstance(row[key], str)), key=lambda key: len(row[key]), default=None)
    if key is None:
        return {}
    text, size = row[key], len(row[key]) // HELD_OUT
    end = len(text) - size * len(missing)
    parts = {"train": [{key: text[:end]}]}
    for i, split in enumerate(missing):
        parts[split] = [{key: text[end + i * size : end + (i + 1) * size]}]
    return parts
