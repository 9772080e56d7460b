"""One run, from spec to record: `execute` is what a worker calls, `train` is the loop."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabench import meter as meters
from lorabench import ranks, sharding
from lorabench.claim import Hold
from lorabench.distributed import ALONE, Gradients, World, is_sharded, whole
from lorabench.examples import RETAIN, Batch, Examples, Order, collate
from lorabench.spec import RunSpec
from lorabench.steps import StepLog
from lorabench.task import Example

CPU = torch.device("cpu")  # where batches are made and counted: to count on a GPU would wait for it
FLUSH_EVERY = 10
"""Steps between two looks at the loss: each makes a GPU wait."""
MARKER_SECONDS = 3.0
"""Between two looks for a file: a shared file system is asked over the network."""


class Stopped(Exception):
    """Somebody asked the run to stop; its state is in the checkpoint."""


class Diverged(Exception):
    """The loss or the gradient became NaN or infinite."""


@dataclass
class Stop:
    """Why the run should end at the next step: None to go on."""

    reason: str | None = None
    deadline: float | None = None
    """On time.monotonic's clock."""
    marker: Path | None = None
    """A file that `lorabench cancel` makes: the run ends once it is there."""
    looked: float = -math.inf
    world: World = ALONE

    def check(self) -> None:
        """Raises Stopped, on all ranks at once where there are several."""
        self._look_for_marker()
        if self.deadline is not None and time.monotonic() > self.deadline and self.reason is None:
            self.reason = "timeout"
        if self.world.any(self.reason is not None):
            reasons = filter(None, self.world.gather(self.reason))
            self.reason = next(reasons)
            raise Stopped(self.reason)

    def _look_for_marker(self) -> None:
        now = time.monotonic()
        if self.marker is None or now < self.looked + MARKER_SECONDS:
            return
        self.looked = now
        if self.reason is None and self.marker.exists():
            self.reason = "lorabench cancel"


@dataclass
class Training:
    """A run's own state, apart from the base model it rides on: all that a checkpoint holds."""

    spec: RunSpec
    model: nn.Module
    optimizer: torch.optim.Optimizer
    meter: meters.Meter
    world: World = ALONE
    stage: int = 0
    """Which of the run's tasks is being trained: 0, 1, …"""
    step: int = 0
    """Optimizer steps done, over all tasks."""
    evaluated: int = 0
    """The step of the last periodic evaluation."""
    losses: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[list[dict[str, float]]] = field(default_factory=list)
    """Validation metrics of every task: before training, and after each task that is done."""
    content: dict[str, Any] = field(default_factory=dict)
    """Fingerprints of the base and the data: a checkpoint goes on with the same ones or not at all."""
    snapshots: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files of the snapshots kept so far, by path below the run's folder."""

    sizes: set[int] = field(default_factory=set)
    """Numbers of ranks that took the steps before it was stopped."""

    @property
    def task_step(self) -> int:
        """Optimizer steps done on the task being trained."""
        return self.step - self.stage * self.spec.steps

    def idle_passes(self, passes: int, micro: int) -> int:
        """Over shared-out weights all ranks compute at once: how often one with a smaller share goes through idly."""
        largest = -(-self.spec.batch_size // self.world.size)
        return -(-largest // micro) - passes if self.world.is_sharded else 0

    def next_task(self) -> None:
        """Go on to the next task with the weights as they are and a fresh optimizer."""
        self.stage += 1
        self.evaluated = self.step
        self.optimizer = make_optimizer(self.spec, self.model)

    def save(self, file: Path) -> None:
        """Write the checkpoint whole or not at all; called by all ranks, and written by the first."""
        device, tells = self.meter.device, ranks.tells_energy(self.meter, self.world)
        measured = {"random": random_state(device), "meter": self.meter.state, "tells_energy": tells}
        own, *others = self.world.gather(measured)
        trained = self.spec.method.trained_state(self.model)
        if any(map(is_sharded, trained.values())):
            tensors = sharding.write_shares(trained, self.optimizer, file.parent, self.world)
        else:
            tensors = {"model": {k: v.cpu() for k, v in trained.items()}, "optimizer": self.optimizer.state_dict()}
        if not self.world.is_first:
            return
        state = {
            "stage": self.stage,
            "step": self.step,
            "evaluated": self.evaluated,
            "content": self.content,
            "losses": self.losses,
            "metrics": self.metrics,
            "rows": self.rows,
            "snapshots": self.snapshots,
            "others": others,
            "sizes": sorted(self.sizes | {self.world.size}),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        with open(temporary, "wb") as handle:
            torch.save(state | own | tensors, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
        sharding.drop_shares(file.parent, tensors.get("shares"))

    def load(self, file: Path) -> None:
        """Go on where the checkpoint was written, on as many ranks or on others.

        ValueError if it is damaged, or of other data or weights.
        """
        state = self.world.from_first(lambda: read_checkpoint(file))
        if state["content"] != self.content:
            raise ValueError("was made with other data or another base")
        trained = self.spec.method.trained_state(self.model)
        if "shares" in state:
            state = sharding.read_shares(state, trained, self.optimizer, file.parent, self.world)
        else:
            state = sharding.share_out(state, trained, self.optimizer)
        self.spec.method.restore(self.model, state["model"])
        self.stage, self.step, self.evaluated = state["stage"], state["step"], state["evaluated"]
        self.losses, self.metrics, self.rows = state["losses"], state["metrics"], state["rows"]
        self.snapshots, self.sizes = state["snapshots"], set(state["sizes"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._load_rank([state, *state["others"]])

    def _load_rank(self, before: list[dict[str, Any]]) -> None:
        """This rank's random numbers and what it has measured; a rank that was not there begins with its own.

        The first one keeps the joules of all, for the others may be fewer now, or stand on other machines.
        """
        if self.world.rank < len(before):
            self.meter.restore(before[self.world.rank]["meter"])
            set_random_state(before[self.world.rank]["random"], self.meter.device)
        joules = sum(rank["meter"]["energy_joules"] for rank in before if rank.get("tells_energy", True))
        self.meter.energy_joules = joules if self.world.is_first else 0.0
        if self.world.is_first:
            for gone in before[self.world.size :]:
                self.meter.restore_peaks(gone["meter"])


@dataclass(frozen=True, kw_only=True)
class Saves:
    """What a run writes of itself while it trains."""

    checkpoint: Callable[[], None]
    snapshot: Callable[[], None]
    """Keeps ΔW; may leave the model in evaluation mode, and changes nothing else of the training."""


def read_checkpoint(file: Path) -> dict[str, Any]:
    """What `Training.save` wrote. ValueError if it is damaged."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        tensors = ("share_bytes", "moments") if "shares" in state else ("model",)
        needed = (*tensors, "stage", "step", "evaluated", "losses", "metrics", "rows", "optimizer", "meter", "random")
        optional: dict[str, Any] = {"content": None, "snapshots": {}, "others": [], "sizes": []}
        return optional | state | {key: state[key] for key in needed}
    except (
        RuntimeError,
        OSError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        pickle.PickleError,
        struct.error,
    ) as error:
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from error


def train(training: Training, examples: Examples, log: StepLog, stop: Stop, saves: Saves, hold: Hold) -> None:
    """Take the remaining steps of the task being trained. Raises Stopped (with a checkpoint written) or Diverged."""
    spec, model, meter, world = training.spec, training.model, training.meter, training.world
    task, device = examples.task, meter.device
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    gradients = Gradients(parameters, world)
    order = Order(len(examples.splits["train"]), spec.batch_size, spec.seed, training.stage)
    micro = spec.micro_batch_size or spec.batch_size
    model.train()
    pending: list[tuple[int, torch.Tensor, torch.Tensor, float]] = []
    while training.task_step < spec.steps:
        try:
            stop.check()
            if evaluation_due(training):
                flush(training, pending, log, hold)
                with meter.clock("evaluate"):
                    log.evaluation(training.step, evaluate(training, examples, "validation", stop))
                training.evaluated = training.step
                model.train()
        except Stopped:
            flush(training, pending, log, hold)
            saves.checkpoint()
            raise
        batch = [examples.splits["train"][i] for i in world.share(order.indices(training.task_step))]
        parts = [collate(batch[i : i + micro], examples.padding, CPU) for i in range(0, len(batch), micro)]
        own = [task.count(part) for part in parts], map(example_length, batch), map(batch_length, parts)
        count, tokens, padded = map(int, world.sum([sum(each) for each in own]))
        lr_share = schedule(spec, training.task_step)
        for group in training.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        with meter.step(tokens, padded, count), meter.live_tensors(model, training.optimizer):
            loss = torch.zeros((), device=device)
            with meter.phase("forward_backward"):
                for part in parts:
                    part = {key: tensor.to(device, non_blocking=True) for key, tensor in part.items()}
                    with autocast(spec, device, world):
                        part_loss = task.loss(forward(model, part), part) / max(count, 1)
                    part_loss.backward()
                    loss += part_loss.detach()
                for _ in range(training.idle_passes(len(parts), micro)):
                    idle = collate(examples.splits["train"][:1], examples.padding, device)
                    with autocast(spec, device, world):
                        (forward(model, idle).sum() * 0).backward()
                penalty = spec.method.penalty(model)
                if penalty is not None and world.is_first:
                    penalty.backward()
                gradients.sum()
            with meter.phase("optimizer"):
                limit = math.inf if spec.clip == "none" else spec.clip
                norm = whole(nn.utils.clip_grad_norm_(parameters, limit))
                training.optimizer.step()
                spec.method.after_step(model, training.step)
                training.optimizer.zero_grad()
        training.step += 1
        pending.append((training.step, loss, norm, spec.lr * lr_share))
        if training.step % FLUSH_EVERY == 0 or training.task_step == spec.steps:
            flush(training, pending, log, hold)
        if snapshot_due(training):
            flush(training, pending, log, hold)
            saves.snapshot()
            model.train()
        if world.any(log.checkpoint_due()):
            flush(training, pending, log, hold)
            saves.checkpoint()


def example_length(example: Example) -> int:
    return len(example["input_ids"])


def batch_length(batch: Batch) -> int:
    """Padding included."""
    return batch["input_ids"].numel()


def evaluation_due(training: Training) -> bool:
    """Whether the periodic evaluation of this step is still to do; a resumed run does what it was stopped in."""
    every = training.spec.eval_every
    return bool(every and training.task_step % every == 0 and training.step != training.evaluated)


def snapshot_due(training: Training) -> bool:
    """Whether ΔW is to be kept as it is after this step; after the last one `updates/` holds it."""
    every = training.spec.snapshot_every
    return bool(every and training.step % every == 0 and training.step < training.spec.total_steps)


def flush(training: Training, pending: list[Any], log: StepLog, hold: Hold) -> None:
    """Read the losses of the last steps off the device, log them, and stop if one is not finite."""
    hold.check()
    training.meter.flush()
    losses = training.world.sum([float(loss) for _, loss, _, _ in pending])
    for loss, (step, _, norm, lr) in zip(losses, pending, strict=True):
        row = {"step": step, "loss": loss, "grad_norm": float(norm), "lr": lr}
        log.step(row)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise Diverged(f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}")
        training.losses.append(row["loss"])
    if pending:
        throughput = training.meter.throughput()
        hold.progress |= {"step": training.step, "loss": training.losses[-1]}
        hold.progress |= {k: v for k, v in throughput.items() if k in ("tokens_per_second", "step_seconds_median")}
    pending.clear()
    log.flush()


def evaluate(
    training: Training, examples: Examples, split: str, stop: Stop, model: nn.Module | None = None
) -> dict[str, float]:
    """Loss and metrics of a split, by their names in MEASURES; nothing where the split is empty.

    Of `model` where one is given.
    """
    found = metrics_of(model or training.model, training.spec, examples, split, stop, training.world)
    for name, value in found.items():
        if name.endswith("_loss") and not math.isfinite(value):
            raise Diverged(f"step {training.step}: {split} loss {value}")
    return found


@torch.no_grad()
def metrics_of(
    model: nn.Module,
    spec: RunSpec,
    examples: Examples,
    split: str,
    stop: Stop | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """`evaluate` of any model, as `spec` has it; the loss may be infinite. Ranks take the batches in turn."""
    device = next(model.parameters()).device
    task = RETAIN if split == "retain" else examples.task
    rows, size = examples.splits.get(split, []), spec.micro_batch_size or -(-spec.batch_size // world.size)
    if not rows:
        return {}
    model.eval()
    found: list[tuple[float, int, Any]] = []
    for first in range(0, len(rows), size * world.size):
        if stop is not None:
            stop.check()
        start = first + size * world.rank
        if start >= len(rows) and not world.is_sharded:
            continue
        batch = collate(rows[start : start + size] or rows[:1], examples.padding, device)
        with autocast(spec, device, world):
            logits = forward(model, batch)
        if start < len(rows):
            found.append((float(task.loss(logits, batch)), task.count(batch), task.score(logits, batch)))
    if world.is_sharded:
        model.reshard()  # else its outermost weights stay whole until the next step
    turns = zip_longest(*world.gather(found))
    total, count, scores = 0.0, 0, []
    for each in (each for turn in turns for each in turn if each is not None):
        total, count = total + each[0], count + each[1]
        scores.append(each[2])
    prefix = {"validation": "valid"}.get(split, split)
    metrics = task.metrics(total / count, scores)
    return {f"{prefix}_{key}": value for key, value in metrics.items() if value is not None}


def forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (n, classes), or (n, t, vocabulary) of the batch's own positions: virtual tokens in front have none."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    length = batch["input_ids"].shape[1]
    return logits[:, -length:] if logits.ndim == 3 and logits.shape[1] > length else logits


def make_optimizer(spec: RunSpec, model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over the method's parameter groups; each group's own peak learning rate is kept beside it."""
    groups = [group | {"peak_lr": group["lr"]} for group in spec.method.param_groups(model, spec.lr)]
    return torch.optim.AdamW(
        groups,
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
        weight_decay=spec.weight_decay,
        fused=True,
    )


def schedule(spec: RunSpec, step: int) -> float:
    """The learning rate of a task's step (0, 1, …) as a share of its peak: linear warm-up, then decay to zero."""
    warm = math.ceil(spec.warmup * spec.steps - 1e-9)  # 0.07 * 100 is a little over 7
    if step < warm:
        return (step + 1) / warm
    if spec.schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, spec.steps - warm)
    return 1 - done if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def autocast(spec: RunSpec, device: torch.device, world: World = ALONE) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where the spec says so. Of shared-out weights its cache would keep all, cast, until it ends."""
    enabled = spec.dtype == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=not world.is_sharded)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 (SLURM's warning) end the run at its next step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _frame: object) -> None:
        stop.reason = stop.reason or signal.Signals(number).name

    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {kind: signal.signal(kind, handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)
