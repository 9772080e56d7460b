"""A folder of images by class, `SPLIT/CLASS/NAME.png`, or `CLASS/NAME.png` alone -> rows of a path and a class.
Of a folder of images alone, `NAME.png`, rows have a path and no class.

The layout of torchvision's ImageFolder, and of `datasets`' `imagefolder`. In a class's folder all must be images but
what begins with a dot; files beside the folders are passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.data.rows_file import Placed, Row, Source

VISION = '`pip install "lorabench[vision]"`'
IMAGE, LABEL = "image", "label"
"""The columns of its rows."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Of files that are images."""


def is_image(name: str) -> bool:
    """Whether a file is an image, by what it is called."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def has_images(folder: Path) -> bool:
    """Whether a folder is one of images, by class or alone."""
    return has_classes(folder) or has_images_alone(folder)


def has_classes(folder: Path) -> bool:
    """Whether a folder below this one, or below one of those, holds an image."""
    below = [*_folders(folder), *(inner for outer in _folders(folder) for inner in _folders(outer))]
    return any(is_image(entry.name) for inner in below for entry in os.scandir(inner))


def has_images_alone(folder: Path) -> bool:
    """Whether images lie in a folder itself, and no folders."""
    return not _folders(folder) and any(is_image(entry.name) for entry in os.scandir(folder))


def image_splits(folder: Path, names: dict[str, list[str]]) -> dict[str, dict[str, list[Path]]]:
    """The image files by split and class, each in the order of their names. `names`: what a split may be called.

    Where no folder is called as a split is, its folders are the classes of the first of `names`. Images in no folder
    are of the class "". InputError where the one split that is asked for is no folder.
    """
    if has_images_alone(folder) and len(names) > 1:
        files = [Path(entry.path) for entry in os.scandir(folder) if not entry.name.startswith(".")]
        return {next(iter(names)): {"": sorted(file for file in files if is_image(file.name))}}
    found = {entry.name: entry for entry in _folders(folder)}
    splits: dict[str, dict[str, list[Path]]] = {}
    for split, called in names.items():
        own = [found[name] for name in called if name in found]
        if len(own) > 1:
            which = ", ".join(each.name for each in own)
            raise InputError(f'task.data = "{show_path(folder)}": which is the {split} split? One of {which}')
        if own:
            splits[split] = _classes(own[0])
    needed = next(iter(names))
    if not splits and len(names) == 1:
        raise InputError(f'task.data = "{show_path(folder)}@{needed}": has no folder {needed}')
    if not splits:
        return {needed: _classes(folder)}
    if needed not in splits:
        raise InputError(f'task.data = "{show_path(folder)}": has no folder {needed} beside {", ".join(splits)}')
    return splits


def image_rows(classes: dict[str, list[Path]]) -> Iterator[Row]:
    """A row a file, which is its place."""
    for name, files in classes.items():
        for file in files:
            row = Placed({IMAGE: str(file)} | ({LABEL: name} if name else {}))
            row.source, row.number = Source(name=show_path(file), unit=""), 1
            yield row


def named_images(rows: Iterable[Row], folder: Path) -> Iterator[Path]:
    """The image files that rows of a file name, as seen from here or from its folder: each once, in their order."""
    seen = set()
    for value in _texts(rows):
        if is_image(value[-8:]) and value not in seen:
            seen.add(value)
            file = Path(value) if os.path.exists(value) else folder / value
            if os.path.isfile(file):
                yield file


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _texts(value.values())


def _classes(folder: Path) -> dict[str, list[Path]]:
    """InputError for a class without images, and for a file that is none."""
    found: dict[str, list[Path]] = {}
    for inner in _folders(folder):
        files = [inner / name for name in sorted(os.listdir(inner)) if not name.startswith(".")]
        other = next((file for file in files if not is_image(file.name)), None)
        if other is not None:
            what = "a folder" if other.is_dir() else f"no image by its name ({', '.join(SUFFIXES)})"
            raise InputError(f'task.data = "{show_path(folder)}": {show_path(other)} is {what}')
        if not files:
            raise InputError(f'task.data = "{show_path(folder)}": the class {show_path(inner.name)} has no images')
        found[inner.name] = files
    return found


def _folders(folder: Path) -> list[Path]:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    return [Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
