"""How far ΔW moves a layer's outputs on data, as the run has measured it, beside a random ΔW of the same norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.layer import LayerSVD


@dataclass(frozen=True, kw_only=True)
class Drift(Analysis):
    """Rows {metric, value, null, null_std}, of linear layers: E‖ΔW h‖² / E‖W0 h‖² over tokens, h the layer's input in
    the base.

    Null: what a random ΔW of the same norm gives, ‖ΔW‖² E‖h‖² / (N E‖W0 h‖²), and the standard deviation of ΔW's
    singular values in random directions, both in closed form. A run measures them at its end
    (`lorabench.training.drift`); of one that is older there are no rows, or no `null_std`.
    """

    needs: ClassVar[Literal["layer"]] = "layer"
    version: ClassVar[int] = 2
    metrics: ClassVar[dict[str, str]] = {
        "task": "E‖ΔW h‖² / E‖W0 h‖² over validation tokens of the task, at least 0",
        "retain": "the same over tokens of what is retained",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        (layer,) = layers
        found = layer.drift
        return [
            {
                "metric": name,
                "value": found[name],
                "null": found[f"{name}_null"],
                "null_std": found.get(f"{name}_null_std"),
            }
            for name in self.metrics
            if name in found
        ]


EXAMPLE = Drift()
