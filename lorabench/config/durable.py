"""Files that last through a crash: written whole or not at all, and on disk with their names before the next step."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_json(file: Path, table: Any) -> None:
    """Write a file whole or not at all, and make it last through a crash."""
    write_bytes(file, (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(file: Path, content: bytes) -> None:
    make_folder(file.parent)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(file.parent)


def cache_folder() -> Path:
    """Where lorabench keeps what it knows of this machine: $LORABENCH_CACHE, else below the user's cache folder."""
    own, user = os.environ.get("LORABENCH_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(user or Path.home() / ".cache") / "lorabench"


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each of which lasts through a crash."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of folders, some network file systems know no such thing
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have all files below a folder on disk, and their names in it."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def remove(path: Path) -> None:
    """Take away what is there, be it a file, a link (never what it leads to) or a folder; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
