"""Train the built-in tiny-vit from nothing on digits: `python -m lorabench.data.builtin.pretrain_vit`.

It reads upright digits, bright on black, a little shifted, turned and noisy each time. Those of `digits-turned` it does
not know: to learn them is what tuning is tried on, and what becomes of the upright ones is what it forgets.
"""

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.models.vit.modeling_vit import ViTForImageClassification

from lorabench.data.builtin.pretrain import SEED, command, train
from lorabench.data.dataset import read_data

STEPS = 1500
BATCH = 64
LR = 1e-3
SIZE, PATCH = 8, 2
SHIFT = 1
NOISE = 12.0


def new_model() -> ViTForImageClassification:
    """0.54 million parameters. Each matrix's sides but the head's are multiples of 32, so that blocks of 4-bit
    quantization fit; no dropout."""
    names = {number: str(number) for number in range(10)}
    config = ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    return ViTForImageClassification(config)


def processor() -> ViTImageProcessorPil:
    """To 8 × 8 pixels from -1 to 1, three channels."""
    return ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_convert_rgb=True)


def images(split: str, name: str = "digits") -> tuple[Tensor, Tensor]:
    """(n, 8, 8), or as large as `name` holds them, from 0 to 255, and classes (n,)."""
    rows = read_data(f"builtin:{name}").splits[split]
    values = np.array([row["image"] for row in rows], np.float32)
    return torch.from_numpy(values), torch.tensor([row["label"] for row in rows])


def seen(values: Tensor) -> Tensor:
    """(n, 3, 8, 8) as `processor` makes them."""
    return (values.clamp(0, 255) / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def shifted(values: Tensor, generator: torch.Generator) -> Tensor:
    """Each by at most SHIFT pixels, what comes in from the sides black."""
    padded, size = torch.nn.functional.pad(values, (SHIFT,) * 4), values.shape[-1]
    tops, lefts = torch.randint(2 * SHIFT + 1, (2, len(values)), generator=generator).tolist()
    cut = [each[top : top + size, left : left + size] for each, top, left in zip(padded, tops, lefts, strict=True)]
    return torch.stack(cut)


def varied(values: Tensor, generator: torch.Generator) -> Tensor:
    """Each shifted, and with normal noise."""
    return shifted(values, generator) + NOISE * torch.randn(values.shape, generator=generator)


def batches(steps: int) -> Iterator[dict[str, Tensor]]:
    values, labels = images("train")
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        chosen = torch.randint(len(values), (BATCH,), generator=generator)
        yield {"pixel_values": seen(varied(values[chosen], generator)), "labels": labels[chosen]}


@torch.no_grad()
def scores(model: ViTForImageClassification, split: str, name: str = "digits") -> dict[str, float]:
    """Mean cross-entropy in nats, and the share that is told right."""
    model.eval()
    values, labels = images(split, name)
    found = model(pixel_values=seen(values), labels=labels)
    return {"loss": found.loss.item(), "accuracy": float((found.logits.argmax(-1) == labels).float().mean())}


def fit(steps: int) -> ViTForImageClassification:
    torch.manual_seed(SEED)
    model = new_model()
    print(f"{model.num_parameters()} parameters")
    train(model, batches(steps), steps, lambda: scores(model, "validation")["loss"], LR)
    return model


def save(model: ViTForImageClassification, out: Path) -> None:
    """An ordinary Hugging Face folder, with its image processor."""
    processor().save_pretrained(out)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors makes its file private to its owner


def pretrain(out: Path, steps: int) -> None:
    """Train, save in bfloat16, half the bytes, and record under `out` what the saved weights give."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    model = fit(steps)
    seconds = time.perf_counter() - started
    save(model.bfloat16(), out)
    parts = [("digits", "validation"), ("digits", "test"), ("digits-turned", "test")]
    found = {"/".join(part): scores(model.float(), part[1], part[0]) for part in parts}
    record = {
        "seed": SEED,
        "steps": steps,
        "images": steps * BATCH,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "losses": {name: round(each["loss"], 5) for name, each in found.items()},
        "accuracies": {name: round(each["accuracy"], 4) for name, each in found.items()},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    command(__doc__ or "", "tiny-vit", STEPS, pretrain)
