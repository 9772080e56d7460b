"""Make `builtin:digits` and `builtin:digits-turned` by `python -m lorabench.data.builtin.digits`, from scikit-learn's.

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
"""The largest value of the original: the number of pixels of a field of 4 × 4 that are on."""


class Digit(NamedTuple):
    """One line of the files."""

    image: list[list[int]]
    """Rows of 8 numbers from 0 (black) to 255, the stroke bright."""
    label: int


def turned(image: list[list[int]]) -> list[list[int]]:
    """A quarter turn against the clock, and the stroke dark on a bright ground."""
    return (255 - np.rot90(np.array(image))).tolist()


def make() -> dict[str, dict[str, list[Digit]]]:
    """Both sets by name and split: the same digits in the same order, upright and turned."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images * (255 / WHITE)).astype(int)
    digits = [Digit(image.tolist(), int(label)) for image, label in zip(images, found.target, strict=True)]
    random.Random(SEED).shuffle(digits)
    upright, begin = {}, 0
    for split, size in SIZES.items():
        upright[split] = digits[begin : begin + size]
        begin += size
    return {
        "digits": upright,
        "digits-turned": {
            split: [Digit(turned(each.image), each.label) for each in part] for split, part in upright.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where the two folders go")
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
