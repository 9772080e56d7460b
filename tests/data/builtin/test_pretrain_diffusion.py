import json
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from safetensors.torch import load_file
from scipy import ndimage

from lorabench.data.builtin import pretrain_diffusion
from lorabench.data.builtin.collect import HERE
from lorabench.data.builtin.pretrain_vit import images

MODEL = HERE / "tiny-diffusion"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
KEPT = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
"""ᾱ of Ho et al. 2020, section 4."""


@pytest.fixture(scope="module")
def model():
    return DiffusionPipeline.from_pretrained(MODEL).unet.requires_grad_(False)


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((MODEL / "training.json").read_text())


def greys(name: str, split: str) -> tuple[np.ndarray, torch.Tensor]:
    values, labels = images(split, name)
    return values.double().numpy() * (16 / 255), labels


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_large_digits_are_those_of_8_pixels_enlarged_bilinearly(split):
    (small, labels), (large, same) = greys("digits", split), greys("digits-16", split)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(small.round())[:, None], scale_factor=2, mode="bilinear", align_corners=False
    )
    assert (np.floor(wanted[:, 0].numpy() + 0.5) == large.round()).all() and (labels == same).all()
    assert np.abs(large - large.round()).max() < 0.51 * 16 / 255  # whole greys, rounded to whole numbers of 255


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_outlined_digits_are_the_large_ones_0_to_4_less_half_of_what_lies_within(split):
    (large, labels), (styled, same) = greys("digits-16", split), greys("digits-outlined", split)
    chosen = np.isin(labels.numpy(), [0, 1, 2, 3, 4])
    stroke = np.clip((large[chosen].round() - 6) / 4, 0, 1)
    cross = ndimage.generate_binary_structure(2, 1)
    within = np.stack([ndimage.grey_erosion(each, footprint=cross, mode="constant", cval=0) for each in stroke])
    assert (styled.round() == 16 * stroke - 8 * within).all() and (labels[chosen] == same).all()


def test_the_style_is_another_one_and_the_digits_can_still_be_read(recorded):
    (plain, labels), (styled, same) = images("test", "digits-16"), images("test", "digits-outlined")
    assert recorded["losses"]["digits-outlined/test"] > 5 * recorded["losses"]["digits-16/test"]
    right = [
        (pretrain_diffusion.read(pretrain_diffusion.scaled(each)) == wanted).float().mean()
        for each, wanted in [(plain, labels), (styled, same)]
    ]
    assert right[0] > 0.92 and 0.7 < right[1] < 0.85


def test_its_files_are_small_and_its_shapes_suit_4_bit_blocks(model):
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 1_800_000
    stored = load_file(MODEL / WEIGHTS)
    assert {each.dtype for each in stored.values()} == {torch.bfloat16}
    assert set(stored) == set(model.state_dict()) and model.num_parameters() == 825_089
    at_the_ends = {"conv_in.weight", "conv_out.weight", "class_embedding.weight"}
    sides = {name: each.shape[:2] for name, each in stored.items() if each.ndim > 1}
    assert {name for name, shape in sides.items() if any(side % 32 for side in shape)} == at_the_ends
    assert sum(name.endswith("to_q.weight") for name in sides) == 7


def test_its_folder_is_a_pipeline_with_the_schedule_it_was_trained_on():
    scheduler = DDIMPipeline.from_pretrained(MODEL).scheduler
    assert torch.allclose(scheduler.alphas_cumprod.double(), KEPT, rtol=1e-5)
    assert scheduler.config.prediction_type == "epsilon" and scheduler.config.clip_sample


def test_it_was_made_by_the_script_as_it_stands(model, recorded):
    assert (recorded["seed"], recorded["steps"]) == (pretrain_diffusion.SEED, pretrain_diffusion.STEPS)
    found = pretrain_diffusion.loss(model, "validation", "digits-outlined")
    assert found == pytest.approx(recorded["losses"]["digits-outlined/validation"], rel=1e-3)


def test_it_draws_what_it_is_told(model, recorded):
    assert recorded["accuracies"]["guidance 2"] > 0.9
    assert pretrain_diffusion.told_right(model, guidance=2.0, count=10) >= 0.8


def test_the_loss_is_that_of_the_noise_under_the_schedule_of_ddpm():
    values, _ = images("validation", "digits-outlined")
    clean = pretrain_diffusion.scaled(values).double()

    def off_by_a_tenth(noised, timesteps, class_labels):
        kept = KEPT[timesteps][:, None, None, None]
        return SimpleNamespace(sample=((noised - kept.sqrt() * clean) / (1 - kept).sqrt() + 0.1).float())

    denoiser = Mock(side_effect=off_by_a_tenth)
    assert pretrain_diffusion.loss(denoiser, "validation", "digits-outlined") == pytest.approx(0.01, rel=1e-3)


def test_drawing_is_ddim_with_classifier_free_guidance(model):
    """Song et al. 2021, equation 12 with σ = 0, what x0 is told to be clipped and the noise that of the clipped."""
    labels = torch.tensor([3, 8])
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(pretrain_diffusion.SEED)).double()
    for now, then in [(999, 499), (499, None)]:
        time = torch.full((2,), now)
        told, nothing = (
            model(x.float(), time, class_labels=c).sample.double() for c in (labels, torch.tensor([10, 10]))
        )
        noise = 2.5 * told - 1.5 * nothing
        kept, left = KEPT[now], KEPT[then] if then else torch.tensor(1.0)
        clean = ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
        noise = (x - kept.sqrt() * clean) / (1 - kept).sqrt()
        x = left.sqrt() * clean + (1 - left).sqrt() * noise
    assert torch.allclose(pretrain_diffusion.drawn(model, labels, 2.5, steps=2).double(), x.clamp(-1, 1), atol=1e-4)


def test_some_labels_are_dropped_and_the_noise_is_what_is_told():
    made = list(pretrain_diffusion.batches(40))
    labels = torch.cat([each["labels"] for each in made])
    assert set(labels.tolist()) == set(range(11))
    assert float((labels == pretrain_diffusion.NO_CLASS).float().mean()) == pytest.approx(0.15, abs=0.03)
    kept = KEPT[made[0]["timesteps"]][:, None, None, None]
    clean = (made[0]["noised"].double() - (1 - kept).sqrt() * made[0]["noise"]) / kept.sqrt()
    early = made[0]["timesteps"] < 500
    shades = (clean[early] + 1) * 8
    assert (shades - shades.round()).abs().max() < 0.05 and 0 <= shades.round().min() < shades.round().max() <= 16


def test_pretraining_is_bit_identical_and_makes_the_shipped_files(one_thread, tmp_path):
    for name in ("first", "second"):
        pretrain_diffusion.save(pretrain_diffusion.fit(steps=2), tmp_path / name)
    files = [file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*") if file.is_file()]
    first, second = ({str(f): (tmp_path / n / f).read_bytes() for f in files} for n in ("first", "second"))
    assert WEIGHTS in first and first == second
    for name in set(first) - {WEIGHTS}:
        assert first[name] == (MODEL / name).read_bytes()
