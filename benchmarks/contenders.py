"""The three training loops that `training.py` holds against each other, and what each is given."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from relay import Stopwatch
from torch import nn

from lorabench.data.images import Pixels
from lorabench.models.base_model import load_base, load_tokenizer
from lorabench.models.flat import attend_by_example
from lorabench.spec.run_spec import RunSpec
from lorabench.store import claim
from lorabench.store.steps import StepLog
from lorabench.training import meter as meters
from lorabench.training.base import Base
from lorabench.training.examples import Examples, Order
from lorabench.training.loop import FLUSH_EVERY, Saves, train
from lorabench.training.passes import base_of
from lorabench.training.state import Training, make_optimizer
from lorabench.training.step import alone
from lorabench.training.stop import Stop

LOG_EVERY = FLUSH_EVERY
"""Steps between two looks at the loss, of each contender: lorabench's own habit."""


@dataclass
class Race:
    """What every contender is given, and the losses that it must fill in."""

    spec: RunSpec
    examples: Examples
    watch: Stopwatch
    losses: list[Any] = field(default_factory=list)
    """One a step; tensors are read after the clock has stopped."""
    other_peak: int = 0
    """Bytes of the peak that the contender's own measuring saw, which resets the counter on the way."""

    def model(self) -> nn.Module:
        torch.manual_seed(self.spec.seed)
        base = load_base(self.spec, self.watch.device, self.examples.model_options)
        return self.spec.method.attach(base, self.spec)

    def rows(self) -> list[dict[str, Any]]:
        """The training examples in the order in which lorabench visits them; images as the model sees them."""
        rows = self.examples.splits["train"]
        order = Order(len(rows), self.spec.batch_size, self.spec.seed)
        visited = [rows[i] for step in range(self.spec.steps) for i in order.indices(step)]
        return [{key: _plain(value) for key, value in row.items()} for row in visited]

    def collator(self) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
        """What makes a batch of rows; where they differ in length, the one that pads labels too."""
        from transformers import DataCollatorForSeq2Seq, default_data_collator

        if self.spec.task.name != "completion":
            return default_data_collator
        return DataCollatorForSeq2Seq(load_tokenizer(self.spec.model))


def _plain(value: Any) -> Any:
    return value.seen() if isinstance(value, Pixels) else getattr(value, "tolist", lambda: value)()


class TickingLog(StepLog):
    """The run's own step log, which the loop asks at the end of each step whether a checkpoint is due."""

    watch: Stopwatch

    def checkpoint_due(self) -> bool:
        self.watch.tick()
        return super().checkpoint_due()


def run_lorabench(race: Race) -> None:
    model, meter = race.model(), meters.Meter(race.watch.device, race.spec.steps)
    if race.spec.padding == "free":
        attend_by_example(base_of(model))
    base = Base(spec=race.spec, stages=[race.examples], device=meter.device)
    training = Training(race.spec, base, model, make_optimizer(race.spec, model), meter)
    with tempfile.TemporaryDirectory() as folder:
        hold = claim.take(Path(folder))
        assert hold is not None
        log = TickingLog(Path(folder) / "steps.jsonl", training.log, math.inf)
        log.watch = race.watch
        saves = Saves(checkpoint=lambda: None, snapshot=lambda: None, due=log.checkpoint_due)
        with hold:
            alone(train(training, log, Stop(), saves, hold))
    race.losses = training.losses
    baseline = 0 if race.watch.device.type == "cuda" else meter.baseline_gib
    race.other_peak = int((meter.memory()[0]["peak_gib"] + baseline) * meters.GIB)


def run_plain(race: Race) -> None:
    """The loop that people write."""
    from torch.utils.data import DataLoader
    from transformers import get_linear_schedule_with_warmup

    spec, device, model = race.spec, race.watch.device, race.model()
    rows: Any = race.rows()
    loader: Any = DataLoader(rows, batch_size=spec.batch_size, collate_fn=race.collator())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, spec.steps)
    model.train()
    for step, batch in enumerate(loader, 1):
        batch = {key: tensor.to(device) for key, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        race.losses.append(loss.detach())
        if step % LOG_EVERY == 0:
            loss.item()
        race.watch.tick()


def run_trainer(race: Race) -> None:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    spec = race.spec

    class Ticking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            race.watch.tick()

    class Noting(Trainer):
        def training_step(self, *inputs: Any, **options: Any) -> torch.Tensor:
            race.losses.append(super().training_step(*inputs, **options))
            return race.losses[-1]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.lr,
            lr_scheduler_type="linear",
            weight_decay=spec.weight_decay,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=spec.dtype == "bfloat16",
            use_cpu=race.watch.device.type == "cpu",
            train_sampling_strategy="sequential",
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        arguments._n_gpu = min(1, arguments.n_gpu)  # of several GPUs it would take all
        data: dict[str, Any] = {"train_dataset": race.rows(), "data_collator": race.collator()}
        trainer = Noting(race.model(), arguments, callbacks=[Ticking()], **data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def run_dreambooth(race: Race) -> None:
    """The loop of diffusers' DreamBooth example, with latents and embeddings made beforehand as its options have it."""
    from transformers import get_linear_schedule_with_warmup

    from lorabench.models.base_model import pipeline_folder
    from lorabench.models.denoisers import CONDITIONS, predict
    from lorabench.models.latents import scheduler as scheduler_of

    spec, device, model = race.spec, race.watch.device, race.model()
    noising: Any = scheduler_of(pipeline_folder(spec.model, spec.revision), spec.model)
    rows = race.examples.splits["train"]
    latents = torch.stack([torch.from_numpy(row["pixel_values"].clean) for row in rows])
    told = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in CONDITIONS if key in rows[0]}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, spec.steps)
    order = Order(len(rows), spec.batch_size, spec.seed)
    model.train()
    for step in range(1, spec.steps + 1):
        chosen = order.indices(step - 1)
        clean, conditions = latents[chosen].to(device), {key: each[chosen].to(device) for key, each in told.items()}
        noise = torch.randn_like(clean)
        times = torch.randint(0, noising.config.num_train_timesteps, (len(clean),), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            found = predict(model, noising.add_noise(clean, noise, times), times, conditions)
        loss = nn.functional.mse_loss(found.float(), noise, reduction="mean")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        race.losses.append(loss.detach())
        if step % LOG_EVERY == 0:
            loss.item()
        race.watch.tick()


CONTENDERS: dict[str, Callable[[Race], None]] = {
    "lorabench": run_lorabench,
    "plain": run_plain,
    "trainer": run_trainer,
}
DENOISERS: dict[str, Callable[[Race], None]] = {"lorabench": run_lorabench, "dreambooth": run_dreambooth}
"""The contenders where a diffusion model is trained."""


@torch.no_grad()
def untrained_losses(race: Race) -> list[float]:
    """The loss of each step's batch by the model as it was: what training must have brought down."""
    model, rows, size, collate = race.model().eval(), race.rows(), race.spec.batch_size, race.collator()
    losses = []
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size])
        losses.append(float(model(**{key: tensor.to(race.watch.device) for key, tensor in batch.items()}).loss))
    return losses


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """What the process holds, after giving back what is free, so that none of it is reused unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _memory("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The highest since the last reset: allocated on CUDA, else resident."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _memory("VmHWM")


def _memory(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"{key} is not in /proc/self/status"
    return int(found[1]) * 1024
