"""Images: what rows hold -> pixels, decoded once, and made ready by a model's own image processor.

A value is an array of numbers from 0 to 255, (height, width) or (height, width, 1 or 3); or a file in some format that
Pillow reads, by its path, its bytes, or an object with either, as `datasets` has it (`{"bytes": ..., "path": ...}`).
An array alone needs no Pillow where it is of the model's size already.

Shapes: c channels, h height, w width.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show, show_path
from lorabench.data.image_folder import VISION, is_image
from lorabench.data.rows_file import Placed, Row, place
from lorabench.data.values import check_column, find

CHUNK = 64
"""Images that are decoded at their full size at a time."""
HELD_BYTES = 2**30
"""Of pixels of one split that are held in memory; what is more lies in a file without a name, and is read as needed."""
DEEP = ("I;16", "I;16B", "I;16L", "I", "F")
"""Modes of Pillow with more than 8 bits a channel, which it would cut off."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """An image of the model's size: `values` (c, h, w) as bytes, of which the model sees `scale` · value + `shift`; or
    as float32 as the model sees them, and then neither."""

    values: NDArray[Any]
    scale: NDArray[np.float32] | None = None
    shift: NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def seen(self) -> NDArray[np.float32]:
        """(c, h, w) in float32, what the model is given."""
        found = np.asarray(self.values, np.float32)
        return found if self.scale is None or self.shift is None else found * self.scale + self.shift


def images(rows: Sequence[Row], key: str, column: str) -> list[Any]:
    """What a column holds of each row, a path as seen from the file that names it too.

    InputError where it is missing, or can be no image.
    """
    check_column(rows, key, column)
    found = []
    for number, row in enumerate(rows, 1):
        value = find(row, column)
        if value is None:
            raise InputError(f"{key} = {show(column)}: {place(row, number)} has no value in {show(column)}")
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and isinstance(row, Placed) and not os.path.exists(value):
            value = os.path.join(row.source.folder, value)
        if not isinstance(value, (str, bytes, list, np.ndarray)):
            what = "must be an array of numbers, a file's path or its bytes"
            raise InputError(f"{key} = {show(column)}: {place(row, number)}: {what}, not {type(value).__name__}")
        found.append(value)
    return found


def decoded(value: Any) -> NDArray[np.uint8]:
    """(h, w, 3), black to white from 0 to 255. ValueError with what is wrong of it."""
    if isinstance(value, (str, bytes)):
        return _from_file(value)
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError("its rows are not of one length") from None
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or not array.size:
        raise ValueError(f"an array of shape {array.shape} is no image: (height, width) or (height, width, 1 or 3)")
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
        raise ValueError("its numbers must be from 0 to 255")
    return np.broadcast_to(np.rint(array).astype(np.uint8), (*array.shape[:2], 3))


def _from_file(value: str | bytes) -> NDArray[np.uint8]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError(f"task.data: to read image files needs {VISION}") from None
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            if image.mode in DEEP:
                raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}): save it with 8")
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's own kinds are OSErrors
        reason = "no image that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else clip(error)
        raise ValueError(f"cannot be read: {reason}") from None


def pixels(rows: Sequence[Row], key: str, column: str, processor: Any) -> Iterator[Pixels]:
    """Of each row, by the model's image processor; CHUNK of them are there at full size at a time.

    InputError with the file's name, or the row's place, of the first that cannot be read, or that is of another shape
    than those before.
    """
    store, shape = _Store(), None
    for begin in range(0, len(rows), CHUNK):
        some = rows[begin : begin + CHUNK]
        full = [*decode_each(some, key, column, begin)]
        ready = processed(full, processor)
        for number, (row, each) in enumerate(zip(some, ready, strict=True), begin + 1):
            shape = shape or each.shape
            if each.shape != shape:
                says = f"the model's image processor makes it {each.shape}, and others {shape}"
                raise InputError(f"{key} = {show(column)}: {place(row, number)}: {says}; they must be of one size")
        held = store.put(np.stack([each.values for each in ready]))
        yield from (
            Pixels(values=values, scale=each.scale, shift=each.shift) for values, each in zip(held, ready, strict=True)
        )


def decode_each(rows: Sequence[Row], key: str, column: str, begin: int = 0) -> Iterator[NDArray[np.uint8]]:
    """(h, w, 3) of each row, so many being before them. InputError with the place of the first that cannot be read."""
    for number, (row, value) in enumerate(zip(rows, images(rows, key, column), strict=True), begin + 1):
        try:
            yield decoded(value)
        except ValueError as error:
            raise InputError(f"{key} = {show(column)}: {_named(value, row, number)}: {error}") from None


def _named(value: Any, row: Row, number: int) -> str:
    """Where an image stands, and its file where that is another."""
    where = place(row, number)
    return f"{where}: {show_path(value)}" if isinstance(value, str) and show_path(value) not in where else where


def processed(full: Sequence[NDArray[np.uint8]], processor: Any) -> list[Pixels]:
    """Images (h, w, 3) as the processor makes them: cut and resized as bytes, where it can leave them so."""
    scale, shift = _affine(processor)
    if scale is not None:
        if target_sizes(processor) == {each.shape[:2] for each in full}:
            found: Iterable[NDArray[Any]] = [each.transpose(2, 0, 1) for each in full]
        else:
            made = processor([*full], do_rescale=False, do_normalize=False, input_data_format="channels_last")
            found = [np.asarray(each) for each in made["pixel_values"]]
        if all(each.dtype == np.uint8 for each in found):
            return [Pixels(values=each, scale=scale, shift=shift) for each in found]
    made = processor([*full], input_data_format="channels_last")
    return [Pixels(values=np.asarray(each, np.float32)) for each in made["pixel_values"]]


def _affine(processor: Any) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Scale and shift (3, 1, 1) that a processor ends with, its mean and deviation; None of one that does otherwise."""
    factor = getattr(processor, "rescale_factor", None) if getattr(processor, "do_rescale", False) else None
    if factor is None or getattr(processor, "offset", None):  # ConvNeXt's and EfficientNet's own way
        return None, None
    if getattr(processor, "do_normalize", False):
        mean, std = (np.ravel(getattr(processor, f"image_{name}")).astype(float) for name in ("mean", "std"))
    else:
        mean, std = np.zeros(3), np.ones(3)
    if not {mean.size, std.size} <= {1, 3}:
        return None, None
    scale, shift = factor / (std * np.ones(3)), -mean / std * np.ones(3)
    return scale.astype(np.float32)[:, None, None], shift.astype(np.float32)[:, None, None]


def target_sizes(processor: Any) -> set[tuple[int, int]]:
    """The one (height, width) that a processor only resizes to, and leaves as it is; empty of others."""
    size = getattr(processor, "size", None) or {}
    plain = getattr(processor, "do_resize", False) and not getattr(processor, "do_center_crop", False)
    height, width = (getattr(size, key, None) or dict(size).get(key) for key in ("height", "width"))
    return {(int(height), int(width))} if plain and height and width else set()


class _Store:
    """Keeps arrays: in memory as far as HELD_BYTES go, beyond that in a file."""

    def __init__(self) -> None:
        self.size = 0

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        self.size += array.nbytes
        if self.size <= HELD_BYTES:
            return array
        with tempfile.TemporaryFile() as file:
            file.truncate(array.nbytes)
            held = np.memmap(file, array.dtype, "r+", shape=array.shape)
        held[...] = array
        held.flush()
        return held


def are_images(values: Sequence[Any]) -> bool:
    """Whether the values of a column are images, as far as it shows without decoding any."""
    return all(map(_may_be_image, values))


def _may_be_image(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or is_image(str(value.get("path")))
    if isinstance(value, str):
        return is_image(value)
    is_table = isinstance(value, list) and len(value) > 1 and all(isinstance(row, list) for row in value)
    return isinstance(value, bytes) or (is_table and len({*map(len, value)}) == 1 < len(value[0]))


def varied(
    image: Pixels, seed: Sequence[int], *, flip: float, shift: float, rotate: float, crop: float, noise: float
) -> Pixels:
    """The image mirrored, cut, turned and shifted in one go, then with noise: all drawn by the numbers of `seed` alone.

    What is read between pixels is interpolated linearly, what is read outside of the image is its edge.
    """
    draw = np.random.default_rng([*seed])
    mirrored, angle = draw.random() < flip, np.deg2rad(draw.uniform(-rotate, rotate))
    kept, moved = 1 - crop * draw.random(2), draw.uniform(-1, 1, (2, 2))
    values = np.asarray(image.values, np.float32)
    size = np.array(values.shape[1:], float)
    if mirrored:
        values = values[:, :, ::-1]
    if shift or rotate or crop:
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        center = (size - 1) / 2
        offset = center + (1 - kept) / 2 * size * moved[0] + shift * size * moved[1]
        matrix = turn * kept
        values = _read_at(values, matrix, offset - matrix @ center)
    if noise:
        width = 255.0 if image.scale is not None else float(np.ptp(image.values))
        values = values + draw.normal(0.0, noise * width, values.shape).astype(np.float32)
    if image.scale is None:
        return Pixels(values=values)
    return Pixels(values=values.clip(0, 255), scale=image.scale, shift=image.shift)


def _read_at(values: NDArray[np.float32], matrix: NDArray[Any], offset: NDArray[Any]) -> NDArray[np.float32]:
    """Of (c, h, w), at each pixel (y, x) the value at matrix (y, x) + offset."""
    height, width = values.shape[1:]
    grid = np.mgrid[:height, :width].reshape(2, -1)
    y, x = matrix @ grid + offset[:, None]
    y, x = y.clip(0, height - 1), x.clip(0, width - 1)
    top, left = np.minimum(y.astype(int), max(height - 2, 0)), np.minimum(x.astype(int), max(width - 2, 0))
    below, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    dy, dx = (y - top).astype(np.float32), (x - left).astype(np.float32)
    upper = values[:, top, left] * (1 - dx) + values[:, top, right] * dx
    lower = values[:, below, left] * (1 - dx) + values[:, below, right] * dx
    return (upper * (1 - dy) + lower * dy).reshape(values.shape)
