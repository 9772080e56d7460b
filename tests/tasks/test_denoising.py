"""Diffusion end to end: losses and gradients by diffusers' own parts, the same bits after a kill, pictures, LoRAs that
plain pipelines load."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import mse_loss

from lorabench.config.decode import InputError
from lorabench.data.noise import Noising
from lorabench.launch import plan
from lorabench.models import denoisers
from lorabench.models.base_model import load_base
from lorabench.store.pictures import read_sheet
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.examples import collate, prepare
from lorabench.training.execute import Options, execute
from lorabench.training.passes import forward
from lorabench.training.stop import Stop, Stopped
from lorabench.updates.formats import read_updates
from tests.conftest import make_spec
from tests.pipelines import MAKERS

QUIET = Options(device="cpu", log_to_file=False)
CPU = torch.device("cpu")
DIGITS = {
    "name": "denoising", "data": "builtin:digits-outlined", "condition": "label", "max_train": 24, "max_eval": 6,
    "eval_times": 4,
}  # fmt: skip
TINY = {"model": "builtin:tiny-diffusion", "batch_size": 4, "steps": 5, "lr": 1e-3}
LORA = {"name": "lora", "rank": 2, "targets": "attention"}
GUIDANCE = 2.0


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folder of a tiny pipeline by its kind, each made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = MAKERS[kind](tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def dogs(tmp_path_factory) -> str:
    """Photos of 30 × 20 pixels with texts."""
    folder, draw = tmp_path_factory.mktemp("dogs"), np.random.default_rng(0)
    for split, count in {"train": 5, "validation": 2}.items():
        rows = []
        for number in range(count):
            Image.fromarray(draw.integers(0, 255, (20, 30, 3), np.uint8)).save(folder / f"{split}{number}.png")
            rows.append({"image": f"{split}{number}.png", "text": f"dog {number}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def run(folder: Path, task: dict, **changes) -> tuple:
    spec, store = make_spec(task=DIGITS | task, **(TINY | {"method": LORA} | changes)), Store(folder)
    assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return spec, store.read(spec.id), store.folder(spec.id)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_is_put_on_as_by_diffusers(prediction):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    x, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, t in enumerate([0, 10, 500, 999]):
        given, wanted = Noising.of(scheduler).noisy(x[row].numpy(), noise[row].numpy(), t)
        place = torch.tensor([t])
        target = {"epsilon": noise[row], "sample": x[row],
                  "v_prediction": scheduler.get_velocity(x[row : row + 1], noise[row : row + 1], place)[0]}  # fmt: skip
        assert given == pytest.approx(scheduler.add_noise(x[row], noise[row], place).numpy(), abs=1e-5)
        assert wanted == pytest.approx(target[prediction].numpy(), abs=1e-5)


def test_flow_goes_straight_from_noise_to_image():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    noising, (x, noise) = Noising.of(scheduler), np.random.default_rng(0).normal(size=(2, 5))
    for u in (0.0, 0.3, 0.999):
        t = noising.place(u)
        given, wanted = noising.noisy(x, noise, t)
        time = scheduler.timesteps[t]
        assert noising.times[t] == time
        there = scheduler.scale_noise(torch.from_numpy(x)[None], time[None], torch.from_numpy(noise)[None])
        assert given == pytest.approx(there[0].numpy(), abs=1e-6)
        assert given - noising.kept[t] * wanted == pytest.approx(x, abs=1e-6)  # Euler's last step, all at once


@pytest.mark.parametrize("kind", ["tiny", *MAKERS])
def test_loss_and_gradient_of_a_step_are_diffusers_own(kind, pipelines, dogs):
    """From the noise that the examples tell, by the pipeline's scheduler and denoiser, called as its examples do."""
    task = DIGITS if kind == "tiny" else DIGITS | {"data": dogs, "condition": "text", "prompt": "a photo of {}"}
    source = TINY["model"] if kind == "tiny" else str(pipelines(kind))
    small = {"flux": {"resolution": 16}}.get(kind, {})
    spec = make_spec(task=task | small, **TINY | {"model": source, "method": {"name": "full"}})
    examples = prepare(spec)
    rows = [spec.task.varied(row, (7, place)) for place, row in enumerate(examples.splits["train"][:3])]
    batch, model = collate(rows, 0, CPU), load_base(spec, CPU, {}).train()
    loss = spec.task.loss(forward(model, batch), batch) / spec.task.count(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    by_hand(model, rows).backward()
    assert loss.item() == pytest.approx(by_hand(model, rows).item(), rel=1e-5)
    norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6 * norm), name


def by_hand(model: nn.Module, rows: list[dict]) -> torch.Tensor:
    """What diffusers' training examples compute: each image by itself, and the mean."""
    losses = []
    for row in rows:
        noisy, target = (torch.from_numpy(each)[None] for each in (row["pixel_values"].values, row["labels"]))
        t = torch.tensor([row["timestep"]])
        told = {key: torch.from_numpy(np.asarray(row[key]))[None] for key in denoisers.CONDITIONS if key in row}
        match type(model).__name__:
            case "UNet2DModel":
                found = model(noisy, t, class_labels=told["class_labels"]).sample
            case "UNet2DConditionModel":
                texts = told.pop("encoder_hidden_states")
                found = model(noisy, t, texts, added_cond_kwargs=told or None).sample
            case "SD3Transformer2DModel":
                found = model(noisy, told["encoder_hidden_states"], told["pooled_projections"], t).sample
            case _:
                from diffusers import FluxPipeline

                height, width = noisy.shape[2:]
                ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, CPU, torch.float32)
                packed = FluxPipeline._pack_latents(noisy, 1, noisy.shape[1], height, width)
                out = model(
                    packed, told["encoder_hidden_states"], told["pooled_projections"], t / 1000, ids,
                    torch.zeros(told["encoder_hidden_states"].shape[1], 3), torch.full((1,), 3.5),
                ).sample  # fmt: skip
                found = FluxPipeline._unpack_latents(out, height * 2, width * 2, 2)
        losses.append(mse_loss(found, target))
    return torch.stack(losses).mean()


def test_what_an_example_tells_is_what_was_done_to_its_image(pipelines, dogs):
    """Clean latent, noise and timestep fit the pipeline's scheduler; the latent is the autoencoder's, within its
    deviation; another step's numbers give other noise, the same ones the same."""
    from diffusers import AutoencoderKL, PNDMScheduler

    folder = pipelines("stable_diffusion")
    task = DIGITS | {"data": dogs, "condition": "text"}
    spec = make_spec(task=task, method=LORA, **TINY | {"model": str(folder)})
    row = prepare(spec).splits["train"][0]
    held = row["pixel_values"]
    picture = Image.open(Path(dogs) / "train0.png").resize((24, 16), Image.Resampling.BILINEAR).crop((4, 0, 20, 16))
    pixels = torch.from_numpy(np.asarray(picture).transpose(2, 0, 1) / np.float32(127.5) - 1)[None]
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        found = vae.encode(pixels).latent_dist
    assert held.clean == pytest.approx((found.mean * vae.config.scaling_factor)[0].numpy(), abs=1e-5)
    assert held.spread == pytest.approx((found.std * vae.config.scaling_factor)[0].numpy(), abs=1e-5)
    scheduler, first = PNDMScheduler.from_pretrained(folder / "scheduler"), spec.task.varied(row, (0, 1))
    kept = float(scheduler.alphas_cumprod[int(first["timestep"])])
    latent = (first["pixel_values"].values - (1 - kept) ** 0.5 * first["labels"]) / kept**0.5
    drawn = (latent - held.clean) / held.spread
    assert abs(drawn.mean()) < 0.3 and 0.8 < drawn.std() < 1.2
    again, other = spec.task.varied(row, (0, 1)), spec.task.varied(row, (0, 2))
    assert (again["labels"] == first["labels"]).all() and again["timestep"] == first["timestep"]
    assert not (other["labels"] == first["labels"]).any()


def test_held_out_images_are_evaluated_at_the_same_times_with_the_same_noise(tmp_path):
    spec, record, _ = run(tmp_path, {}, steps=1, lr=1e-12)
    rows = prepare(spec).splits["validation"]
    assert len(rows) == 6 * 4
    assert (
        [row["timestep"] for row in rows[:4]] == [125.0, 375.0, 625.0, 875.0] == [row["timestep"] for row in rows[4:8]]
    )
    assert record.measures["valid_loss"] == pytest.approx(record.measures["base_valid_loss"], rel=1e-6)
    batch, model = collate(rows, 0, CPU), load_base(spec, CPU, {}).eval()
    with torch.no_grad():
        found = model(batch["pixel_values"], batch["timestep"], class_labels=batch["class_labels"]).sample
    assert record.measures["valid_loss"] == pytest.approx(float(mse_loss(found, batch["labels"])), rel=1e-5)


def test_a_prior_counts_by_its_weight_beside_the_subject(dogs, pipelines):
    own = {"data": dogs, "condition": "text", "prior": dogs, "prior_prompt": "a dog", "prior_weight": 0.25}
    spec = make_spec(task=DIGITS | own, method=LORA, **TINY | {"model": str(pipelines("stable_diffusion"))})
    splits = prepare(spec).splits
    rows = [row for place in (0, 1) for row in spec.task.step_rows(splits, place, (0, place))]
    batch, model = collate(rows, 0, CPU), load_base(spec, CPU, {}).eval()
    subject, prior = rows[::2], rows[1::2]
    assert spec.task.count(batch) == 2
    assert not np.allclose(subject[0]["encoder_hidden_states"], prior[0]["encoder_hidden_states"])
    assert np.allclose(prior[0]["encoder_hidden_states"], prior[1]["encoder_hidden_states"])
    with torch.no_grad():
        loss = float(spec.task.loss(forward(model, batch), batch)) / 2
        apart = float(by_hand(model, subject)) + 0.25 * float(by_hand(model, prior))
    assert loss == pytest.approx(apart, rel=1e-5)


def test_a_run_that_was_stopped_ends_in_the_same_bits_and_pictures(tmp_path, monkeypatch):
    pictures = {"each": 1, "steps": 2, "prompts": ["3"], "unrelated": ["7"], "classifier": "builtin:tiny-vit"}
    _, whole, folder = run(tmp_path / "whole", {"pictures": pictures, "retain": "builtin:digits-16"})
    spec = make_spec(task=DIGITS | {"pictures": pictures, "retain": "builtin:digits-16"}, method=LORA, **TINY)
    store, looks = Store(tmp_path / "stopped"), iter(range(1000))

    def check(self):
        if next(looks) == 15:
            raise Stopped("SIGTERM")

    monkeypatch.setattr(Stop, "check", check)
    assert execute(spec, store, QUIET) == Status.CANCELLED
    monkeypatch.undo()
    assert execute(spec, store, QUIET) == Status.DONE
    record = store.read(spec.id)
    assert 0 < record.resumed_from_step < spec.steps and record.files == whole.files
    assert [row["loss"] for row in log(store.folder(spec.id))] == [row["loss"] for row in log(folder)]
    assert record.pictures_sha256 == whole.pictures_sha256 and record.digests["pictures.png"] == record.pictures_sha256
    names = ["picture_similarity", "picture_drift", "picture_accuracy", "base_picture_accuracy", "train_similarity"]
    assert {name: record.measures[name] for name in names} == {name: whole.measures[name] for name in names}
    assert record.measures["draw_seconds"] > 0 and "draw_peak_gib" in record.measures
    assert record.measures["forgetting"] == pytest.approx(
        record.measures["retain_loss_after"] - record.measures["retain_loss_before"]
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_a_plain_pipeline_draws_the_same_with_the_adapter_that_was_saved(kind, tmp_path, pipelines, dogs):
    """By `load_lora_weights`, and by PEFT on the denoiser."""
    from diffusers import DiffusionPipeline
    from peft import PeftModel

    folder = pipelines(kind)
    pictures = {"prompts": ["a photo of dog 1"], "unrelated": ["a cat"], "each": 2, "steps": 3}
    task = {"data": dogs, "condition": "text", "prompt": "a photo of {}", "pictures": pictures, "resolution": 16}
    spec, _, own = run(tmp_path, task, model=str(folder), lr=0.05, method=LORA | {"targets": "all-linear"})
    sheet = read_sheet(own / "pictures.png")
    assert sheet.prompts == ("a photo of dog 1",) * 2 + ("a cat",) * 2 and sheet.unrelated == ("a cat",)

    def drawn(pipeline) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 0, 1)]
        found = pipeline([*sheet.prompts], height=16, width=16, num_inference_steps=3, guidance_scale=GUIDANCE,
                         generator=generators, output_type="np").images  # fmt: skip
        return np.rint(found * 255).astype(int)

    part = "unet" if kind in ("stable_diffusion", "sdxl") else "transformer"
    plain = DiffusionPipeline.from_pretrained(folder)
    assert np.abs(drawn(plain) - sheet.base).max() <= 1
    assert np.abs(sheet.base.astype(int) - sheet.tuned).max() > 3
    plain.load_lora_weights(own / "updates")
    assert np.abs(drawn(plain) - sheet.tuned).max() <= 1
    again = DiffusionPipeline.from_pretrained(folder)
    setattr(again, part, PeftModel.from_pretrained(getattr(again, part), own / "updates").get_base_model())
    assert np.abs(drawn(again) - sheet.tuned).max() <= 1
    assert {update.parameter for update in read_updates(own / "updates")} == {
        f"{name}.weight" for name, module in load_base(spec, CPU, {}).named_modules() if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_denoiser_is_trained_on_quantized_weights(tmp_path, quantization):
    _, record, _ = run(tmp_path, {}, quantization=quantization, steps=2)
    assert record.measures["model_gib"] < 0.9 * run(tmp_path, {}, steps=2)[1].measures["model_gib"]
    assert 0 < record.measures["base_valid_loss"] < 1 and quantization in record.provenance["quantization"]


REFUSED = {
    "class 12": ({"pictures": {"prompts": ["12"]}}, 'task.pictures.prompts = "12": says "12"; the denoiser'),
    "no class": ({"condition": None}, "says nothing; the denoiser is told a class's number, 0 to 10"),
    "encoder": ({"pictures": {"encoder": "builtin:none"}}, 'task.pictures.encoder = "builtin:none"'),
    "block": ({"pictures": {"encoder_block": 5}}, "task.pictures.encoder_block = 5: must be 1 to 4"),
    "prior prompt": ({"prior_prompt": "a dog"}, "task.prior_prompt"),
    "twice": ({"pictures": {"prompts": ["1"], "unrelated": ["1"]}}, "is among the prompts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_denoiser_cannot_do_is_told_before_anything_starts(case):
    change, message = REFUSED[case]
    try:
        problems = plan.refusals([make_spec(task=DIGITS | change, method=LORA, **TINY)])
    except (InputError, ValueError) as error:
        problems = [str(error)]
    assert problems and message in problems[0]


@pytest.mark.parametrize("gone, says", [
    ("unet", "names unet"), ("vae", "names vae"), ("tokenizer", "names tokenizer"),
    ("unet/diffusion_pytorch_model.safetensors", "unet has no weights"),
    ("text_encoder/model.safetensors", "text_encoder has no weights"),
])  # fmt: skip
def test_a_part_that_a_pipeline_lacks_is_told_before_anything_starts(pipelines, dogs, tmp_path, gone, says):
    shutil.copytree(pipelines("stable_diffusion"), folder := tmp_path / "pipeline")
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    task = {"name": "denoising", "data": dogs, "condition": "text"}
    with pytest.raises(InputError, match=says):
        make_spec(task=task).task.checks_with(str(folder), None)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_a_torn_part_of_a_pipeline_is_told_before_anything_starts(pipelines, dogs, tmp_path, part):
    shutil.copytree(pipelines("stable_diffusion"), folder := tmp_path / "pipeline")
    file = folder / f"{part}.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    task = {"name": "denoising", "data": dogs, "condition": "text"}
    with pytest.raises(InputError, match=rf"{part}\.safetensors: not a whole safetensors file"):
        make_spec(task=task).task.checks_with(str(folder), None)


def test_methods_without_a_place_in_a_denoiser_are_refused_with_the_reason():
    for method, message in {"prefix": "reads images", "adapter": "Denoiser", "head": "head"}.items():
        try:
            problems = plan.refusals([make_spec(task=DIGITS, method={"name": method}, **TINY)])
        except InputError as error:
            problems = error.problems
        assert problems and message.lower() in problems[0].lower(), (method, problems)


def test_a_model_that_is_no_pipeline_is_refused():
    (problem,) = plan.refusals([make_spec(task=DIGITS, method=LORA, **TINY | {"model": "builtin:tiny-vit"})])
    assert "model_index.json" in problem
    (problem,) = plan.refusals([make_spec(method=LORA, model="builtin:tiny-diffusion")])
    assert "tiny-diffusion" in problem and "denoising" in problem


def test_without_diffusers_it_is_told_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    problems = plan.refusals([make_spec(task=DIGITS | {"max_train": 23}, method=LORA, **TINY)])
    assert problems and 'pipelines of diffusers need `pip install "lorabench[vision]"`' in problems[0]
