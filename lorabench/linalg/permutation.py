"""Permutation test of whether two subspaces share directions, and the correction over the layers that are tested.

Shapes: d the dimension of the space, p and q of its subspaces. Draws have fixed seeds: the same spaces always give the
same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

EXCEEDANCES = 20
"""Draws at least as large as what is observed after which the test stops: a p-value is then right to 22% (1 / √20)."""
FEWEST, MOST = 999, 9999
"""Draws, at most: of large matrices, of small ones."""
_WORK = 2**22
"""Entries that a test permutes before it stops at fewer draws than MOST: some 5 ms."""
_BLOCK_ENTRIES = 2**16
"""Of permutations that are held at a time: with 64 columns 16 MiB of float32 are permuted."""


def permutation_p_value(U: Tensor, V: Tensor, most: int | None = None, seed: int = 0) -> float:
    """Permutation test of whether the column spaces of `U` (d, p) and `V` (d, q) share directions, one-sided.

    Null hypothesis: the coordinates of one space have nothing to do with those of the other. The rows of one are
    permuted at random, which keeps the distribution of its entries: a few coordinates that are large in each, others
    in one than in the other, make large overlaps likely, and are no evidence here. But T = ‖UᵀPV‖_F² is also large
    where the same coordinates are large in both, with signs and directions that have nothing to do with each other:
    equal variances of the coordinates are enough to reject, and no shared direction need be behind it.

    Draws go on until EXCEEDANCES of them are at least as large as T, so there are more where p is small: then
    p = EXCEEDANCES / draws; after `most` (None: FEWEST to MOST by size), p = (1 + #{T_draw ≥ T}) / (most + 1). Either
    way P(p ≤ α) ≤ α where the hypothesis holds (Besag and Clifford 1991, Biometrika 78(2)).
    """
    if U.shape[1] < V.shape[1]:
        U, V = V, U  # of the smaller one less is permuted; P and its inverse are equally likely
    most = most or most_draws(*V.shape)
    bound = float((U.mT @ V).square().sum()) * (1 - 1e-5)  # ties count: of the whole space all draws are equal
    rows, drawn, exceeded = V.contiguous().numpy(), 0, 0
    for orders in _permutations(len(V), most, seed):
        permuted = torch.from_numpy(rows.take(orders.T, axis=0))  # (d, n, q)
        overlaps = (U.mT @ permuted.flatten(1)).square_().view(U.shape[1], *permuted.shape[1:]).sum((0, 2))
        counts = exceeded + (overlaps >= bound).cumsum(0)
        if int(counts[-1]) >= EXCEEDANCES:
            return EXCEEDANCES / (drawn + 1 + int(torch.searchsorted(counts, EXCEEDANCES)))
        drawn, exceeded = drawn + len(orders), int(counts[-1])
    return (1 + exceeded) / (most + 1)


def most_draws(d: int, columns: int) -> int:
    """After how many draws a test gives up that permutes the rows of (d, columns)."""
    return max(FEWEST, min(MOST, _WORK // (d * columns)))


def _permutations(d: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """`count` permutations of d rows, in blocks (n, d); the same for all layers of a width."""
    size = max(1, min(256, _BLOCK_ENTRIES // d))
    for number, start in enumerate(range(0, count, size)):
        yield _block(d, size, number, seed)[: count - start]


@lru_cache(maxsize=256)
def _block(d: int, size: int, number: int, seed: int) -> np.ndarray:
    orders = np.tile(np.arange(d, dtype=np.int32), (size, 1))
    return np.random.default_rng([d, number, seed]).permuted(orders, axis=1)


def corrected(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The p-values of several tests, corrected: of those that are then at most q a share q at most is false on average.

    Benjamini and Hochberg 1995, JRSS B 57(1), for tests that are independent or positively dependent, as those of one
    model's layers. Not Holm's correction, which no p-value of a thousand draws passes among a hundred layers.
    """
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(np.asarray(p_values, float))) if len(p_values) else np.empty(0)
