"""How far A and B each have moved from where they began, as the run has measured it, beside chance."""

from __future__ import annotations

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
    has forgotten its start: √(1 + ‖A‖² / ‖A₀‖²) away, cosine 0 ± 1 / √(r N). Whether two runs read alike because
    both still stand at one start (Zhu et al. 2024, arXiv 2402.16842) is told by `factors`. A run measures this at its
    end (`lorabench.training.movement`); of one that is older, that begins anew (ReLoRA) or whose weights are shared
    out over processes there are no rows.
    """

    needs: ClassVar[Literal["layer"]] = "layer"
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
        return [
            {
                "metric": name,
                "value": found[name],
                "null": 0.0 if name.startswith("cosine") else found.get(f"{name}_null"),
                "null_std": found.get(f"{name}_null_std"),
            }
            for name in self.metrics
            if name in found
        ]


EXAMPLE = Movement()
