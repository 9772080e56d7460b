"""What a fine-tuning method is: a frozen dataclass of hyperparameters that attaches itself to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.plugins import Plugin
from lorabench.update import Update, save_deltas, save_svds

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorabench.spec import RunSpec


class Method(Plugin, ABC):
    """Fields are hyperparameters. Add a method by adding one file to `lorabench/methods/`.

    A new need becomes a defaulted hook here, never an `if method ==` in the training loop.
    """

    folder: ClassVar[str] = "methods"
    trains_base: ClassVar[bool] = False
    """Whether base weights themselves are trained: they are then held as float32 masters and not quantized."""

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """Why this method cannot be run as `spec` asks: `key = value: reason`. Checked when a sweep is read."""
        if self.trains_base and spec.quantization != "none":
            yield (
                f'quantization = "{spec.quantization}": method {self.name} trains the base weights, and quantized '
                'weights cannot be trained; use quantization = "none", or method.name = "lora" for QLoRA'
            )

    @abstractmethod
    def attach(self, model: nn.Module) -> nn.Module:
        """Make exactly what this method trains require a gradient. Random initialization uses the global RNG."""

    @abstractmethod
    def updates(self, model: nn.Module, load_base: Callable[[], nn.Module]) -> Iterator[Update]:
        """ΔW layer by layer; nothing where the method has none. `load_base()` is the untouched base again."""

    def save(self, model: nn.Module, load_base: Callable[[], nn.Module], folder: Path, keep: str) -> None:
        """Write what was learned to `folder`: dense ΔW, or its top singular vectors with `keep = "svd:K"`."""
        if keep == "updates":
            save_deltas(self.updates(model, load_base), folder)
        else:
            save_svds(self.updates(model, load_base), folder, int(keep.removeprefix("svd:")))

    def param_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups. Default: every trainable parameter at `lr`."""
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after each optimizer step (AdaLoRA reallocates its budget here)."""

    def trained_state(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint must hold of the model: the trainable tensors, by name."""
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
