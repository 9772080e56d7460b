"""Diffusion models: a denoiser learns to tell the noise that was put on images, or the flow, as its scheduler says.

The loss is the mean square error over an image's (or latent's) values, the timesteps all alike, as in diffusers' own
training examples; of flow matching it is that of the velocity, unweighted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt
from numpy.typing import NDArray

from lorabench.config.decode import InputError
from lorabench.config.quote import show
from lorabench.data.columns import called, columns
from lorabench.data.images import CHUNK, Pixels, are_images, images
from lorabench.data.noise import Noising, Times
from lorabench.data.rows_file import Row, place
from lorabench.data.values import check_column, find
from lorabench.models.denoisers import AUTO_CLASS, TIMESTEP
from lorabench.spec.pictures import Pictures
from lorabench.spec.task import Example, Sets, Task
from lorabench.tasks._labelled import LABELS
from lorabench.tasks.image_classification import CHARACTERS

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.models.latents import Encoder
    from lorabench.spec.run_spec import RunSpec

PRIOR = "prior"
"""The role of the images that keep a subject's class what it is."""
WEIGHT, COUNTED = "weight", "counted"
EVALUATED = 1_000_003
"""With the example's and the timestep's place, what the noise of an evaluation is drawn by: the same in every run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Noisy(Pixels):
    """A noisy latent, and what it was made of."""

    clean: NDArray[np.float32]
    """(c, h, w)."""
    spread: NDArray[np.float32] | None = None
    """The deviation of the latent, of an autoencoder that gives one: each draw is from about the mean `clean`."""


@dataclass(frozen=True, kw_only=True)
class Denoising(Task):
    """Any pipeline of diffusers with a `unet` or `transformer`: Stable Diffusion 1 and 2, SDXL, SD3, Flux, and
    `UNet2DModel` by itself, by class or without any condition. The denoiser alone is trained.

    Images are scaled and cut to the denoiser's size, and with the texts made latents and embeddings, once, before
    training. At each step every image gets noise anew, drawn by the run's seed.
    """

    auto_class: ClassVar[str] = AUTO_CLASS
    sequences: ClassVar[tuple[str, ...]] = ("pixel_values",)
    unit: ClassVar[Literal["tokens", "images"]] = "images"
    loss_unit: ClassVar[Literal["nats", ""]] = ""

    data: str = "builtin:digits-outlined"
    image: str = "image"
    """Column of the image: an array of numbers from 0 to 255, or a file's path or bytes."""
    condition: str | None = None
    """Column of what an image shows, which the denoiser is told: a text, or a class's number (None: no column)."""
    prompt: str = "{}"
    """What a text is put into, in the place of {}: `"a photo of {}"`; without {} it is the same for all images, as
    DreamBooth has it: `"a photo of sks dog"`."""
    resolution: Annotated[int, Ge(8)] | None = None
    """Pixels of each side (None: what the denoiser is made for)."""
    times: Times = "uniform"
    """How timesteps are drawn: all alike, or `logit-normal`, more of the middle, as Esser et al. 2024 train SD3."""
    eval_times: Annotated[int, Ge(1)] = 8
    """Timesteps at which each held-out image is evaluated, evenly over all, with noise that is the same in all runs."""
    prior: str | None = None
    """Images of the subject's class, one beside each of the subject's (prior preservation; Ruiz et al. 2022)."""
    prior_prompt: str | None = None
    """The prompt of these (None: their own, by `condition` and `prompt`)."""
    prior_weight: Annotated[float, Gt(0)] = 1.0
    retain: str | dict[str, Any] | None = None
    """Images on which forgetting is measured, by the loss before and after; or several sets by name."""
    pictures: Pictures | None = None
    """What is drawn after training (None: nothing)."""

    @classmethod
    def guess(cls, rows: list[Row], model: str) -> dict[str, Any]:
        found = columns(rows, are_images)
        image = called(found, "image img picture pixels photo") or next(iter(found), None)
        if image is None:
            return {}
        said = called([name for name in rows[0] if name != image], f"text caption prompt {LABELS}")
        return {"image": image} | ({"condition": said} if said else {})

    def problems(self, spec: RunSpec) -> Iterator[str]:
        if self.prior_prompt is not None and self.prior is None:
            yield f"task.prior_prompt = {show(self.prior_prompt)}: is of use with task.prior alone"

    @property
    def beside(self) -> dict[str, Task]:
        if self.prior is None:
            return {}
        own: dict[str, Any] = {} if self.prior_prompt is None else {"prompt": self.prior_prompt, "condition": None}
        return {PRIOR: dataclasses.replace(self._plain(self.prior), **own)}

    def _plain(self, data: str) -> Denoising:
        """What reads other images in the same way."""
        return dataclasses.replace(
            self, data=data, data_revision=None, tests=Sets(), retain=None, prior=None, prior_prompt=None, pictures=None
        )

    def retaining(self, data: str) -> Task:
        return self._plain(data)

    def sources(self) -> dict[str, str]:
        return super().sources() | {role: other.data for role, other in self.beside.items()}

    def reads_with(self, model: str, revision: str | None) -> Encoder:
        from lorabench.models.latents import Encoder

        return Encoder.of(model, revision, self.resolution)

    def checks_with(self, model: str, revision: str | None) -> Encoder:
        encoder = dataclasses.replace(self.reads_with(model, revision), is_rehearsal=True)
        if self.pictures is not None:
            self._check_pictures(self.pictures, encoder)
        return encoder

    def _check_pictures(self, pictures: Pictures, encoder: Encoder) -> None:
        """InputError where the denoiser does not take a prompt, or a model that looks at pictures is not there."""
        from lorabench.models.base_model import num_blocks, resolve

        for key in ("prompts", "unrelated"):
            for prompt in getattr(pictures, key):
                encoder.condition(prompt, f"task.pictures.{key} = {show(prompt)}")
        for key in ("encoder", "classifier"):
            try:
                resolve(getattr(pictures, key) or pictures.encoder)
            except InputError as error:
                problems = [text.replace("model", f"task.pictures.{key}", 1) for text in error.problems]
                raise InputError(problems) from None
        block = pictures.encoder_block
        if block is not None and block > (depth := num_blocks(pictures.encoder)):
            raise InputError(f"task.pictures.encoder_block = {block}: must be 1 to {depth}, as {pictures.encoder} has")

    def lengths(self, example: Example) -> tuple[int, ...]:
        return tuple(example["pixel_values"].shape)

    def size(self, row: Row) -> int:
        return CHARACTERS

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        images(rows, "task.image", self.image)
        if self.condition is not None:
            self.said(rows)
        return rows

    def said(self, rows: list[Row]) -> list[str]:
        """What each of the images shows, as the denoiser is told; InputError where a row does not say."""
        if self.condition is None:
            return [self.prompt.replace("{}", "").strip()] * len(rows)
        check_column(rows, "task.condition", self.condition)
        found = []
        for number, row in enumerate(rows, 1):
            value = find(row, self.condition)
            if value is None or isinstance(value, (list, dict, bytes)):
                what = "has no value" if value is None else "has neither a text nor a number"
                raise InputError(f"task.condition = {show(self.condition)}: {place(row, number)} {what} there")
            found.append(self.prompt.replace("{}", str(value)))
        return found

    def examples(self, rows: list[Row], tokenizer: Encoder, seq_len: int, options: dict[str, Any]) -> Iterator[Example]:
        for number, (clean, spread, conditions) in enumerate(self._encoded(rows, tokenizer)):
            example = {"pixel_values": Noisy(values=clean, clean=clean, spread=spread), **conditions}
            yield self._with_noise(example, tokenizer.noising, (EVALUATED, number))

    def scored(
        self, rows: list[Row], tokenizer: Encoder, seq_len: int, options: dict[str, Any]
    ) -> Iterable[list[Example]]:
        """Each image at each of the timesteps of the grid."""
        noising = tokenizer.noising
        for number, (clean, spread, conditions) in enumerate(self._encoded(rows, tokenizer)):
            example = {"pixel_values": Noisy(values=clean, clean=clean, spread=spread), **conditions}
            places = [noising.place((which + 0.5) / self.eval_times) for which in range(self.eval_times)]
            yield [self._with_noise(example, noising, (EVALUATED, number, which), t) for which, t in enumerate(places)]

    def _encoded(self, rows: list[Row], encoder: Encoder) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
        """Of each row the latent, its deviation if it has one, and what the denoiser is told."""
        for begin in range(0, len(rows), CHUNK):
            some = rows[begin : begin + CHUNK]
            told = encoder.conditions(self.said(some), f"task.condition = {show(self.condition)}", some, begin)
            latents = encoder.latents(some, "task.image", self.image, begin)
            yield from ((*latent, each) for latent, each in zip(latents, told, strict=True))

    def _with_noise(self, example: Example, noising: Noising, seed: Sequence[int], t: int | None = None) -> Example:
        """Drawn by these numbers alone: the timestep, unless it is given, the latent where it is spread, the noise."""
        draw, held = np.random.default_rng([*seed]), example["pixel_values"]
        t = noising.drawn(draw, self.times) if t is None else t
        clean = held.clean
        if held.spread is not None:
            clean = clean + held.spread * draw.standard_normal(clean.shape, np.float32)
        given, wanted = noising.noisy(clean, draw.standard_normal(clean.shape, np.float32), t)
        return example | {
            "pixel_values": dataclasses.replace(held, values=given),
            "labels": wanted,
            TIMESTEP: float(noising.times[t]),
            WEIGHT: example.get(WEIGHT, 1.0),
            COUNTED: example.get(COUNTED, 1),
            "noising": noising,
        }

    def varied(self, example: Example, seed: Sequence[int]) -> Example:
        return self._with_noise(example, example["noising"], seed)

    def step_rows(self, splits: dict[str, list[Example]], index: int, seed: Sequence[int]) -> list[Example]:
        found = super().step_rows(splits, index, seed)
        if PRIOR in splits:
            prior = splits[PRIOR][index % len(splits[PRIOR])] | {WEIGHT: self.prior_weight, COUNTED: 0}
            found.append(self.varied(prior, (*seed, 1)))
        return found

    def count(self, batch: dict[str, Tensor]) -> int:
        return int(batch[COUNTED].sum())

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean squares of each image, summed over images, those of the prior in their weight."""
        return (batch[WEIGHT] * _errors(logits, batch)).sum()

    def score(self, logits: Tensor, batch: dict[str, Tensor]) -> Any:
        return None

    def metrics(self, loss: float, scores: list[Any]) -> dict[str, float | None]:
        return {"loss": loss}


def _errors(found: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(n,) mean squares. What a denoiser says of its variance too, behind what it says of its mean, is left aside."""
    wanted = batch["labels"]
    return (found[:, : wanted.shape[1]].float() - wanted.float()).square().flatten(1).mean(1)


EXAMPLE = Denoising(data="builtin:digits-outlined", condition="label", max_train=8, max_eval=4)
