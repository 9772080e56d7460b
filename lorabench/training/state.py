"""A run's own state while it trains, apart from the base that it rides on: all that a checkpoint holds."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabench.config.decode import InputError, encode
from lorabench.config.digests import check_files
from lorabench.config.durable import make_folder, remove, sync
from lorabench.config.json_file import fit
from lorabench.models import weights
from lorabench.models.flat import attend_by_example
from lorabench.models.fused import fused_parts
from lorabench.models.remarks import remarks
from lorabench.processes.distributed import World, is_sharded
from lorabench.spec.run_spec import RunSpec, method_seed
from lorabench.spec.task import Example, Task
from lorabench.store.generations import Generation
from lorabench.training import flops, ranks, sharding
from lorabench.training import meter as meters
from lorabench.training.base import Base
from lorabench.training.examples import Examples
from lorabench.training.passes import base_of
from lorabench.training.starting import start_from_data
from lorabench.updates.parts import Part

Score = tuple[float, int, Any]
"""Of a batch that is evaluated; see `evaluation.score`."""


@dataclass
class Training:
    """What belongs to one run: its adapter, optimizer, schedule, data order, step log, metrics and costs."""

    spec: RunSpec
    base: Base
    model: nn.Module
    """The base with the run's method on it; of the base's own weights nothing here is the run's."""
    optimizer: torch.optim.Optimizer
    meter: meters.Meter
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
    skeleton: nn.Module | None = None
    """The model without numbers, to count FLOPs on."""
    snapshots: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files of the snapshots kept so far, by path below the run's folder."""
    log: list[str] = field(default_factory=list)
    """The lines of `steps.jsonl` so far."""

    rollout: list[Example] = field(default_factory=list)
    """The answers of its own that it was last trained on, where it is to write some; plain numbers and lists."""

    generations: list[Generation] = field(default_factory=list)
    """What it wrote at the end, a row an answer; in no checkpoint, for whoever goes on writes anew."""

    scored: dict[tuple[Task, str], list[Score]] = field(default_factory=dict)
    """By task and split, what was computed of the evaluation that comes next, together with other runs."""

    sizes: set[int] = field(default_factory=set)
    """Numbers of ranks that took the steps before it was stopped."""

    counts: dict[str, float] = field(default_factory=dict)
    """Parameters, bytes and examples, by their names in MEASURES."""
    remarks: dict[str, str] = field(default_factory=dict)
    """What there is to say of the base; see `lorabench.models.remarks`."""
    parts: dict[str, dict[str, Part]] = field(default_factory=dict)
    """The parts of the base's fused matrices, by parameter; see `lorabench.models.fused`."""

    @classmethod
    def attach(cls, spec: RunSpec, base: Base, meter: meters.Meter) -> Training:
        """Load the base, attach the run's method to it, and count; with an optimizer, ready for the first step."""
        return sharding.in_turn(base.world, lambda: cls._attach(spec, base, meter))

    @classmethod
    def _attach(cls, spec: RunSpec, base: Base, meter: meters.Meter) -> Training:
        with meter.loading():
            model = base.load()
        key = method_key(spec)
        about = base.once(("remarks", key), lambda: remarks(spec, model))
        num_base = base.once(("count",), lambda: weights.count(model))
        parts = base.once(("parts",), lambda: fused_parts(model))
        torch.manual_seed(method_seed(spec))
        tuned = spec.method.attach(model, spec)
        with meter.loading():
            if start := start_from_data(spec, tuned, base.stages[0]):
                about = {**about, "start": start}
        spec.optimizer.prepare(tuned, spec)
        base.attached(tuned)
        skeleton = base.once(("skeleton", key), lambda: flops.skeleton_of(tuned))
        if spec.padding == "free":
            attend_by_example(base_of(tuned))
        if spec.gradient_checkpointing:
            tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        counts = base.once(("counts", key), lambda: counts_of(tuned, num_base, base.stages))
        tuned = sharding.shard(tuned, base.world, base.device, spec.method.trains_base)
        return cls(
            spec=spec,
            base=base,
            model=tuned,
            optimizer=make_optimizer(spec, tuned),
            meter=meter,
            skeleton=skeleton,
            counts=counts,
            remarks=about,
            parts=parts,
        )

    @property
    def world(self) -> World:
        """The ranks that compute the run together."""
        return self.base.world

    @property
    def examples(self) -> Examples:
        """The data of the task being trained."""
        return self.base.stages[self.stage]

    @property
    def task_step(self) -> int:
        """Optimizer steps done on the task being trained."""
        return self.step - self.stage * self.spec.steps

    @property
    def micro(self) -> int:
        """Examples in each pass of a step."""
        return self.spec.micro_batch_size or self.spec.batch_size

    def idle_passes(self, passes: int) -> int:
        """Over shared-out weights all ranks compute at once: how often one with a smaller share goes through idly."""
        largest = -(-self.spec.batch_size // self.world.size)
        return -(-largest // self.micro) - passes if self.world.is_sharded else 0

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
            "content": self.base.content,
            "losses": self.losses,
            "metrics": self.metrics,
            "rows": self.rows,
            "snapshots": self.snapshots,
            "log": "".join(self.log),
            "rollout": self.rollout,
            "others": others,
            "sizes": sorted(self.sizes | {self.world.size}),
        }
        if not file.parent.is_dir():
            remove(file.parent)
        make_folder(file.parent)
        temporary = file.with_suffix(".tmp")
        with open(temporary, "wb") as handle:
            torch.save(state | own | tensors, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
        sync(file.parent)
        sharding.drop_shares(file.parent, tensors.get("shares"))

    def resume(self, file: Path) -> bool:
        """Go on from the checkpoint, if there is one; one that is of no use is set aside, and the run begins anew."""
        if not self.world.from_first(file.exists):
            return False
        try:
            self.load(file)
        except ValueError as error:
            if self.world.is_first:
                remove(file.with_suffix(".unusable"))
                os.replace(file, file.with_suffix(".unusable"))
            print(f"checkpoint {error}; it is set aside, and the run begins anew")
            return False
        return True

    def load(self, file: Path) -> None:
        """Go on where the checkpoint was written, on as many ranks or on others.

        ValueError if it is damaged, or a snapshot that it tells of is, or it is of other data or weights.
        """
        state = self.world.from_first(lambda: read_checkpoint(file))
        if state["content"] != self.base.content:
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
        self.log, self.rollout = state["log"].splitlines(keepends=True), state["rollout"]
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


_PLAIN: dict[str, Any] = {"stage": int, "step": int, "evaluated": int, "losses": list[float], "log": str}


def read_checkpoint(file: Path) -> dict[str, Any]:
    """What `Training.save` wrote. ValueError if it, or a file of a snapshot that it tells of, is damaged or gone."""
    try:
        if damaged := zipfile.ZipFile(file).testzip():  # torch.load does not look at the checksums
            raise ValueError(f"{damaged} is damaged")
        state = torch.load(file, map_location="cpu", weights_only=True)
        tensors = ("share_bytes", "moments") if "shares" in state else ("model",)
        needed = (*tensors, *_PLAIN, "metrics", "rows", "optimizer", "meter", "random")
        optional: dict[str, Any] = {"content": None, "snapshots": {}, "others": [], "sizes": [], "rollout": []}
        state = optional | state | {key: fit(_PLAIN.get(key, Any), state[key], key) for key in needed}
        check_files(file.parent.parent, fit(dict[str, str], state["snapshots"], "snapshots"))
        return state
    except (
        InputError,
        zipfile.BadZipFile,
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


def method_key(spec: RunSpec) -> str:
    """The same of runs whose models are alike but for their numbers."""
    return json.dumps(encode(spec.method), sort_keys=True)


def counts_of(tuned: nn.Module, num_base: int, stages: list[Examples]) -> dict[str, float]:
    """Of a model with its method attached, the base of which has so many parameters."""
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    return {
        "num_parameters": weights.count(tuned),
        "num_trainable": trainable,
        "trainable_share": trainable / num_base,
        "num_train_examples": sum(len(examples.splits["train"]) for examples in stages),
        "model_gib": weights.held_bytes(tuned) / meters.GIB,
    }


def make_optimizer(spec: RunSpec, model: nn.Module) -> torch.optim.Optimizer:
    """The run's optimizer over the method's parameter groups; each group's own peak rate is kept beside it."""
    groups = [group | {"peak_lr": group["lr"]} for group in spec.method.param_groups(model, spec.lr)]
    return spec.optimizer.make(spec, model, groups)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
