"""SHA-256 of files, and whether they are still what they were."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from lorabench.config.decode import InputError
from lorabench.config.json_file import Unreadable, below

READ_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json")
"""Of the files of a folder of updates that readers look into."""


def file_digests(folder: Path, below: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder`, by path relative to `below`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(below)): file_digest(file) for file in files}


def file_digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_whole(folder: Path, digests: dict[str, str]) -> None:
    """As `check_listing` and `check_files` do: where a run's files are not those of its record."""
    check_listing(folder, digests)
    check_files(folder, digests)


def check_listing(folder: Path, names: Collection[str]) -> None:
    """InputError names the first link, or other file that is read, which lies beside these below a run's folder.

    What is read of a folder is what lies there. No file is opened, and no link followed.
    """
    for part in sorted({name.rpartition("/")[0] for name in names} - {""}):
        top = below(folder, part)
        for path in sorted(top.iterdir()) if top.is_dir() else ():
            if path.is_symlink():
                raise InputError(f"{path}: is a link")
            if path.suffix in READ_SUFFIXES and str(path.relative_to(folder)) not in names and path.is_file():
                raise InputError(f"{path}: is no file of the run's record")


def check_files(folder: Path, digests: dict[str, str]) -> None:
    """InputError names the first of these files below a folder that is gone, or is not what it was.

    Unreadable where that cannot be told.
    """
    for path, digest in digests.items():
        file = below(folder, path)
        try:
            if not file.is_file():
                raise InputError(f"{file}: {'is no file' if file.exists() else 'is gone'}")
            found = file_digest(file)
        except OSError as error:
            raise Unreadable(f"{file}: cannot be read: {error.strerror}") from None
        if found != digest:
            raise InputError(f"{file}: has changed since it was written")
