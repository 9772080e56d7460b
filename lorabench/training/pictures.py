"""What a diffusion run has learned to draw: fixed prompts from fixed noise, by the tuned model and the base.

    picture_similarity    mean cosine of the features of a picture and of the held-out images of its prompt
    base_…, train_…       the same of the untouched base's pictures, and of images that were trained on: what drawing
                          as before gives, and what a perfect copy would
    picture_drift         (1 - cos(base's picture, tuned model's)) / 2, mean over prompts of which nothing was trained
    picture_drift_null    the same of two pictures that the base draws of one such prompt from different noise
    picture_accuracy      share of pictures that a classifier tells right

Features are a vision encoder's class token behind its last norm, or all patches behind one of its blocks. PEFT's own
comparison of image generation has the similarity so, by DINOv2, and the drift as 1 - cos, of adapters alone.

Shapes: n pictures, (h, w, 3) each, from 0 to 255.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lorabench.config.decode import encode
from lorabench.data.images import decode_each, processed, target_sizes
from lorabench.models import base_model, denoisers
from lorabench.models.latents import Encoder, kept, scheduler
from lorabench.spec.pictures import Pictures
from lorabench.store.pictures import Sheet
from lorabench.tasks.denoising import Denoising
from lorabench.training.drift import base_beside, why_not
from lorabench.training.environment import source_digest
from lorabench.training.examples import read_usable
from lorabench.training.passes import autocast, base_of
from lorabench.training.state import Training

AT_A_TIME = 16
CLIPPED = "use_clipped_model_output"
MOST_IMAGES = 256
"""Of a split, whose features are looked at."""
MOST_PROMPTS = 16
"""Of the held-out images' own, where none are given."""
Images = NDArray[np.uint8]
"""(n, h, w, 3)."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One picture."""

    prompt: str
    seed: int


def wanted(task: Denoising, pictures: Pictures, said: Sequence[str]) -> list[Wanted]:
    """All pictures of a run, those of what was trained first. `said` is what the held-out images show."""
    prompts = pictures.prompts or tuple(dict.fromkeys(said))[:MOST_PROMPTS]
    return [
        Wanted(prompt=prompt, seed=pictures.seed + number)
        for prompt in (*prompts, *pictures.unrelated)
        for number in range(pictures.each)
    ]


def measure(training: Training, check: Callable[[], None]) -> tuple[dict[str, float], dict[str, str], Sheet | None]:
    """Measures by their names in MEASURES, provenance, and the pictures. Whatever fails, what was trained stands."""
    meter = training.meter
    with meter.clock("draw"):
        try:
            with meter.phase("draw"):
                measures, notes, sheet = _measured(training, check)
        except Exception as error:
            return {}, {"pictures": why_not(error)}, None
    return measures | {key: value for key, value in meter.peaks.items() if key.startswith("draw")}, notes, sheet


def _measured(training: Training, check: Callable[[], None]) -> tuple[dict[str, float], dict[str, str], Sheet]:
    spec, task = training.spec, training.base.stages[-1].task
    assert isinstance(task, Denoising) and task.pictures is not None
    pictures = task.pictures
    encoder, rows = task.reads_with(spec.model, spec.revision), read_usable(task).rows
    held, known = rows["validation"][:MOST_IMAGES], rows["train"][: task.max_train][:MOST_IMAGES]
    said = task.said(held)
    asked = wanted(task, pictures, said)
    model = training.model.eval()
    artist = Artist(spec=spec, encoder=encoder, pictures=pictures, device=training.meter.device, check=check)
    own = artist.draw(base_of(model), asked)
    content = json.dumps(
        [training.base.content, encode(task), spec.dtype, spec.quantization, spec.threads, torch.__version__,
         str(training.meter.device), [vars(each) for each in asked], source_digest()], sort_keys=True,
    ).encode()  # fmt: skip
    base = kept(content, lambda: artist.draw(base_beside(training).eval(), asked))
    fitted = lambda rows: np.stack([encoder.fitted(full) for full in decode_each(rows, "task.image", task.image)])  # noqa: E731
    eye = _Features(pictures.encoder, pictures.encoder_block, training.meter.device)
    of_held, of_train, of_own, of_base = map(eye.of, (fitted(held), fitted(known), own, base))
    trained = [place for place, each in enumerate(asked) if each.prompt not in pictures.unrelated]
    prompts = [each.prompt for each in asked]
    like = {
        "picture_similarity": similarity(of_own[trained], [prompts[place] for place in trained], of_held, said),
        "base_picture_similarity": similarity(of_base[trained], [prompts[place] for place in trained], of_held, said),
        "train_similarity": similarity(of_train, task.said(known), of_held, said),
    }
    notes = {"pictures": f"{len(asked)} by {pictures.steps} steps of {type(artist.scheduler).__name__}, guidance "
                         f"{pictures.guidance:g}; features of {pictures.encoder}{_behind(pictures)}"}  # fmt: skip
    if pictures.unrelated:
        apart = [place for place in range(len(asked)) if place not in trained]
        like["picture_drift"] = float(drift(of_base[apart], of_own[apart]).mean())
        null = null_drift(of_base[apart], [prompts[place] for place in apart])
        like |= {} if null is None else {"picture_drift_null": null}
    if pictures.classifier is not None:
        like |= _told(pictures.classifier, prompts, {"picture_accuracy": own, "base_picture_accuracy": base}, training)
    sheet = Sheet(prompts=tuple(prompts), unrelated=pictures.unrelated, base=base, tuned=own)
    return like, notes, sheet


def _behind(pictures: Pictures) -> str:
    return "" if pictures.encoder_block is None else f", patches behind block {pictures.encoder_block}"


@dataclass(frozen=True, kw_only=True)
class Artist:
    """Draws by a denoiser as its pipeline would."""

    spec: Any
    encoder: Encoder
    pictures: Pictures
    device: torch.device
    check: Callable[[], None]

    @property
    def scheduler(self) -> Any:
        return scheduler(self.encoder.folder, self.encoder.source)

    def draw(self, model: Any, asked: Sequence[Wanted]) -> Images:
        """(n, h, w, 3), each from the noise of its own seed, whatever it is drawn with."""
        found = []
        with torch.no_grad(), autocast(self.spec, self.device):
            draw = self._by_pipeline(model) if self.encoder.has_texts else self._by_class(model)
            for begin in range(0, len(asked), AT_A_TIME):
                self.check()
                found.append(draw(asked[begin : begin + AT_A_TIME]))
        values = np.concatenate(found)
        return np.broadcast_to(np.rint(values * 255).clip(0, 255).astype(np.uint8), (*values.shape[:3], 3)).copy()

    def _noise(self, asked: Sequence[Wanted]) -> torch.Tensor:
        height, width = self.encoder.pixels
        shape = (self.encoder.channels, height, width)
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._generators(asked)])

    def _generators(self, asked: Sequence[Wanted]) -> list[torch.Generator]:
        """On the CPU, so that a picture begins the same everywhere."""
        return [torch.Generator().manual_seed(each.seed) for each in asked]

    def _by_class(self, model: nn.Module) -> Callable[[Sequence[Wanted]], NDArray[Any]]:
        """Of pixels, by classes' numbers or without any condition; guided away from what the last class gives."""
        number: int = self.encoder.config.get("num_class_embeds") or 0

        def draw(asked: Sequence[Wanted]) -> NDArray[Any]:
            sampler, sample = self.scheduler, self._noise(asked).to(self.device)
            # Of DDIM: else what is cut off of the image stays in the noise that the next step begins with.
            clipped = {key: True for key in inspect.signature(sampler.step).parameters if key == CLIPPED}
            sampler.set_timesteps(self.pictures.steps)
            sample, guidance = sample * sampler.init_noise_sigma, self.pictures.guidance if number else 1.0
            labels = torch.tensor([int(each.prompt) for each in asked], device=self.device) if number else None
            for t in sampler.timesteps:
                told = {} if labels is None else {"class_labels": labels}
                given = sampler.scale_model_input(sample, t)
                found = denoisers.predict(model, given, t.expand(len(given)).to(self.device), told).float()
                if labels is not None and guidance != 1:
                    nothing = {"class_labels": torch.full_like(labels, number - 1)}
                    without = denoisers.predict(model, given, t.expand(len(given)).to(self.device), nothing).float()
                    found = without + guidance * (found - without)
                sample = sampler.step(found[:, : sample.shape[1]], t, sample, **clipped).prev_sample
            return ((sample + 1) / 2).permute(0, 2, 3, 1).float().cpu().numpy()

        return draw

    def _by_pipeline(self, model: Any) -> Callable[[Sequence[Wanted]], NDArray[Any]]:
        """By the pipeline's own code, with this denoiser in it."""
        import diffusers

        part = denoisers.denoiser_folder(self.encoder.folder, self.encoder.source).name
        absent = {"safety_checker": None} if "safety_checker" in self.encoder.index else {}
        kind: Any = getattr(diffusers, self.encoder.kind)
        pipeline = kind.from_pretrained(self.encoder.folder, local_files_only=True, **{part: model}, **absent)
        pipeline.to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        height, width = self.encoder.pixels

        def draw(asked: Sequence[Wanted]) -> NDArray[Any]:
            found = pipeline(
                [each.prompt for each in asked], height=height, width=width, num_inference_steps=self.pictures.steps,
                guidance_scale=self.pictures.guidance, generator=self._generators(asked), output_type="np",
            )  # fmt: skip
            return np.asarray(found.images)

        return draw


class _Features:
    """Of images, by a vision encoder: unit vectors."""

    def __init__(self, source: str, block: int | None, device: torch.device):
        from transformers import AutoModel

        self.processor = base_model.load_image_processor(source)
        self.model = AutoModel.from_pretrained(base_model.resolve(source)).float().to(device).eval()
        self.block = block

    @torch.no_grad()
    def of(self, images: Images) -> NDArray[np.float64]:
        found = []
        for begin in range(0, len(images), AT_A_TIME):
            seen = _seen(images[begin : begin + AT_A_TIME], self.processor).to(self.model.device)
            out = self.model(pixel_values=seen, output_hidden_states=True)
            features = out.last_hidden_state[:, 0] if self.block is None else out.hidden_states[self.block][:, 1:]
            found.append(features.flatten(1).double().cpu().numpy())
        vectors = np.concatenate(found)
        unit: NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return unit


def _seen(images: Images, processor: Any) -> torch.Tensor:
    """As the processor makes them; where its size goes into theirs, of the means of so many pixels."""
    n, height, width, _ = images.shape
    for high, wide in target_sizes(processor):
        if height % high == width % wide == 0:
            images = (
                images.reshape(n, high, height // high, wide, width // wide, 3).mean((2, 4)).round().astype(np.uint8)
            )
    return torch.from_numpy(np.stack([each.seen() for each in processed([*images], processor)]))


def similarity(
    drawn: NDArray[np.float64], prompts: Sequence[str], held: NDArray[np.float64], said: Sequence[str]
) -> float:
    """Mean cosine of pictures (n, d) and the held-out images (m, d) of the same prompt; of all where none shows it.

    An image among them that is the picture itself counts as any other.
    """
    found = []
    for prompt, vector in zip(prompts, drawn, strict=True):
        same = held[[each == prompt for each in said]]
        found.append(float(((same if len(same) else held) @ vector).mean()))
    return float(np.mean(found))


def drift(base: NDArray[np.float64], tuned: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) from 0 of the same to 1 of the opposite, of unit vectors (n, d)."""
    found: NDArray[np.float64] = (1 - (base * tuned).sum(1)) / 2
    return found


def null_drift(base: NDArray[np.float64], prompts: Sequence[str]) -> float | None:
    """Mean drift over pairs of pictures of one prompt; None where each was drawn once."""
    pairs = [(a, b) for a in range(len(prompts)) for b in range(a) if prompts[a] == prompts[b]]
    if not pairs:
        return None
    first, second = (list(column) for column in zip(*pairs, strict=True))
    return float(drift(base[first], base[second]).mean())


def _told(source: str, prompts: list[str], drawn: dict[str, Images], training: Training) -> dict[str, float]:
    """Share of pictures that a classifier gives the class that its prompt names."""
    from transformers import AutoModelForImageClassification

    processor = base_model.load_image_processor(source)
    model = AutoModelForImageClassification.from_pretrained(base_model.resolve(source))
    model = model.float().to(training.meter.device).eval()
    names = {place: str(name) for place, name in model.config.id2label.items()}
    found = {}
    for measure, images in drawn.items():
        with torch.no_grad():
            logits = model(pixel_values=_seen(images, processor).to(model.device)).logits
        told = [names[place] for place in logits.argmax(-1).tolist()]
        found[measure] = float(np.mean([name == prompt for name, prompt in zip(told, prompts, strict=True)]))
    return found
