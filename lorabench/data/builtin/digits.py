"""Make the four built-in sets of digits by `python -m lorabench.data.builtin.digits`, from scikit-learn's.

1,797 real handwritten digits of 8 × 8 pixels, by 13 people: the test set of "Optical Recognition of Handwritten Digits"
(Alpaydin and Kaynak 1998, UCI Machine Learning Repository), as scikit-learn ships it. Only this script needs it.
"""

import argparse
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorabench.data.builtin.collect import HERE, jsonl_gz, write_fingerprints

SEED = 0
SIZES = {"train": 1197, "validation": 200, "test": 400}
WHITE = 16
"""The largest value of the original: the number of pixels of a field of 4 × 4 that are on. All sets have its 17
greys."""
OUTLINED = range(5)
"""The digits that are drawn as outlines; the others are what a model that learns the style never sees in it."""


class Digit(NamedTuple):
    """One line of the files."""

    image: list[list[int]]
    """Rows of 8 or 16 numbers from 0 (black) to 255."""
    label: int


def turned(image: list[list[int]]) -> list[list[int]]:
    """A quarter turn against the clock, and the stroke dark on a bright ground."""
    return (255 - np.rot90(np.array(image))).tolist()


def levels(image: list[list[int]]) -> np.ndarray:
    """The original's greys, 0 to 16, of rows of 0 to 255."""
    return np.rint(np.array(image) * (WHITE / 255)).astype(int)


def shades(greys: np.ndarray) -> list[list[int]]:
    """Rows of 0 to 255 of the original's greys."""
    return np.rint(greys * (255 / WHITE)).astype(int).tolist()


def enlarged(image: list[list[int]]) -> list[list[int]]:
    """Twice as high and wide, bilinear (pixels are areas, the edge goes on), rounded to the 17 greys."""
    greys = levels(image)
    for _ in range(2):  # first the rows, then, turned, the columns: 3 parts of the nearer row, 1 of the next
        padded = np.pad(greys, ((1, 1), (0, 0)), mode="edge")
        halves = [3 * greys + padded[:-2], 3 * greys + padded[2:]]
        greys = np.stack(halves, 1).reshape(2 * len(greys), -1).T
    return shades((greys + 8) // 16)


def outlined(image: list[list[int]]) -> list[list[int]]:
    """The stroke's own outermost pixels as they are, what lies within them half as bright, and all around black.

    The stroke is what is above 6 of 16 greys, fully from 10 on; within is where the four neighbours are stroke too.
    """
    stroke = np.clip(levels(image) - 6, 0, 4)
    padded = np.pad(stroke, 1)
    above, below, left, right = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    within = np.minimum.reduce([stroke, above, below, left, right])
    return shades(4 * stroke - 2 * within)


def make() -> dict[str, dict[str, list[Digit]]]:
    """The four sets by name and split: the same digits in the same order, of OUTLINED only those."""
    from sklearn.datasets import load_digits

    found = load_digits()
    digits = [Digit(shades(image), int(label)) for image, label in zip(found.images, found.target, strict=True)]
    random.Random(SEED).shuffle(digits)
    upright, begin = {}, 0
    for split, size in SIZES.items():
        upright[split] = digits[begin : begin + size]
        begin += size
    large = {split: [Digit(enlarged(each.image), each.label) for each in part] for split, part in upright.items()}
    return {
        "digits": upright,
        "digits-turned": {
            split: [Digit(turned(each.image), each.label) for each in part] for split, part in upright.items()
        },
        "digits-16": large,
        "digits-outlined": {
            split: [Digit(outlined(each.image), each.label) for each in part if each.label in OUTLINED]
            for split, part in large.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where the four folders go")
    out = parser.parse_args().out
    for name, parts in make().items():
        (out / name).mkdir(parents=True, exist_ok=True)
        for split, digits in parts.items():
            data = jsonl_gz(digits)
            (out / name / f"{split}.jsonl.gz").write_bytes(data)
            print(f"{name}/{split}: {len(digits)} digits, {len(data)} bytes")
    for path, digest in write_fingerprints(out).items():
        print(f"{digest}  {path}")


if __name__ == "__main__":
    main()
