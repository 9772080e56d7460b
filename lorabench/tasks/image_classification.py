"""Classification of an image by a linear head on the model: ViT, DeiT, Swin, ConvNeXt, DINOv2 and their kin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from lorabench.data.columns import called, columns
from lorabench.data.images import are_images, images, pixels, varied
from lorabench.data.rows_file import Row
from lorabench.spec.task import Example, Sets, Task
from lorabench.tasks._classes import Classes
from lorabench.tasks._labelled import LABELS

CHARACTERS = 100
"""What making an image ready counts for, beside characters of text to tokenize."""


@dataclass(frozen=True, kw_only=True)
class ImageClassification(Classes):
    """Labels are compared as text, of which 0, "0" and 0.0 are one; classes are the sorted ones of the training split.

    Images are made ready by the model's own image processor, once, before training. A head of the model's own files is
    kept where it has as many outputs as there are classes; else it starts at random, the same in every run of one seed.
    """

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    sequences: ClassVar[tuple[str, ...]] = ("pixel_values",)
    unit: ClassVar[Literal["tokens", "images"]] = "images"

    image: str = "image"
    """Column of the image: an array of numbers from 0 to 255, or a file's path or bytes."""
    retain: str | dict[str, Any] | None = None
    """A set of images of the same classes on which forgetting is measured, or several by name."""
    flip: Annotated[float, Ge(0), Le(1)] = 0.0
    """Augmentation, of training alone and drawn by the seed: how often an image is mirrored, left to right."""
    shift: Annotated[float, Ge(0), Le(1)] = 0.0
    """Augmentation: the largest shift to each side, as a share of it; what comes in is the image's edge."""
    rotate: Annotated[float, Ge(0), Le(180)] = 0.0
    """Augmentation: the largest turn to each side, in degrees."""
    crop: Annotated[float, Ge(0), Le(0.95)] = 0.0
    """Augmentation: the largest part of each side that is cut away at random, what is left being stretched to size."""
    noise: Annotated[float, Ge(0), Le(1)] = 0.0
    """Augmentation: deviation of normal noise on each value, as a share of the range from black to white."""

    @classmethod
    def guess(cls, rows: list[Row], model: str) -> dict[str, Any]:
        found = columns(rows, are_images)
        image = called(found, "image img picture pixels photo") or next(iter(found), None)
        label = called([name for name in columns(rows, cls.holds) if name != image], LABELS)
        return {} if image is None or label is None else {"image": image, "label": label}

    def retaining(self, data: str) -> Task:
        return dataclasses.replace(self, data=data, data_revision=None, tests=Sets(), retain=None)

    def reads_with(self, model: str, revision: str | None) -> Any:
        from lorabench.models.base_model import load_image_processor

        return load_image_processor(model, revision)

    def lengths(self, example: Example) -> tuple[int, ...]:
        return tuple(example["pixel_values"].shape)

    def size(self, row: Row) -> int:
        return CHARACTERS

    def check_content(self, rows: list[Row]) -> None:
        images(rows, "task.image", self.image)

    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> Iterator[Example]:
        found = pixels(rows, "task.image", self.image, tokenizer)
        for each, target in zip(found, self.targets(rows, options) if rows else [], strict=True):
            yield {"pixel_values": each, "labels": target}

    def varied(self, example: Example, seed: Sequence[int]) -> Example:
        if not (self.flip or self.shift or self.rotate or self.crop or self.noise):
            return example
        amounts = {"flip": self.flip, "shift": self.shift, "rotate": self.rotate, "crop": self.crop}
        return example | {"pixel_values": varied(example["pixel_values"], seed, **amounts, noise=self.noise)}


EXAMPLE = ImageClassification(data="builtin:digits-turned", max_train=8, max_eval=4)
