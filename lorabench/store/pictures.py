"""`pictures.png`: what a run drew at the end, below what the untouched base draws of the same: one sheet.

A row of the base's pictures and one of the tuned model's, each as wide as there are pictures; what each is of stands in
the file's own text, as JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorabench.config.decode import InputError
from lorabench.config.durable import remove, write_bytes
from lorabench.config.quote import show_path

KEY = "lorabench"
MOST_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, eq=False)
class Sheet:
    """n pictures of (h, w, 3), from 0 to 255."""

    prompts: tuple[str, ...]
    """Of each."""
    unrelated: tuple[str, ...]
    """Those of which nothing was trained."""
    base: NDArray[np.uint8]
    """(n, h, w, 3) by the untouched base."""
    tuned: NDArray[np.uint8]
    """(n, h, w, 3) by the tuned model, from the same noise."""


def write_sheet(file: Path, sheet: Sheet) -> str:
    """Write it whole and to last; the file's SHA-256."""
    from PIL import Image, PngImagePlugin

    rows = [np.concatenate([*each], axis=1) for each in (sheet.base, sheet.tuned)]
    about = PngImagePlugin.PngInfo()
    about.add_itxt(KEY, json.dumps({"prompts": sheet.prompts, "unrelated": sheet.unrelated}))
    held = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(held, "PNG", pnginfo=about)
    if file.is_dir():
        remove(file)
    write_bytes(file, held.getvalue())
    return hashlib.sha256(held.getvalue()).hexdigest()


def read_sheet(file: Path) -> Sheet:
    """InputError where it is not what is written here."""
    try:
        from PIL import Image
    except ImportError:
        from lorabench.data.image_folder import VISION

        raise InputError(f"{show_path(file)}: to read pictures needs {VISION}") from None
    try:
        with Image.open(file) as image:
            about: dict[str, Any] = json.loads(getattr(image, "text", {})[KEY])
            values = np.asarray(image.convert("RGB"))
        prompts, unrelated = tuple(map(str, about["prompts"])), tuple(map(str, about["unrelated"]))
        height, width = values.shape[0] // 2, values.shape[1] // len(prompts)
        base, tuned = (
            values[row * height : (row + 1) * height].reshape(height, len(prompts), width, 3).swapaxes(0, 1)
            for row in (0, 1)
        )
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, Image.DecompressionBombError) as error:
        raise InputError(f"{show_path(file)}: holds no pictures of a run: {type(error).__name__}") from None
    return Sheet(prompts=prompts, unrelated=unrelated, base=base, tuned=tuned)
