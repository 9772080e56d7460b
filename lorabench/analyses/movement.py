"""How far A and B each have moved from where they began, as the run has measured it, beside chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.layer import LayerSVD


@dataclass(frozen=True, kw_only=True)
class Movement(Analysis):
    """Rows {metric, value, null, null_std} of linear layers with factors, ΔW = s (B A − B₀ A₀), A (r, N) and B (M, r).

    LoRA draws A₀ and begins with B₀ = 0, which has no direction and no size to be held against: of such a B there is
    `moved_B` = ‖B‖ alone, in the same unit as `moved_A`. PiSSA and its kin have all six. Both depend on how B A is
    split (A to c A, B to B / c), cosines and relative distances of a factor do not. Null: a factor of its length that
    has forgotten its start: √(1 + ρ²) ± ρ / √((1 + ρ²) r N) away, ρ = ‖A‖ / ‖A₀‖, cosine 0 ± 1 / √(r N). `moved_*`
    are lengths in no unit, without a null. Whether two runs read alike because both still stand at one start (Zhu et
    al. 2024, arXiv 2402.16842) is told by `factors`. A run measures this at its end (`lorabench.training.movement`); of
    one that is older, that begins anew (ReLoRA) or whose weights are shared out over processes there are no rows.
    """

    needs: ClassVar[Literal["layer"]] = "layer"
    version: ClassVar[int] = 2
    metrics: ClassVar[dict[str, str]] = {
        "moved_A": "‖A − A₀‖, Frobenius",
        "moved_B": "‖B − B₀‖, Frobenius: ‖B‖ where B begins at zero",
        "relative_A": "‖A − A₀‖ / ‖A₀‖; null: an A of this length that is independent of A₀",
        "relative_B": "‖B − B₀‖ / ‖B₀‖, where B does not begin at zero",
        "cosine_A": "⟨A, A₀⟩ over the product of the Frobenius norms, in [−1, 1]: 1 where A has kept its direction",
        "cosine_B": "⟨B, B₀⟩ over the product of the Frobenius norms, where B does not begin at zero",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        (layer,) = layers
        found = layer.movement
        return [{"metric": name, "value": found[name]} | _chance(found, name) for name in self.metrics if name in found]


def _chance(found: Mapping[str, float], name: str) -> dict[str, float | None]:
    """Of relative² = 1 + ρ² − 2 ρ cosine, to the first order in the cosine."""
    kind, side = name.split("_")
    null = 0.0 if kind == "cosine" else found.get(f"{name}_null")
    std = found.get(f"cosine_{side}_null_std")
    if kind == "relative" and null and std:
        std *= (null**2 - 1) ** 0.5 / null
    return {"null": null, "null_std": None if null is None else std}


EXAMPLE = Movement()
