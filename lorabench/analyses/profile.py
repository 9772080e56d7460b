"""How much ΔW does along each of W0's singular directions, beside a random update of the same singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    import numpy as np

    from lorabench.updates.base import Tuned

SAMPLE = 16
"""Directions of one row, at most: of more, so many are taken, evenly."""


@dataclass(frozen=True, kw_only=True)
class Profile(Analysis):
    """Rows {metric, side, first, last, num_directions, value, null, null_std}, along all of W0's directions.

    With W0 = Σ σ_i u_i v_iᵀ: `response` is ‖ΔW v_i‖ (`input`) and ‖ΔWᵀ u_i‖ (`output`), the update's energy spectrum;
    `diagonal` is |u_iᵀ W v_i - σ_i| = |u_iᵀ ΔW v_i| (`both`), how far W0's own values are changed in place (Huang et
    al. 2026, PEFT-Arena, arXiv 2605.28819, the two views of its spectral analysis, as its code has them; the output
    side is ours). A row is of the directions from `first` to `last`, half an octave, 1 the top one: the root of their
    mean square, over a sample of `num_directions` of them. Null: the singular values of ΔW in random directions, mean
    and standard deviation in closed form. Directions beyond W0's numerical rank are arbitrary and left out. A ΔW of
    factors is never formed.
    """

    needs: ClassVar[Literal["base"]] = "base"
    metrics: ClassVar[dict[str, str]] = {
        "response": "‖ΔW v_i‖, or ‖ΔWᵀ u_i‖, of W0's directions i: root mean square; null: random directions",
        "diagonal": "|u_iᵀ W v_i − σ_i| of W0's directions i: root mean square; null: random directions",
    }
    columns: ClassVar[dict[str, str]] = {
        "first": "number of the first of W0's directions that the row is of, from 1",
        "last": "number of the last one",
        "num_directions": "how many of them were looked at, evenly from the first to the last",
    }

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        import numpy as np

        from lorabench.linalg.nulls import response_chance

        (tuned,) = layers
        svd, base = tuned.layer.svd, tuned.base
        if not (svd.numerical_rank and base.svd.numerical_rank):
            return []
        firsts, lasts, chosen = directions(base.svd.numerical_rank)
        found = responses(tuned, np.concatenate(chosen))
        counts = np.array([len(each) for each in chosen])
        starts = np.concatenate([[0], counts.cumsum()[:-1]])
        rows = []
        for metric, side in (("response", "input"), ("response", "output"), ("diagonal", "both")):
            mean, std = response_chance(svd.S.numpy(), *tuned.layer.shape, counts, side)
            value = np.sqrt(np.add.reduceat(np.square(found[side]), starts) / counts)
            places = {"first": firsts, "last": lasts, "num_directions": counts.astype(np.int32)}
            rows.append({"metric": metric, "side": side} | places | {"value": value, "null": mean, "null_std": std})
        return rows


def directions(count: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Half octaves of the directions 1 … count: the first and the last of each, and at most SAMPLE of it, from 0."""
    import numpy as np

    starts = sorted({1, 2, 3} | {size * 2**power for size in (4, 6) for power in range(count.bit_length())})
    firsts = np.array([start for start in starts if start <= count], np.int32)
    lasts = np.append(firsts[1:] - 1, count).astype(np.int32)
    sizes = np.minimum(lasts - firsts + 1, SAMPLE)
    chosen = [np.linspace(a - 1, b - 1, n).round().astype(int) for a, b, n in zip(firsts, lasts, sizes, strict=True)]
    return firsts, lasts, chosen


def responses(tuned: Tuned, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """‖ΔW v_i‖, ‖ΔWᵀ u_i‖ and |u_iᵀ ΔW v_i|, by side, of W0's directions `chosen` (c,), ascending from 0."""
    import torch

    from lorabench.linalg.krylov import transposed_product

    numbers = torch.from_numpy(chosen)
    U, V = tuned.base.left[:, numbers].double(), tuned.base.right(numbers).double()
    svd, update = tuned.layer.svd, tuned.layer.update
    if tuned.layer.is_complete:
        S = svd.S[: svd.U.shape[1], None]
        written, read = svd.U.mT.double() @ U, svd.Vh.double() @ V  # (r, c), by ΔW's own directions
        forward, backward, inner = S * read, S * written, (S * read * written).sum(0)
    else:
        assert update is not None and update.A is None
        forward = (update.B @ V.to(update.B.dtype)).double()
        backward = transposed_product(update.B, U.to(update.B.dtype)).double()
        inner = (U * forward).sum(0)
    norms = {"input": forward.norm(dim=0), "output": backward.norm(dim=0), "both": inner.abs()}
    return {side: values.numpy() for side, values in norms.items()}


EXAMPLE = Profile()
