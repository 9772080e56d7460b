"""What a pipeline makes of images and texts before its denoiser sees them: latents and embeddings, made once.

Both are kept on disk by their content, what made them included, so that no run of a sweep makes them again.

Shapes: c channels, h height, w width of a latent, t tokens, d width of an embedding.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorabench.config.decode import InputError
from lorabench.config.digests import file_digest
from lorabench.config.durable import cache_folder
from lorabench.config.quote import clip, show, show_path
from lorabench.data.image_folder import VISION
from lorabench.data.images import decode_each
from lorabench.data.noise import Noising
from lorabench.data.rows_file import Row, place
from lorabench.models import denoisers
from lorabench.models.base_model import pipeline_folder

TEXTS = {
    "StableDiffusionPipeline": ("encoder_hidden_states",),
    "StableDiffusionXLPipeline": ("encoder_hidden_states", "text_embeds"),
    "StableDiffusion3Pipeline": ("encoder_hidden_states", "pooled_projections"),
    "FluxPipeline": ("encoder_hidden_states", "pooled_projections"),
}
"""What the denoiser of each kind of pipeline is told of a text."""
TEXT_PARTS = ("tokenizer", "text_encoder")
Conditions = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """Of one pipeline; reads images and texts for its denoiser."""

    source: str
    """What the spec calls it."""
    folder: Path
    index: dict[str, Any]
    """What its `model_index.json` says."""
    config: dict[str, Any]
    """The denoiser's."""
    noising: Noising
    resolution: int | None
    is_rehearsal: bool = False
    """Whether zeros of the right shapes will do: nothing is loaded."""
    pad_token_id: ClassVar[int] = 0

    @classmethod
    def of(cls, source: str, revision: str | None, resolution: int | None) -> Encoder:
        """InputError where the pipeline or a part of it is not there, or its scheduler is of no known kind."""
        folder = pipeline_folder(source, revision)
        denoisers.check_parts(folder, source)
        index = denoisers.pipeline_index(folder, source)
        if index.get("vae") and index["vae"][1] != "AutoencoderKL":
            what = f"its autoencoder is {index['vae'][1]}, and latents are known of AutoencoderKL alone"
            raise InputError(f'model = "{show_path(source)}": {what}')
        return cls(
            source=source,
            folder=folder,
            index=index,
            config=denoisers.read_config(folder, source),
            noising=Noising.of(scheduler(folder, source)),
            resolution=resolution,
        )

    @property
    def kind(self) -> str:
        return str(self.index.get("_class_name", ""))

    @property
    def has_texts(self) -> bool:
        return bool(self.index.get("text_encoder"))

    @cached_property
    def shrinks(self) -> int:
        """Pixels of an image for one of a latent."""
        return 2 ** (len(self._vae_config["block_out_channels"]) - 1) if self.index.get("vae") else 1

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        import diffusers

        return dict(getattr(diffusers, self.index["vae"][1]).load_config(self.folder / "vae", local_files_only=True))

    @cached_property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the images."""
        if self.resolution is not None:
            if self.resolution % (2 * self.shrinks):
                says = f"must be a multiple of {2 * self.shrinks}, which its latents' patches are of"
                raise InputError(f"task.resolution = {self.resolution}: {says}")
            return self.resolution, self.resolution
        size = self.config.get("sample_size") or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.shrinks, width * self.shrinks

    @property
    def channels(self) -> int:
        """c of a latent."""
        found = int(self.config["in_channels"])
        return found // 4 if "Flux" in self.kind else found

    def latents(
        self, rows: Sequence[Row], key: str, column: str, begin: int
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
        """Of each row (c, h, w) as the denoiser is given it, and its deviation where an autoencoder gives one."""
        for full in decode_each(rows, key, column, begin):
            yield self._latent(self.fitted(full))

    def fitted(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(h, w, 3) scaled until the shorter side fits, and cut in the middle, as diffusers' examples do it."""
        height, width = self.pixels
        if image.shape[:2] != (height, width):
            try:
                from PIL import Image
            except ImportError:
                raise InputError(f"task.data: to scale images to {width} × {height} needs {VISION}") from None
            share = max(height / image.shape[0], width / image.shape[1])
            sides = (max(width, round(image.shape[1] * share)), max(height, round(image.shape[0] * share)))
            image = np.asarray(Image.fromarray(image).resize(sides, Image.Resampling.BILINEAR))
            top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
            image = image[top : top + height, left : left + width]
        return image

    def _latent(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        if not self.index.get("vae"):
            values = image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
            return (values.mean(0, keepdims=True) if self.channels == 1 else values), None
        if self.is_rehearsal:
            zeros = np.zeros((self.channels, *(side // self.shrinks for side in self.pixels)), np.float32)
            return zeros, zeros
        mean, spread = kept(
            f"{self._digest('vae')} {image.shape}".encode() + image.tobytes(), lambda: self._encoded(image)
        )
        return mean, spread

    def _encoded(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(2, c, h, w): mean and deviation of the latent."""
        import torch

        vae, config = self._vae, self._vae_config
        pixels = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)[None]
        with torch.no_grad():
            found = vae.encode(pixels.to(vae.device)).latent_dist
        scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
        return torch.cat([(found.mean - shift) * scale, found.std * scale]).float().cpu().numpy()

    @cached_property
    def _vae(self) -> Any:
        import diffusers
        import torch

        vae = getattr(diffusers, self.index["vae"][1]).from_pretrained(self.folder / "vae", local_files_only=True)
        return vae.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)

    def _digest(self, *parts: str) -> str:
        """Of the files of these parts."""
        files = [file for part in parts for file in sorted((self.folder / part).rglob("*")) if file.is_file()]
        return hashlib.sha256(" ".join(f"{file.name} {file_digest(file)}" for file in files).encode()).hexdigest()

    def conditions(self, said: list[str], key: str, rows: Sequence[Row], begin: int) -> list[Conditions]:
        """What the denoiser is told of each; InputError with the row of a class that it does not know."""
        made: dict[str, Conditions] = {}
        for number, (each, row) in enumerate(zip(said, rows, strict=True), begin + 1):
            if each not in made:
                made[each] = self.condition(each, f"{key}: {place(row, number)}")
        return [made[each] for each in said]

    def condition(self, said: str, where: str) -> Conditions:
        """The same of one, which stands at `where`."""
        if not self.has_texts:
            return self._of_class(said, where)
        if self.kind not in TEXTS:
            known = ", ".join(TEXTS)
            raise InputError(f'model = "{show_path(self.source)}": {self.kind} has texts, and is none of {known}')
        return self._of_text(said)

    def _of_class(self, said: str, where: str) -> Conditions:
        number = self.config.get("num_class_embeds")
        if not number:
            if said:
                raise InputError(f"{where}: says {show(said)}, and the denoiser takes no condition; leave it out")
            return {}
        if not said.isdigit() or int(said) >= number:
            what = f"says {show(said)}" if said else "says nothing"
            raise InputError(f"{where}: {what}; the denoiser is told a class's number, 0 to {number - 1}")
        return {"class_labels": int(said)}

    def _of_text(self, text: str) -> Conditions:
        names = TEXTS[self.kind]
        if self.is_rehearsal:
            found = [np.zeros((1, 1), np.float32), np.zeros(1, np.float32)][: len(names)]
        else:
            parts = sorted(part for part in self.index if part.startswith(TEXT_PARTS) and self.index[part])
            name = f"{self.kind} {self._text_digest(tuple(parts))} {text}".encode()
            found = [kept(name + key.encode(), lambda place=place: self._embedded(text)[place])  # type: ignore[misc]
                     for place, key in enumerate(names)]  # fmt: skip
        told: Conditions = dict(zip(names, found, strict=True))
        if "text_embeds" in names:  # SDXL is told the size of the image, where it was cut, and the size it is to be
            told["time_ids"] = np.array([*self.pixels, 0, 0, *self.pixels], np.float32)
        return told

    def _text_digest(self, parts: tuple[str, ...]) -> str:
        if "digest" not in self._made:
            self._made["digest"] = self._digest(*parts)
        return str(self._made["digest"])

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    def _embedded(self, text: str) -> list[NDArray[np.float32]]:
        """By the pipeline's own code: of each of TEXTS, without the axis of the batch."""
        import torch

        if text in self._made:
            return list(self._made[text])
        pipeline: Any = self._texts
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.no_grad():
            if self.kind == "StableDiffusionPipeline":
                found = pipeline.encode_prompt(text, device, 1, False)[:1]
            elif self.kind == "FluxPipeline":
                found = pipeline.encode_prompt(text, text, device=device)[:2]
            elif self.kind == "StableDiffusion3Pipeline":
                found = pipeline.encode_prompt(text, text, text, device=device, do_classifier_free_guidance=False)[::2]
            else:
                found = pipeline.encode_prompt(text, text, device=device, do_classifier_free_guidance=False)[::2]
        self._made[text] = [each[0].float().cpu().numpy() for each in found]
        return list(self._made[text])

    @cached_property
    def _texts(self) -> Any:
        """The pipeline with its tokenizers and text encoders alone."""
        import diffusers
        import torch

        unused = (*denoisers.PARTS, "vae", "safety_checker", "feature_extractor", "image_encoder")
        absent: dict[str, Any] = {part: None for part in unused if part in self.index}
        found = getattr(diffusers, self.kind).from_pretrained(self.folder, local_files_only=True, **absent)
        return found.to("cuda" if torch.cuda.is_available() else "cpu")


def scheduler(folder: Path, source: str) -> Any:
    """The pipeline's own. InputError where diffusers has none of its name."""
    import diffusers

    index = denoisers.pipeline_index(folder, source)
    name = (index.get("scheduler") or [None, ""])[1]
    if not hasattr(diffusers, name or " "):
        raise InputError(f'model = "{show_path(source)}": {denoisers.INDEX} names no scheduler that diffusers has')
    try:
        return getattr(diffusers, name).from_pretrained(folder / "scheduler", local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f'model = "{show_path(source)}": its scheduler does not load: {clip(error)}') from None


Held = TypeVar("Held", bound=np.generic)


def kept(content: bytes, make: Callable[[], NDArray[Held]]) -> NDArray[Held]:
    """What `make` gives, from the disk where it was made before of the same content."""
    name = hashlib.sha256(content).hexdigest()
    file = cache_folder() / "latents" / name[:2] / f"{name}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        found: NDArray[Held] = np.load(file, allow_pickle=False)
        return found
    made = make()
    with contextlib.suppress(OSError):  # what is kept for others is no reason to fail
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{name}.{os.getpid()}.npy")
        np.save(temporary, made)
        os.replace(temporary, file)
    return made
