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
    """Rows {step, metric, value, null, null_std} after each snapshot and at the end; with `snapshot_every = steps` of a
    sequence that is after each of its tasks. Then `growth`, with no step: of the end less the first snapshot.

    `num_intruders` is that of `intruders`: of the top 10 left singular vectors of W0 + ΔW those of which |cos| with
    every one of W0 is below 0.5 (Shuttleworth et al. 2024, arXiv 2410.21228; section 5 and figure 9 over a sequence,
    whose tasks there each begin with a new LoRA: `method.restart_every = steps`). Null: the singular values of ΔW in
    random directions, mean and standard deviation over the draws of `Tuned.nulls`. `num_new` are those of them that
    are like none of the top 32 of the snapshot before either, by the same 0.5: of the first snapshot all, which has W0
    before it. Of it chance says nothing: random directions are all new where they are drawn again after each
    snapshot, and none are where they stay.
    """

    needs: ClassVar[Literal["base_trajectory"]] = "base_trajectory"
    version: ClassVar[int] = 2
    metrics: ClassVar[dict[str, str]] = {
        "num_intruders": "intruder dimensions among the top 10 of a matrix, ε = 0.5; null: random directions",
        "num_new": "of these, those that are like none of the top 32 of the snapshot before",
        "growth": "`num_intruders` at the end less those after the first snapshot; null: the same of random directions",
    }
    per_layer: ClassVar[dict[str, str]] = {"growth": ""}

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        from lorabench.linalg.nulls import over_draws
        from lorabench.updates.base import DRAWS

        rows: list[dict[str, Any]] = []
        counts: list[list[int]] = []  # by chance, one list a snapshot
        for before, tuned in zip([None, *layers], layers, strict=False):
            count = num_new = 0
            counts.append([0] * DRAWS)
            if tuned.layer.svd.numerical_rank:
                is_intruder = judge(tuned.base, tuned.svd).cosines[:TOP] < EPSILON
                counts[-1] = [judge(tuned.base, null.svd).count(EPSILON, TOP) for null in tuned.nulls]
                count = num_new = int(is_intruder.sum())
                if before is not None:
                    known = (before.svd.U.mT @ tuned.svd.U[:, :TOP]).abs().amax(0) >= EPSILON
                    num_new = int((is_intruder & ~known).sum())
            rows.append(_row(tuned.layer.step, "num_intruders", count, *over_draws(counts[-1])))
            rows.append(_row(tuned.layer.step, "num_new", num_new, None, None))
        drawn = zip(counts[0], counts[-1], strict=False)  # of a large layer, whose end has fewer than a ΔW of 0
        null = over_draws([after - before for before, after in drawn])
        return [*rows, _row(None, "growth", rows[-2]["value"] - rows[0]["value"], *null)]


def _row(step: int | None, metric: str, value: int, null: Any, null_std: Any) -> dict[str, Any]:
    return {"step": step, "metric": metric, "value": value, "null": null, "null_std": null_std}


EXAMPLE = Accumulation()
