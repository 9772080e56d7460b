"""What of an update is seen once weights are stored in bfloat16, entry by entry.

Sets of entries of a matrix (M, N) are kept as bits, eight a byte: of thousands of runs' layers many fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lorabench.updates.update import Update

if TYPE_CHECKING:
    Bits = np.ndarray[Any, np.dtype[np.uint8]]
else:
    Bits = np.ndarray

ALPHA = 0.3
"""Share of entries that count as the largest, or the smallest: the random baseline of the papers' masks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """The entries that an update `changed` in bfloat16, its `largest` ones, and how many are exactly `num_zero`.

    `changed`: where the weights before and after, both rounded to bfloat16, differ. Neighbours there are 2^-8 apart
    relative to the larger or more, so this is also where they differ by more than 1e-3 of it, the criterion of Zhu et
    al. 2025, arXiv 2511.08567. `visible` is the rank of that difference, None where the matrix is large.
    """

    changed: Bits
    largest: Bits
    num_zero: int
    num_entries: int

    @property
    def share_changed(self) -> float:
        return count(self.changed) / self.num_entries

    @property
    def share_zero(self) -> float:
        return self.num_zero / self.num_entries


@dataclass(frozen=True, kw_only=True, eq=False)
class Marked:
    """Entries of W0: the `principal` ones, largest in its approximation of low rank, and its `smallest` ones."""

    principal: Bits
    smallest: Bits


def seen(weight: Tensor, delta: Tensor) -> Seen:
    """Of W0 (M, N), float32, and ΔW (M, N)."""
    return Seen(
        changed=bits(visible(weight, delta) != 0),
        largest=largest(Update(parameter="", B=delta)),
        num_zero=int((delta == 0).sum()),
        num_entries=delta.numel(),
    )


def visible(weight: Tensor, delta: Tensor) -> Tensor:
    """bfloat16(W0 + ΔW) - bfloat16(W0), exactly, in float32."""
    return (weight + delta).bfloat16().float() - weight.bfloat16().float()


def marked(weight: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Marked:
    """Of W0 (M, N) and its approximation by the triplets `U` (M, k), `S` (k,), `Vh` (k, N).

    Principal weights: Liu et al. 2025 (LIFT), arXiv 2506.00772; both masks: Zhu et al. 2025, arXiv 2511.08567.
    """
    bound = -_kth_largest(-weight.abs(), _num_chosen(weight.numel()))
    low_rank = Update(parameter="", B=U * S.to(U.dtype), A=Vh)
    return Marked(principal=largest(low_rank), smallest=bits(weight.abs() <= bound))


def largest(update: Update) -> Bits:
    """The share ALPHA of the entries that is largest in magnitude; ties count all, zeros never."""
    sizes = update.dense().float().abs()
    return bits((sizes >= _kth_largest(sizes, _num_chosen(sizes.numel()))) & (sizes != 0))


def _kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest entry, k from 1."""
    flat = values.flatten().numpy()
    return float(np.partition(flat, len(flat) - k)[len(flat) - k])


def _num_chosen(num_entries: int) -> int:
    return max(1, round(ALPHA * num_entries))


def bits(mask: Tensor) -> Bits:
    """A mask (M, N) as bits, those that fill up the last byte unset."""
    return np.packbits(mask.numpy())


def count(*sets: Bits) -> int:
    """The number of entries that are in all of the sets."""
    common = sets[0]
    for other in sets[1:]:
        common = common & other
    return int(np.bitwise_count(common).sum(dtype=np.int64))
