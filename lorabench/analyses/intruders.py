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
    """Rows {metric, epsilon, k, value, null, num_degenerate}.

    The j-th left singular vector y_j of W0 + ΔW is an intruder when max over all left singular vectors x_i of W0 of
    |cos(y_j, x_i)| is below ε; counted among the top k (Shuttleworth et al. 2024, arXiv 2410.21228). `num_intruders` is
    the count of one matrix at the paper's ε = 0.5, k = 10 (the paper sums over matrices), `count` the same over a grid,
    `largest_cosine` what y_k is judged by. `null`: an update with all the same singular values in random directions,
    one draw. `num_degenerate` says of how many of the intruders (for `largest_cosine`: whether of y_k itself) the
    singular value is within 1% of a neighbour's, so that single vectors mean little.
    """

    needs: ClassVar[Literal["base"]] = "base"
    version: ClassVar[int] = 3
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

        (tuned,) = layers
        if not tuned.layer.svd.numerical_rank:
            return []
        found = judge(tuned.base, tuned.svd)
        null = judge(tuned.base, tuned.null.svd)
        size = len(found.cosines)
        grid = [(epsilon, k) for epsilon in EPSILONS for k in TOPS if k <= size]
        vectors = {"value": found.cosines, "null": null.cosines, "num_degenerate": found.degenerate}
        return [
            {"metric": "num_intruders"} | _counts([(EPSILON, TOP)], found, null),
            {"metric": "count"} | _counts(grid, found, null),
            {"metric": "largest_cosine", "epsilon": np.full(size, np.nan), "k": np.arange(1, size + 1, dtype=np.int32)}
            | {key: column.double().numpy() for key, column in vectors.items()},
        ]


def _counts(grid: list[tuple[float, int]], found: Judged, null: Judged) -> dict[str, Any]:
    import numpy as np

    epsilon, k = np.array([place[0] for place in grid]), np.array([place[1] for place in grid], np.int32)
    value, num_degenerate = found.counts(epsilon, k)
    counts = {"value": value, "null": null.counts(epsilon, k)[0], "num_degenerate": num_degenerate}
    return {"epsilon": epsilon, "k": k} | {key: each.astype(np.float64) for key, each in counts.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """`cosines` (k,): the largest |cos| of each top left vector of W0 + ΔW with any of W0; `degenerate` (k,)."""

    cosines: Tensor
    degenerate: Tensor

    def counts(self, epsilon: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many of the top k are below ε, by pairs of `epsilon` and `k` (c,), and how many of these degenerate."""
        import numpy as np

        cosines = self.cosines.numpy()
        is_below = cosines < epsilon.astype(cosines.dtype)[:, None]
        places = np.minimum(k, len(self.cosines))[:, None] - 1
        both = (is_below, is_below & self.degenerate.numpy())
        below, unsure = (np.take_along_axis(each.cumsum(1), places, 1)[:, 0] for each in both)
        return below, unsure


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
