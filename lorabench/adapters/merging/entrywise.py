"""Merges that look at each entry of ΔW: TIES and DARE, on ΔW itself and over all layers, as their papers define them.

PEFT's combinations of these names work on the factors A and B apart. Blocks of rows are formed, merged and dropped;
only the merge, which is of full rank, is held whole, a layer at a time. Shapes: M out features, N in features, T
adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lorabench.linalg.joint import Pair
from lorabench.updates.pair_interference import kth_largest_of, row_blocks
from lorabench.updates.update import Update

Layers = Mapping[str, Sequence[Pair]]
"""Layer -> the factors of each of the T adapters, weights folded in."""


def ties(layers: Layers, density: float) -> Iterator[tuple[str, Tensor]]:
    """Each layer's merge (M, N): trim, elect a sign, average what has it.

    Yadav et al. 2023, arXiv 2306.01708, section 4 and algorithm 1: of each adapter the share `density` of largest
    magnitude stays, among the entries of all layers together; an entry's sign is that of the sum over adapters; the
    mean is over those that stayed and have this sign, 0 where none has.
    """
    bounds = [_bound(adapter, density) for adapter in _by_adapter(layers)]
    for name, pairs in layers.items():
        yield name, torch.cat([_merged(block, bounds) for block in _blocks(pairs)])


def dare(layers: Layers, density: float, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Each layer's Σ ΔW_t ⊙ mask_t / `density` (M, N): an entry stays with probability `density`, by itself.

    Yu et al. 2024, arXiv 2311.03099, section 3.2, with task arithmetic. The mean over masks is Σ ΔW_t.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, pairs in layers.items():
        kept = [block * (torch.rand(block.shape, generator=generator) < density) for block in _blocks(pairs)]
        yield name, torch.cat([block.sum(0) for block in kept]) / density


def _by_adapter(layers: Layers) -> Iterator[list[Update]]:
    updates = [[Update(parameter=name, B=B, A=A) for B, A in pairs] for name, pairs in layers.items()]
    return (list(adapter) for adapter in zip(*updates, strict=True))


def _bound(adapter: list[Update], density: float) -> float:
    """The magnitude from which on an entry stays."""
    count = sum(M * N for M, N in (update.shape for update in adapter))
    return kth_largest_of(adapter, max(1, int(density * count)))


def _blocks(pairs: Sequence[Pair]) -> Iterator[Tensor]:
    """(T, rows, N), some rows at a time."""
    updates = [row_blocks(Update(parameter="", B=B, A=A)) for B, A in pairs]
    return (torch.stack(blocks) for blocks in zip(*updates, strict=True))


def _merged(block: Tensor, bounds: list[float]) -> Tensor:
    """(rows, N) of `block` (T, rows, N)."""
    kept = torch.where(block.abs() >= torch.tensor(bounds)[:, None, None], block, 0)
    agrees = kept.sign() * kept.sum(0).sign() > 0
    return (kept * agrees).sum(0) / agrees.sum(0).clamp_min(1)
