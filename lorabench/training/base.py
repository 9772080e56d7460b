"""The base of a run on its device, and the data beside it: what a run rides on, and never changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self, TypeVar

import torch
from torch import nn

from lorabench.models import base_model
from lorabench.models.copies import copied
from lorabench.processes.distributed import ALONE, Sharding, World
from lorabench.spec.run_spec import RunSpec
from lorabench.store.base_results import BaseResult
from lorabench.training import sharding
from lorabench.training.examples import Examples, prepare_stages
from lorabench.training.meter import Meter

T = TypeVar("T")


@dataclass(kw_only=True)
class Base:
    """The untouched model and the tokenized tasks of one run, or of several that name the same.

    Of `spec` only what is theirs counts: model and revision, quantization, dtype, tasks, sequence length, and the seed
    of a new task head.
    """

    spec: RunSpec
    stages: list[Examples]
    """The data of each task, in order."""
    device: torch.device
    world: World = ALONE
    """The ranks that hold it together."""
    measured: list[BaseResult] = field(default_factory=list)
    """What the untouched model does on the tasks, once a run on it has measured it."""
    made: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)
    """What `once` has made."""

    @classmethod
    def read(cls, spec: RunSpec, device: torch.device, world: World = ALONE, asked: Sharding = "auto") -> Base:
        """With its data; no model yet. InputError with what is wrong of the data.

        Several ranks decide how they will hold it: each the whole of it, or a share of its weights.
        """
        stages = prepare_stages(spec)
        if world.size > 1:
            world = world.spread(sharding.choose(spec, asked, device, stages[0].model_options), device)
        return cls(spec=spec, stages=stages, device=device, world=world)

    def once(self, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """What `make` gives, made once for all runs on the base that ask for it by this key."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def load(self) -> nn.Module:
        """The untouched model, whole, where a method is attached to it: every call gives the same."""
        model = seeded_base(self.spec, self.stages[0], sharding.loads_on(self.world, self.device))
        base_model.check_length(self.spec, base_model.max_length(model))
        return model

    def untouched(self) -> nn.Module:
        """The untouched model as it computes beside a tuned one: shared out over the ranks where that is."""
        return sharding.in_turn(
            self.world, lambda: sharding.shard(self.load(), self.world, self.device, trains_base=True)
        )

    def attached(self, model: nn.Module) -> None:
        """Called with the model that `load` gave once the run's method is on it."""

    def part(self, model: nn.Module) -> None:
        """Called with the run's model before its frozen weights may be changed: what is merged stays in them."""

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """What was read: the model's commit or hash, and by role (`task`, `retain`) the data's, with notes.

        With the task's number where there are several.
        """
        of_several = len(self.stages) > 1
        numbered = [(f" {number}" if of_several else "", each) for number, each in enumerate(self.stages, 1)]
        return base_model.fingerprint(self.spec) | {
            "data": {role + number: value for number, each in numbered for role, value in each.fingerprints.items()},
            "data_notes": {role + number: value for number, each in numbered for role, value in each.notes.items()},
        }

    @property
    def content(self) -> dict[str, Any]:
        """What a checkpoint goes on with, or not at all."""
        return {key: self.fingerprints.get(key) for key in ("model_commit", "model_sha256", "data")}


@dataclass(kw_only=True)
class SharedBase(Base):
    """Of runs that are computed together: its weights are read once, and are the same tensors in the model of each."""

    whole: nn.Module
    is_parted: bool = False
    """Whether what is loaded from now on is to have weights of its own."""

    @classmethod
    def open(cls, spec: RunSpec, device: torch.device, meter: Meter) -> Self:
        """For runs that differ from `spec` in what does not concern the base. InputError as `read` has it."""
        with meter.reading():
            alone = Base.read(spec, device)
        with meter.loading():
            whole = alone.load()
        for module in whole.modules():
            if type(module).__name__ == "Linear8bitLt" and module.weight.CB is not None:
                module.init_8bit_state()  # else its first pass moves the scales to one layer of those that share them
        shared = cls(spec=spec, stages=alone.stages, device=device, whole=whole)
        shared.__dict__["fingerprints"] = alone.fingerprints
        return shared

    def of(self, spec: RunSpec) -> Self:
        """The same, as the base of another of the runs."""
        own = copy.copy(self)
        own.spec = spec
        if getattr(self.whole, "drawn", None):
            own.measured = self.once(("measured", spec.seed), list)
        return own

    def load(self) -> nn.Module:
        torch.manual_seed(self.spec.seed)  # as whoever reads the files does
        model = twin(self.whole, own_weights=self.is_parted or self.spec.method.changes_base)
        if getattr(self.whole, "drawn", None):  # a new head: that of the run's own seed
            model.drawn = self.once(("drawn", self.spec.seed), self._draw)
            for name, value in model.drawn.items():
                module, _, key = name.rpartition(".")
                old = model.get_parameter(name)
                setattr(model.get_submodule(module), key, nn.Parameter(value.to(old, copy=True), old.requires_grad))
        return model

    def _draw(self) -> dict[str, torch.Tensor]:
        """What the files lack, by the run's own seed: in `whole` it is by that of another."""
        with torch.random.fork_rng(devices=[]):
            return seeded_base(self.spec, self.stages[0], torch.device("cpu")).drawn

    def attached(self, model: nn.Module) -> None:
        """What a method might have changed, and has not, is shared again."""
        if not self.spec.method.changes_base:
            return
        known: dict[torch.Size, list[torch.Tensor]] = {}
        for parameter in self.whole.parameters():
            known.setdefault(parameter.shape, []).append(parameter)
        for parameter in (p for p in model.parameters() if not p.requires_grad):
            same = (each for each in known.get(parameter.shape, ()) if torch.equal(each, parameter))
            parameter.data = next(same, parameter).data

    def part(self, model: nn.Module) -> None:
        self.is_parted = True
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter and not parameter.requires_grad:  # PEFT makes quantized ones anew
                parameter.data = parameter.data.clone()


def twin(model: nn.Module, *, own_weights: bool = False) -> nn.Module:
    """Another tree of modules on the same tensors, or on copies. What is attached to one is not on the other."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        held += [value for value in vars(getattr(module, "state", None) or object).values() if torch.is_tensor(value)]
        new = {id(tensor): tensor for tensor in held if tensor is not None and id(tensor) not in memo}
        memo |= {key: _twin_of(tensor, own_weights) for key, tensor in new.items()}
    return copied(model, memo)


def _twin_of(tensor: torch.Tensor, own: bool) -> torch.Tensor:
    """A parameter of its own, so that whoever gives it other numbers gives them to it alone."""
    if own:
        return copy.deepcopy(tensor)
    return nn.Parameter(tensor.data, tensor.requires_grad) if type(tensor) is nn.Parameter else tensor


def seeded_base(spec: RunSpec, examples: Examples, device: torch.device) -> nn.Module:
    """The untouched base: every call gives the same, the random head included."""
    torch.manual_seed(spec.seed)
    return base_model.load_base(spec, device, examples.model_options)
