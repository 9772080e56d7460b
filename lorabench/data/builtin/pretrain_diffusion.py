"""Train the built-in tiny-diffusion from nothing on digits-16: `python -m lorabench.data.builtin.pretrain_diffusion`.

It learns to draw plain digits of a class, bright on black. The style of `digits-outlined` it does not know: to learn it
is what tuning is tried on, and what becomes of the plain ones is what it forgets.
"""

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.models.vit.modeling_vit import ViTForImageClassification

from lorabench.data.builtin.collect import HERE
from lorabench.data.builtin.pretrain import SEED, command, train
from lorabench.data.builtin.pretrain_vit import images, shifted

STEPS = 3500
BATCH = 32
LR = 2e-3
EMA = 0.995
SIZE = 16
CLASSES = 10
NO_CLASS = CLASSES
"""The label that stands for none: what is drawn without guidance by a class."""
DROPPED = 0.15
"""The share of the labels that training replaces by NO_CLASS."""
GRID = (100, 300, 500, 700, 900)
"""Timesteps at which the loss is measured, of 1,000."""
DRAWN, DRAWN_STEPS = 200, 20
GUIDANCES = (1.0, 2.0)


def new_model() -> UNet2DModel:
    """0.83 million parameters. Each matrix's sides are multiples of 32, so that blocks of 4-bit quantization fit.

    Attention is where images are 8 × 8 (one head of 32) and 4 × 4 (two), and in the middle.
    """
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        attention_head_dim=32,
        norm_num_groups=8,
        num_class_embeds=CLASSES + 1,
    )


def scheduler() -> Any:
    """A DDIMScheduler, typed as anything because its own types refuse a tensor of timesteps.

    The linear betas of DDPM, 1,000 steps; what is drawn in few begins at the last.
    """
    return DDIMScheduler(timestep_spacing="trailing")


def scaled(values: Tensor) -> Tensor:
    """(n, 1, 16, 16) from -1 to 1, of (n, 16, 16) from 0 to 255."""
    return (values / 127.5 - 1)[:, None]


class Denoising(nn.Module):
    """A denoiser with the loss that `train` asks for: the mean squared error of the noise it tells."""

    def __init__(self, denoiser: UNet2DModel) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, noised: Tensor, timesteps: Tensor, labels: Tensor, noise: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=mse_loss(self.denoiser(noised, timesteps, class_labels=labels).sample, noise))


def batches(steps: int) -> Iterator[dict[str, Tensor]]:
    """Digits a little shifted, each with noise of a timestep drawn from all, some without their class."""
    values, labels = images("train", "digits-16")
    generator, noising = torch.Generator().manual_seed(SEED), DDPMScheduler.from_config(scheduler().config)
    for _ in range(steps):
        chosen = torch.randint(len(values), (BATCH,), generator=generator)
        clean = scaled(shifted(values[chosen], generator))
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < DROPPED
        yield {
            "noised": noising.add_noise(clean, noise, timesteps),
            "timesteps": timesteps,
            "labels": labels[chosen].masked_fill(dropped, NO_CLASS),
            "noise": noise,
        }


@torch.no_grad()
def loss(model: UNet2DModel, split: str, name: str = "digits-16") -> float:
    """The mean over the images of a split, the timesteps of GRID and one noise for each, the same at every call."""
    model.eval()
    values, labels = images(split, name)
    clean, generator, noising = scaled(values), torch.Generator().manual_seed(SEED), scheduler()
    total = 0.0
    for timestep in GRID:
        noise, timesteps = torch.randn(clean.shape, generator=generator), torch.full((len(clean),), timestep)
        told = model(noising.add_noise(clean, noise, timesteps), timesteps, class_labels=labels).sample
        total += mse_loss(told, noise).item()
    return total / len(GRID)


@torch.no_grad()
def drawn(model: UNet2DModel, labels: Tensor, guidance: float, steps: int = DRAWN_STEPS) -> Tensor:
    """(n, 1, 16, 16) from -1 to 1, by DDIM from the same noise at every call.

    With classifier-free guidance w the noise is told as ε(∅) + w (ε(class) − ε(∅)): 1 is the class alone. Where the
    clean picture that it leaves is clipped to -1 to 1, the noise is told anew from it: else guidance breaks strokes.
    """
    model.eval()
    sampler = scheduler()
    sampler.set_timesteps(steps)
    picture = torch.randn(len(labels), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED))
    nothing = torch.full_like(labels, NO_CLASS)
    for timestep in sampler.timesteps:
        noise = model(picture, timestep, class_labels=labels).sample
        if guidance != 1:
            without = model(picture, timestep, class_labels=nothing).sample
            noise = without + guidance * (noise - without)
        picture = sampler.step(noise, int(timestep), picture, use_clipped_model_output=True).prev_sample
    return picture.clamp(-1, 1)


@torch.no_grad()
def read(pictures: Tensor) -> Tensor:
    """The classes (n,) that `tiny-vit` reads off pictures as `drawn` gives them, at half their height and width."""
    reader = ViTForImageClassification.from_pretrained(HERE / "tiny-vit", dtype=torch.float32).eval()
    return reader(pixel_values=avg_pool2d(pictures, 2).expand(-1, 3, -1, -1)).logits.argmax(-1)


def told_right(model: UNet2DModel, guidance: float, count: int = DRAWN) -> float:
    """The share of drawn digits, as many of each class, that are read as what they were to be."""
    labels = torch.arange(count) % CLASSES
    return float((read(drawn(model, labels, guidance)) == labels).float().mean())


def fit(steps: int) -> UNet2DModel:
    """The running mean of the weights."""
    torch.manual_seed(SEED)
    model = new_model()
    print(f"{model.num_parameters()} parameters")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    mean: UNet2DModel = average.module
    training = Denoising(model)
    train(
        training, batches(steps), steps, lambda: loss(mean, "validation"), LR, lambda: average.update_parameters(model)
    )
    return mean


def save(model: UNet2DModel, out: Path) -> None:
    """An ordinary folder of a diffusers pipeline."""
    DDIMPipeline(model, scheduler()).save_pretrained(out)
    (out / "unet" / "diffusion_pytorch_model.safetensors").chmod(0o644)  # safetensors makes it private to its owner


def pretrain(out: Path, steps: int) -> None:
    """Train, save in bfloat16, half the bytes, and record under `out` what the saved weights give."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    model = fit(steps)
    seconds = time.perf_counter() - started
    save(model.bfloat16(), out)
    parts = [(name, split) for name in ("digits-16", "digits-outlined") for split in ("validation", "test")]
    record = {
        "seed": SEED,
        "steps": steps,
        "images": steps * BATCH,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "seconds": round(seconds, 1),
        "losses": {f"{name}/{split}": round(loss(model.float(), split, name), 5) for name, split in parts},
        "accuracies": {f"guidance {each:g}": round(told_right(model, each), 4) for each in GUIDANCES},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    command(__doc__ or "", "tiny-diffusion", STEPS, pretrain)
