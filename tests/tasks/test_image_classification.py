"""Images end to end: the same as a plain loop over transformers, the same bits after a kill, several sets, folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ResNetConfig

from lorabench.config.decode import InputError
from lorabench.data.builtin.collect import HERE
from lorabench.data.dataset import read_data
from lorabench.launch import plan
from lorabench.models.base_model import load_image_processor
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.examples import Order
from lorabench.training.execute import Options, execute
from lorabench.training.stop import Stop, Stopped
from tests.conftest import make_spec

QUIET = Options(device="cpu", log_to_file=False)
TASK = {"name": "image_classification", "data": "builtin:digits-turned", "max_train": 48, "max_eval": 40}
VIT = {"model": "builtin:tiny-vit", "batch_size": 8, "steps": 6, "lr": 1e-3}
MOVED = {"flip": 0.5, "shift": 0.1, "rotate": 10.0, "crop": 0.2, "noise": 0.05}


def run(folder: Path, task: dict, **changes) -> tuple:
    spec, store = make_spec(task=TASK | task, **(VIT | changes)), Store(folder)
    assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return spec, store.read(spec.id), store.folder(spec.id)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def seen(name: str, split: str, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels as the model's processor gives them, and classes."""
    rows = read_data(f"builtin:{name}").splits[split][:most]
    full = [np.repeat(np.array(row["image"], np.uint8)[:, :, None], 3, 2) for row in rows]
    made = load_image_processor("builtin:tiny-vit")(full, return_tensors="pt", input_data_format="channels_last")
    return made["pixel_values"], torch.tensor([row["label"] for row in rows])


def test_full_fine_tuning_is_a_plain_loop_over_transformers(tmp_path):
    """Losses step by step, and accuracy and loss on every set: by AdamW, clipping and a linear schedule, by hand."""
    task = {"retain": {"upright": {"name": "image_classification", "data": "builtin:digits", "max_eval": 40}}}
    spec, record, folder = run(tmp_path, task, method={"name": "full"}, warmup=0.0)
    model = AutoModelForImageClassification.from_pretrained(HERE / "tiny-vit", dtype=torch.float32).train()
    images, labels = seen("digits-turned", "train", 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, weight_decay=0.0)
    order, losses = Order(48, 8, spec.seed), []
    for step in range(6):
        optimizer.param_groups[0]["lr"] = spec.lr * (1 - step / 6)
        rows = order.indices(step)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images[rows]).logits, labels[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [row["loss"] for row in log(folder)] == pytest.approx(losses, rel=1e-4)
    model.eval()
    sets = {"valid": ("digits-turned", "validation"), "test": ("digits-turned", "test")}
    for key, part in (sets | {"retain_upright": ("digits", "validation")}).items():
        images, labels = seen(*part, 40)
        with torch.no_grad():
            logits = model(pixel_values=images).logits
        after = "_after" if key.startswith("retain") else ""
        right = float((logits.argmax(-1) == labels).float().mean())
        assert record.measures[f"{key}_accuracy{after}"] == pytest.approx(right, abs=1e-6)
        loss = float(torch.nn.functional.cross_entropy(logits, labels))
        assert record.measures[f"{key}_loss{after}"] == pytest.approx(loss, rel=1e-4)
    assert record.measures["retain_upright_accuracy_before"] > 0.9
    assert record.measures["images_per_second"] > 0 and "tokens_per_second" not in record.measures
    assert record.measures["flops_per_step"] > 0


def test_a_run_that_was_stopped_sees_the_same_images_again(tmp_path, monkeypatch):
    method = {"name": "lora", "rank": 2}
    _, whole, folder = run(tmp_path / "whole", MOVED, method=method)
    _, still, _ = run(tmp_path / "still", {}, method=method)
    assert whole.measures["train_loss"] != still.measures["train_loss"]
    spec, store = make_spec(task=TASK | MOVED, method=method, **VIT), Store(tmp_path / "stopped")
    looks = iter(range(100))

    def check(self):
        if next(looks) == 8:  # after five batches of validation and some steps
            raise Stopped("SIGTERM")

    monkeypatch.setattr(Stop, "check", check)
    assert execute(spec, store, QUIET) == Status.CANCELLED
    monkeypatch.undo()
    assert execute(spec, store, QUIET) == Status.DONE
    record = store.read(spec.id)
    assert 0 < record.resumed_from_step < spec.steps and record.files == whole.files
    assert [row["loss"] for row in log(store.folder(spec.id))] == [row["loss"] for row in log(folder)]


def test_a_torn_image_is_told_by_its_file_before_anything_starts(tmp_path):
    for number in range(24):
        (tmp_path / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        file = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        Image.fromarray(np.full((9, 7, 3), 10 * number, np.uint8)).save(file)
    task = {"data": str(tmp_path / "data"), "retain": None}
    assert plan.refusals([make_spec(task=TASK | task, method={"name": "head"}, **VIT)]) == []
    file.write_bytes(file.read_bytes()[:45])
    (problem,) = plan.refusals([make_spec(task=TASK | task | {"flip": 0.5}, method={"name": "head"}, **VIT)])
    assert "b/23.png: cannot be read" in problem and "task.image" in problem


def test_what_normalizes_by_batch_is_refused(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ResNetForImageClassification normalizes by batch"):
        plan.count(make_spec(task=TASK, method={"name": "full"}, **VIT | {"model": str(tmp_path)}))
