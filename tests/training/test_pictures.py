"""Similarity, drift, its chance and accuracy, from pictures whose answers are known; the sampler beside a loop."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from transformers import AutoModel

from lorabench.data.builtin.collect import HERE
from lorabench.data.dataset import read_data
from lorabench.data.images import decoded
from lorabench.models.latents import Encoder
from lorabench.spec.pictures import Pictures
from lorabench.training import pictures
from lorabench.training.pictures import Artist, Wanted
from tests.conftest import make_spec

CPU = torch.device("cpu")


def test_similarity_is_to_held_out_images_of_the_same_prompt():
    held, said = np.array([[1.0, 0, 0], [0, 1, 0], [0.6, 0.8, 0]]), ["a", "b", "a"]
    drawn = np.array([[1.0, 0, 0], [0, 0.6, 0.8], [0, 0, 1]])
    by_hand = [(1 + 0.6) / 2, 0.6, (0 + 0 + 0) / 3]  # nothing held out shows a c: all count
    assert pictures.similarity(drawn, ["a", "b", "c"], held, said) == pytest.approx(np.mean(by_hand))


def test_drift_goes_from_the_same_to_the_opposite():
    base = np.array([[1.0, 0], [1, 0], [1, 0]])
    assert pictures.drift(base, np.array([[1.0, 0], [0, 1], [-1, 0]])) == pytest.approx([0, 0.5, 1])


def test_chance_s_drift_is_between_pictures_of_one_prompt():
    base = np.array([[1.0, 0], [0, 1], [1, 0], [-1, 0]])
    assert pictures.null_drift(base, ["a", "a", "b", "b"]) == pytest.approx((0.5 + 1) / 2)
    assert pictures.null_drift(base, ["a", "b", "c", "d"]) is None


def test_real_digits_are_told_right_and_their_features_are_the_encoder_s():
    """Of plain digits of 16 pixels; averages of four are the 8 × 8 that the classifier knows."""
    rows = read_data("builtin:digits-16").splits["test"][:60]
    images, names = np.stack([decoded(row["image"]) for row in rows]), [str(row["label"]) for row in rows]
    training = SimpleNamespace(meter=SimpleNamespace(device=CPU))
    found = pictures._told("builtin:tiny-vit", names, {"right": images, "wrong": 255 - images}, training)
    assert found["right"] > 0.85 > 0.5 > found["wrong"]
    small = images.reshape(60, 8, 2, 8, 2, 3).mean((2, 4)).round()
    seen = torch.from_numpy((small / 127.5 - 1).transpose(0, 3, 1, 2).astype(np.float32))
    model = AutoModel.from_pretrained(HERE / "tiny-vit", dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(pixel_values=seen, output_hidden_states=True)
    for block, wanted in ((None, out.last_hidden_state[:, 0]), (2, out.hidden_states[2][:, 1:].flatten(1))):
        wanted = torch.nn.functional.normalize(wanted.double(), dim=1).numpy()
        assert pictures._Features("builtin:tiny-vit", block, CPU).of(images) == pytest.approx(wanted, abs=1e-5)


def test_digits_are_drawn_as_a_plain_loop_draws_them():
    """DDIM with guidance (Song et al. 2021, eq. 12; Ho and Salimans 2022), the image cut off to [-1, 1] each time."""
    spec = make_spec(model="builtin:tiny-diffusion", task={"name": "denoising", "condition": "label"})
    encoder = Encoder.of("builtin:tiny-diffusion", None, None)
    asked = [Wanted(prompt="3", seed=5), Wanted(prompt="8", seed=6)]
    model = UNet2DModel.from_pretrained(HERE / "tiny-diffusion" / "unet", torch_dtype=torch.float32).eval()
    own = Artist(spec=spec, encoder=encoder, pictures=Pictures(steps=6, guidance=2.0), device=CPU, check=lambda: None)
    scheduler = DDIMScheduler.from_pretrained(HERE / "tiny-diffusion" / "scheduler")
    scheduler.set_timesteps(6)
    kept = scheduler.alphas_cumprod.double()
    x = torch.stack([torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]).double()
    times = scheduler.timesteps.tolist()
    for t in times:
        with torch.no_grad():
            told, untold = (model(x.float(), t, class_labels=torch.tensor(labels)).sample.double()
                            for labels in ([3, 8], [10, 10]))  # fmt: skip
        noise = untold + 2.0 * (told - untold)
        image = ((x - (1 - kept[t]).sqrt() * noise) / kept[t].sqrt()).clamp(-1, 1)
        noise = (x - kept[t].sqrt() * image) / (1 - kept[t]).sqrt()
        before = t - 1000 // 6
        after = kept[before] if before >= 0 else torch.as_tensor(scheduler.final_alpha_cumprod).double()
        x = after.sqrt() * image + (1 - after).sqrt() * noise
    wanted = (((x + 1) / 2).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    found = own.draw(model, asked)
    assert found.shape == (2, 16, 16, 3) and found.std() > 30
    assert np.abs(found[..., :1] - wanted).max() <= 1
    alone = own.draw(model, asked[1:])
    assert np.abs(alone[0].astype(int) - found[1]).max() <= 1  # whatever it is drawn with
