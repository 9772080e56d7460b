"""What a fine-tuning method is: a frozen dataclass of hyperparameters that attaches itself to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.config.plugins import Plugin
from lorabench.updates.update import Update, read_deltas, restore_drawn, save_drawn, save_svds, save_updates

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What a method trains on one linear layer of the base, where that is all it does: y = W0 x + s B A x."""

    A: nn.Parameter
    """(r, in)."""
    B: nn.Parameter
    """(out, r)."""
    scale: float
    dropout: float = 0.0
    """Of the layer's input to A."""
    start: tuple[Tensor, Tensor] | None = None
    """(B0, A0), where the layer computes with W0 - s B0 A0 instead."""


LoadBase = Callable[[], "nn.Module"]
"""Gives the untouched base again, the same at each call."""


class Method(Plugin, ABC):
    """Fields are hyperparameters. Add a method by adding one file to `lorabench/methods/`.

    A new need becomes a defaulted hook here, never an `if method ==` in the training loop.
    """

    folder: ClassVar[str] = "methods"
    in_sweep: ClassVar[tuple[str, str]] = ("[[grid]]", "method")
    trains_base: ClassVar[bool] = False
    """Whether base weights themselves are trained: they are then held as float32 masters and not quantized."""
    holds_several: ClassVar[bool] = False
    """Whether a loaded model can hold the adapters of several tasks: `load_another`, `activate`."""

    @property
    def mixes_adapters(self) -> bool:
        """Whether such a model also takes `adapter_names`, the adapter of each row of a batch, as PEFT has it."""
        return False

    @property
    def is_factors(self) -> bool:
        """Whether all that it trains are `factors`, and a task's head: such runs of one base can share its forward and
        backward passes."""
        return False

    def factors(self, model: nn.Module) -> dict[str, Factor]:
        """What is trained on each linear layer of a tuned model, by its name in the base. Where `is_factors`."""
        raise NotImplementedError

    def heads(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules of a tuned model that are trained whole beside its `factors`, by their names in the base."""
        return {}

    @property
    def shares_passes(self) -> bool:
        """Whether such a run of factors begins and goes on by its own steps alone, so that it can be in a pack."""
        return self.is_factors

    @property
    def changes_base(self) -> bool:
        """Whether frozen base weights are others once training begins (PiSSA)."""
        return False

    @property
    def merges_as_it_goes(self) -> bool:
        """Whether frozen base weights change while it trains (ReLoRA): those are held in float32, whole everywhere."""
        return False

    @property
    def num_start_examples(self) -> int:
        """Of the training data, from which its initial weights are made in `begin_from_data`."""
        return 0

    def num_stored(self, spec: RunSpec) -> int:
        """Times what is trained that it keeps in its files: PiSSA its initial factors too."""
        return 1

    @property
    def keeps_base(self) -> bool:
        """Whether `unload` gives the untouched base with its own values."""
        return False

    @property
    def has_update(self) -> bool:
        """Whether the method has a ΔW; soft prompts and adapters add computation instead."""
        return True

    @property
    def starts_at_base(self) -> bool:
        """Whether the model computes what the untouched base does until it is trained; a random prompt does not."""
        return True

    @property
    def adds_computation(self) -> bool:
        """Whether something is computed that no ΔW stands for; such a model cannot be merged."""
        return not self.has_update

    def about_update(self, spec: RunSpec) -> str:
        """Which W0 the run's ΔW counts from, for its record; `not applicable: …` where there is no ΔW."""
        if not self.has_update:
            return f"not applicable: {self.name} adds computation and changes no weight of the base"
        base = f"the dequantized {spec.quantization} weights" if spec.quantization != "none" else "the original weights"
        return f"against {base}" + ("; what the method computes beside it is apart" if self.adds_computation else "")

    @property
    def about_storage(self) -> str:
        """What the files hold where that is not what was trained, as in `they hold …`; empty where it is."""
        return ""

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that the method takes up in front of each example."""
        return 0

    def left_out(self, model: nn.Module) -> list[str]:
        """What the untouched base's blocks have of matrices that `all-linear` does not reach with this method."""
        return []

    def without_effect(self, model: nn.Module) -> list[str]:
        """What of the method's keys changes nothing on this untouched base, as `KEY: "PATTERN"`."""
        return []

    def ranks(self, model: nn.Module) -> dict[str, tuple[str, int]]:
        """Of each linear layer or parameter of this untouched base that it puts factors on: the key, and the rank."""
        return {}

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """Why this method cannot be run as `spec` asks: `key = value: reason`. Checked when a sweep is read."""
        if self.trains_base and spec.quantization != "none":
            yield (
                f'quantization = "{spec.quantization}": method {self.name} trains the base weights, and quantized '
                'weights cannot be trained; use quantization = "none", or method.name = "lora" for QLoRA'
            )

    @abstractmethod
    def attach(self, model: nn.Module, spec: RunSpec) -> nn.Module:
        """Make exactly what this method trains require a gradient, a new task head (`model.new_heads`) included.

        Random initialization uses the global generator. InputError where the model has nothing to attach to.
        """

    def begin_from_data(self, model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Make the initial weights of an attached model from data, in place. Where `num_start_examples` is not 0.

        Each of `losses` computes an example's forward pass, in evaluation mode, and gives its mean loss.
        InputError where they do not tell enough.
        """

    @abstractmethod
    def updates(self, model: nn.Module, load_base: LoadBase) -> Iterator[Update]:
        """ΔW layer by layer; of a new task head alone where the method has none."""

    def save(self, model: nn.Module, load_base: LoadBase, folder: Path, keep: str) -> None:
        """Write what was learned to `folder`: what `load` needs, or ΔW's top singular vectors with `keep = "svd:K"`."""
        if keep == "updates":
            save_updates(self.updates(model, load_base), folder)
            save_drawn(getattr(model, "drawn", {}), folder)
        else:
            save_svds(self.updates(model, load_base), folder, int(keep.removeprefix("svd:")))

    def load(self, base: nn.Module, folder: Path, spec: RunSpec) -> nn.Module:
        """The tuned model out of an untouched base and what `save` wrote; nothing of it need require a gradient."""
        from lorabench.models.weights import add_update

        restore_drawn(base, folder)
        for update in read_deltas(folder):
            add_update(base, update)
        return base

    def merge(self, model: nn.Module) -> nn.Module | None:
        """The tuned model in the base's own architecture, in place; None where the method cannot be merged."""
        return None if self.adds_computation else model

    def unload(self, model: nn.Module) -> nn.Module | None:
        """The model in the base's own architecture without what was put on it, in place; None: load the base anew.

        To time the base without its weights a second time; their values need not be the untouched base's.
        """
        return None

    def load_another(self, model: nn.Module, folder: Path, name: str) -> None:
        """Load one more task's adapter beside that of `load`, which is called "default". Where `holds_several`."""
        raise NotImplementedError

    def activate(self, model: nn.Module, name: str) -> None:
        """Compute with the adapter of that name from now on. Where `holds_several`."""
        raise NotImplementedError

    def param_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups. Default: every trainable parameter at `lr`."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]

    def penalty(self, model: nn.Module) -> Tensor | None:
        """What is added to the training loss (AdaLoRA keeps its factors orthogonal with it)."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after each optimizer step 0, 1, …, gradients still there (AdaLoRA reallocates its budget here)."""

    def restart(self, model: nn.Module, spec: RunSpec, done: int) -> bool:
        """Called when so many optimizer steps are done: whether the method has begun anew, and the optimizer with it
        forgets what it keeps (ReLoRA)."""
        return False

    def lr_share(self, done: int) -> float:
        """What the schedule's learning rate is multiplied by after so many steps (ReLoRA's warm-up after a restart)."""
        return 1.0

    def trained_state(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint must hold of the model: the trainable tensors, by name."""
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Put back what `trained_state` gave. ValueError where it is of other parameters."""
        import torch

        targets = self.trained_state(model)
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in targets.items()}:
            raise ValueError("holds other parameters than this version trains")
        with torch.no_grad():
            for name, tensor in state.items():
                targets[name].copy_(tensor)
