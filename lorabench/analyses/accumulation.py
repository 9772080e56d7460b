"""How intruder dimensions come and stay over training, and over a sequence of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.analyses.intruders import EPSILON, TOP, judge
from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.base import Tuned


@dataclass(frozen=True, kw_only=True)
class Accumulation(Analysis):
    """Rows {step, metric, value, null} after each snapshot and at the end; with `snapshot_every = steps` of a sequence
    that is after each of its tasks. Then `growth`, with no step: of the end less the first snapshot.

    `num_intruders` is that of `intruders`: of the top 10 left singular vectors of W0 + ΔW those of which |cos| with
    every one of W0 is below 0.5 (Shuttleworth et al. 2024, arXiv 2410.21228; section 5 and figure 9 over a sequence,
    whose tasks there each begin with a new LoRA: `method.restart_every = steps`). Null: the singular values of ΔW in
    random directions, one draw. `num_new` are those of them that are like none of the top 32 of the snapshot before
    either, by the same 0.5: of the first snapshot all, which has W0 before it.
    """

    needs: ClassVar[Literal["base_trajectory"]] = "base_trajectory"
    metrics: ClassVar[dict[str, str]] = {
        "num_intruders": "intruder dimensions among the top 10 of a matrix, ε = 0.5; null: random directions",
        "num_new": "of these, those that are like none of the top 32 of the snapshot before",
        "growth": "`num_intruders` at the end less those after the first snapshot; null: the same of random directions",
    }
    per_layer: ClassVar[dict[str, str]] = {"growth": ""}

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for before, tuned in zip([None, *layers], layers, strict=False):
            count = num_new = null = 0
            if tuned.layer.svd.numerical_rank:
                is_intruder = judge(tuned.base, tuned.svd).cosines[:TOP] < EPSILON
                count = int(is_intruder.sum())
                null = int((judge(tuned.base, tuned.null.svd).cosines[:TOP] < EPSILON).sum())
                num_new = count
                if before is not None:
                    known = (before.svd.U.mT @ tuned.svd.U[:, :TOP]).abs().amax(0) >= EPSILON
                    num_new = int((is_intruder & ~known).sum())
            rows.append({"step": tuned.layer.step, "metric": "num_intruders", "value": count, "null": null})
            rows.append({"step": tuned.layer.step, "metric": "num_new", "value": num_new, "null": None})
        first, last = rows[0], rows[-2]
        growth = {key: last[key] - first[key] for key in ("value", "null")}
        return [*rows, {"step": None, "metric": "growth"} | growth]


EXAMPLE = Accumulation()
