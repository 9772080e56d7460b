"""Which weights ΔW changes once they are stored in bfloat16: how many, and whether W0's principal or smallest ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.base import Tuned


@dataclass(frozen=True, kw_only=True)
class Sparsity(Analysis):
    """Rows {metric, value, null, null_std}; `null` is of random updates: ΔW's singular values in random directions,
    mean and standard deviation over the draws of `Tuned.nulls`.

    A weight counts as changed where W0 and W0 + ΔW, both rounded to bfloat16, differ (Zhu et al. 2025, arXiv
    2511.08567, definition 2.1: by more than 1e-3 of the larger, which between numbers of bfloat16 is the same). So it
    is what a checkpoint stored in bfloat16 would show: of LoRA the merged one, of full fine-tuning ΔW of the float32
    weights that were trained, rounded once. The code of Mukherjee et al. 2025 (arXiv 2505.11711) asks for a difference
    above 1e-5, which one step of bfloat16 is not for weights below 0.002: by it more are unchanged.

    `changed`, `hidden` and `zero` sum to 1. The overlaps are shares of a set of changes that lie among the 30% of W0's
    entries that are principal (largest in its approximation of rank min(M, N) / 16, at most 256) or smallest in
    magnitude. By location alone that is 0.3; rounding hides what is small beside its weight, so that the smallest
    weights change first, in a random update too.
    """

    needs: ClassVar[Literal["base"]] = "base"
    version: ClassVar[int] = 3
    metrics: ClassVar[dict[str, str]] = {
        "changed": "share of the weights that ΔW changes in bfloat16; null: random directions",
        "hidden": "share of the weights where ΔW is not 0, yet bfloat16 shows no change; null: random directions",
        "zero": "share of the weights where ΔW is exactly 0",
        "visible_rank": "numerical rank of the change in bfloat16 over min(M, N), up to 1024; null: random directions",
        "changed_in_principal": "share of the changed weights that are among W0's 30% principal ones",
        "changed_in_smallest": "share of the changed weights that are among W0's 30% smallest ones",
        "largest_in_principal": "share of the 30% largest entries of ΔW that are among W0's 30% principal weights",
        "largest_in_smallest": "share of the 30% largest entries of ΔW that are among W0's 30% smallest weights",
    }
    per_layer: ClassVar[dict[str, str]] = dict.fromkeys(metrics, "")

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        from lorabench.linalg.nulls import over_draws

        (tuned,) = layers
        found, *draws = (dict(measures(each)) for each in (tuned, *tuned.nulls))
        rows = []
        for metric, value in found.items():
            known = [draw[metric] for draw in draws if metric in draw]
            null, std = over_draws(known) if known else (None, None)
            rows.append({"metric": metric, "value": value, "null": null, "null_std": std})
        return rows


def measures(tuned: Tuned) -> Iterator[tuple[str, float]]:
    """Each metric; no overlap of an empty set, no visible rank of a large matrix."""
    from lorabench.updates.stored import count

    seen, marked = tuned.seen, tuned.base.marked
    yield "changed", seen.share_changed
    yield "hidden", (seen.num_entries - seen.num_zero - count(seen.changed)) / seen.num_entries
    yield "zero", seen.share_zero
    for name, chosen in (("changed", seen.changed), ("largest", seen.largest)):
        if size := count(chosen):
            yield f"{name}_in_principal", count(chosen, marked.principal) / size
            yield f"{name}_in_smallest", count(chosen, marked.smallest) / size
    if (rank := visible_rank(tuned)) is not None:
        yield "visible_rank", rank


def visible_rank(tuned: Tuned) -> float | None:
    """Numerical rank of the change in bfloat16 over min(M, N), with the tolerance of `torch.linalg.matrix_rank`.

    None where the shorter side is above 1024, and there is no GPU.
    """
    import torch

    from lorabench.updates.base import LARGE, best_device
    from lorabench.updates.stored import visible

    device, short = best_device(tuned.layer.shape), min(tuned.layer.shape)
    if device.type == "cpu" and short > LARGE:
        return None
    X = visible(tuned.base.weight, tuned.delta()).to(device).double()
    gram = X.mT @ X if X.shape[0] > X.shape[1] else X @ X.mT
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    cut = values[-1] * max(tuned.layer.shape) * torch.finfo(torch.float32).eps
    return float((values > cut).sum()) / short


EXAMPLE = Sparsity()
