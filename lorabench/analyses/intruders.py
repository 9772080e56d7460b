"""Intruder dimensions: top singular directions of W0 + ΔW that are like none of W0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lorabench.linalg.decompose import ThinSVD
    from lorabench.updates.base import BaseLayer, Tuned

EPSILONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOPS = (1, 2, 5, 10, 20, 32)
EPSILON, TOP = 0.5, 10
"""Those of the paper."""
DEGENERATE = 0.01
"""Singular values nearer than this to their neighbour, relative to their own size, have no direction of their own."""


@dataclass(frozen=True, kw_only=True)
class Intruders(Analysis):
    """Rows {metric, epsilon, k, value, null, null_std, num_degenerate}.

    The j-th left singular vector y_j of W0 + ΔW is an intruder when max over all left singular vectors x_i of W0 of
    |cos(y_j, x_i)| is below ε; counted among the top k (Shuttleworth et al. 2024, arXiv 2410.21228). `num_intruders` is
    the count of one matrix at the paper's ε = 0.5, k = 10 (the paper sums over matrices), `count` the same over a grid,
    `largest_cosine` what y_k is judged by. `null`: updates with all the same singular values in random directions,
    mean and standard deviation over the draws of `Tuned.nulls`. `num_degenerate` says of how many of the intruders (for
    `largest_cosine`: whether of y_k itself) the singular value is within 1% of a neighbour's, so that single vectors
    mean little.
    """

    needs: ClassVar[Literal["base"]] = "base"
    version: ClassVar[int] = 4
    metrics: ClassVar[dict[str, str]] = {
        "num_intruders": "intruder dimensions among the top 10 of a matrix, ε = 0.5; null: random directions",
        "count": "intruder dimensions among the top k at ε; null: ΔW's singular values in random directions",
        "largest_cosine": "largest |cos| of the k-th left singular vector of W0 + ΔW with any of W0",
    }
    per_layer: ClassVar[dict[str, str]] = {"num_intruders": ""}
    columns: ClassVar[dict[str, str]] = {
        "epsilon": "cosine below which a direction is an intruder",
        "num_degenerate": "of how many of the intruders (for `largest_cosine`: whether of the one vector) the singular "
        "value is within 1% of a neighbour's, so that the vector alone means little",
    }

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        import numpy as np

        from lorabench.linalg.nulls import over_draws

        (tuned,) = layers
        if not tuned.layer.svd.numerical_rank:
            return []
        found = judge(tuned.base, tuned.svd)
        draws = [judge(tuned.base, null.svd) for null in tuned.nulls]
        size = len(found.cosines)
        grid = [(epsilon, k) for epsilon in EPSILONS for k in TOPS if k <= size]
        null, std = over_draws([draw.cosines.double().numpy() for draw in draws])
        vectors = {"value": found.cosines.double().numpy(), "null": null, "null_std": std}
        return [
            {"metric": "num_intruders"} | _counts([(EPSILON, TOP)], found, draws),
            {"metric": "count"} | _counts(grid, found, draws),
            {"metric": "largest_cosine", "epsilon": np.full(size, np.nan), "k": np.arange(1, size + 1, dtype=np.int32)}
            | vectors
            | {"num_degenerate": found.degenerate.double().numpy()},
        ]


def _counts(grid: list[tuple[float, int]], found: Judged, draws: list[Judged]) -> dict[str, Any]:
    import numpy as np

    from lorabench.linalg.nulls import over_draws

    epsilons, tops = (np.array(each) for each in zip(*grid, strict=True))
    null, std = over_draws([draw.counts(epsilons, tops) for draw in draws])
    columns = {
        "epsilon": epsilons,
        "k": tops,
        "value": found.counts(epsilons, tops),
        "null": null,
        "null_std": std,
        "num_degenerate": found.counts(epsilons, tops, degenerate=True),
    }
    return {key: values.astype(np.int32 if key == "k" else np.float64) for key, values in columns.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """`cosines` (k,): the largest |cos| of each top left vector of W0 + ΔW with any of W0; `degenerate` (k,)."""

    cosines: Tensor
    degenerate: Tensor

    def count(self, epsilon: float, top: int) -> int:
        return int((self.cosines[:top] < epsilon).sum())

    def counts(self, epsilons: np.ndarray, tops: np.ndarray, *, degenerate: bool = False) -> np.ndarray:
        """The same for each of `epsilons` (n,) with its `tops` (n,); of those alone that are `degenerate`."""
        import numpy as np

        below = self.cosines.numpy()[:, None] < epsilons
        if degenerate:
            below &= self.degenerate.numpy()[:, None]
        counts: np.ndarray = below.cumsum(0)[np.minimum(tops, len(below)) - 1, np.arange(len(tops))]
        return counts


def judge(base: BaseLayer, svd: ThinSVD) -> Judged:
    """Hold the top left vectors of W0 + ΔW against all of W0."""
    cosines, _ = base.largest_cosines(svd.U)
    return Judged(cosines=cosines, degenerate=degenerate(svd.S))


def degenerate(S: Tensor) -> Tensor:
    """Which of the values (k,), descending, are within DEGENERATE of a neighbour; the last one's next is not known."""
    import torch

    near = S[:-1] - S[1:] <= DEGENERATE * S[:-1]
    edge = torch.zeros(1, dtype=torch.bool)
    return torch.cat([near, edge]) | torch.cat([edge, near])


EXAMPLE = Intruders()
