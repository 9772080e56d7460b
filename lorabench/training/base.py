"""The base of a run on its device, and the data beside it: what a run rides on, and never changes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lorabench.models import base_model
from lorabench.processes.distributed import ALONE, Sharding, World
from lorabench.spec.run_spec import RunSpec
from lorabench.training import sharding
from lorabench.training.examples import Examples, prepare_stages


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

    @classmethod
    def read(cls, spec: RunSpec, device: torch.device, world: World = ALONE, asked: Sharding = "auto") -> Base:
        """With its data; no model yet. InputError with what is wrong of the data.

        Several ranks decide how they will hold it: each the whole of it, or a share of its weights.
        """
        stages = prepare_stages(spec)
        if world.size > 1:
            world = world.spread(sharding.choose(spec, asked, device, stages[0].model_options), device)
        return cls(spec=spec, stages=stages, device=device, world=world)

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


def seeded_base(spec: RunSpec, examples: Examples, device: torch.device) -> nn.Module:
    """The untouched base: every call gives the same, the random head included."""
    torch.manual_seed(spec.seed)
    return base_model.load_base(spec, device, examples.model_options)
