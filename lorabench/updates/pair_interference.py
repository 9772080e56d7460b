"""How the updates of one layer by two adapters act on each other: inner product, shared directions, sign conflicts.

What needs ΔW entry by entry forms it in blocks of rows, again at each pass: memory holds one block of each update,
never ΔW. Shapes: M out features, N in features, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabench.linalg.decompose import inner_product
from lorabench.updates.update import Update

BLOCK_ENTRIES = 2**20
"""Entries of ΔW that are formed at a time."""
_LOW_BITS = 16
FEW = 2**_LOW_BITS
"""Entries that are ordered more quickly than they are counted into so many bins."""


@dataclass(frozen=True, kw_only=True)
class SignConflicts:
    """Shares of entries with opposite signs in two updates, in [0, 1]; 0.5 where the signs are independent.

    An entry that is 0 in either has no sign and is not counted; None where none is left. `top` is of those entries
    alone that are among the largest of either update. `num_all`, `num_top`: of how many entries.
    """

    all: float | None
    top: float | None
    num_all: int
    num_top: int


def inner(a: Update, b: Update) -> float:
    """⟨ΔW_a, ΔW_b⟩, the sum over entries of their product."""
    return inner_product(a.B, a.A, b.B, b.A)


def gram_overlap(X: Tensor, Y: Tensor) -> float:
    """tr(XᵀX YᵀY) = ‖X Yᵀ‖_F² of X (p, d) and Y (q, d), in blocks of rows.

    By the d × d Grams, in float64 since they cancel, where that is much the less work: of word embeddings, 40 times.
    """
    if 2 * (len(X) + len(Y)) * X.shape[1] < len(X) * len(Y):
        return float((_gram(X) * _gram(Y)).sum())
    dtype = torch.promote_types(torch.promote_types(X.dtype, Y.dtype), torch.float32)
    rows, Yt = max(1, BLOCK_ENTRIES // len(Y)), Y.to(dtype).mT
    return sum(float((block.to(dtype) @ Yt).double().square().sum()) for block in X.split(rows))


def _gram(X: Tensor) -> Tensor:
    """XᵀX in float64, (d, d)."""
    rows = max(1, BLOCK_ENTRIES // X.shape[1])
    return sum((block.mT @ block for block in map(Tensor.double, X.split(rows))), X.new_zeros((), dtype=torch.float64))


def sign_conflicts(a: Update, b: Update, top: float) -> SignConflicts:
    """Over all entries, and over those among the share `top` of largest magnitude of either update, exactly."""
    M, N = a.shape
    count = max(1, round(top * M * N))
    bounds = [kth_largest(update, count) for update in (a, b)]
    conflicts, totals = [0, 0], [0, 0]
    for x, y in zip(row_blocks(a), row_blocks(b), strict=True):
        signed = (x != 0) & (y != 0)
        opposite = signed & ((x < 0) != (y < 0))
        large = (x.abs() >= bounds[0]) | (y.abs() >= bounds[1])
        for number, chosen in enumerate((signed, signed & large)):
            totals[number] += int(chosen.sum())
            conflicts[number] += int((opposite & chosen).sum())
    shares = [conflict / total if total else None for conflict, total in zip(conflicts, totals, strict=True)]
    return SignConflicts(all=shares[0], top=shares[1], num_all=totals[0], num_top=totals[1])


def kth_largest(update: Update, k: int) -> float:
    """The k-th largest |entry| of ΔW in float32, k from 1; exact."""
    return kth_largest_of([update], k)


def kth_largest_of(updates: Sequence[Update], k: int) -> float:
    """The k-th largest |entry| of all these ΔW together, in two passes over their blocks.

    The bits of floats that are not negative order as the floats do: the first pass finds the upper bits of the
    wanted one in a histogram, the second the lower ones among those that share them. A FEW entries are ordered instead.
    """
    if sum(M * N for M, N in (update.shape for update in updates)) <= FEW:
        values = torch.cat([block.abs().flatten() for update in updates for block in row_blocks(update)])
        return float(values.kthvalue(len(values) - k + 1).values)
    upper = torch.zeros(2**_LOW_BITS, dtype=torch.int64)
    for bits in _magnitudes(updates):
        upper += torch.bincount(bits >> _LOW_BITS, minlength=len(upper))
    high, rank = _bin_of(upper, k)
    lower = torch.zeros_like(upper)
    for bits in _magnitudes(updates):
        lower += torch.bincount(bits[bits >> _LOW_BITS == high] & (2**_LOW_BITS - 1), minlength=len(lower))
    low, _ = _bin_of(lower, rank)
    return float(torch.tensor((high << _LOW_BITS) | low, dtype=torch.int32).view(torch.float32))


def _magnitudes(updates: Sequence[Update]) -> Iterator[Tensor]:
    """The bits of |ΔW|, as whole numbers, block by block."""
    return (block.abs().flatten().view(torch.int32) for update in updates for block in row_blocks(update))


def _bin_of(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest value, and which of the bin's it is."""
    above = histogram.flip(0).cumsum(0)
    position = int((above < k).sum())
    before = int(above[position - 1]) if position else 0
    return len(histogram) - 1 - position, k - before


def row_blocks(update: Update) -> Iterator[Tensor]:
    """ΔW (rows, N) in float32, some rows at a time: the same bits at each pass."""
    dtype = torch.promote_types(update.B.dtype, torch.float32)
    A = None if update.A is None else update.A.to(dtype)
    for B in update.B.split(_num_rows(update)):
        yield (B if A is None else B.to(dtype) @ A).float()


def _num_rows(update: Update) -> int:
    return max(1, BLOCK_ENTRIES // update.shape[1])
