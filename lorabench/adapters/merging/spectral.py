"""Merges by singular directions, in the small core that a layer's adapters share: Iso-C, TSV-Merge, and KnOTS' basis.

Each takes a layer's factors of T adapters, weights folded in, and gives the merge's factors. ΔW is never formed: a QR
of all factors together and SVDs of the core's size. Shapes as in `lorabench.linalg.joint`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabench.linalg.joint import Joint, Pair, join


def iso_c(pairs: Sequence[Pair]) -> Pair:
    """σ̄ U Vᵀ of Σ ΔW_t = U diag(σ) Vᵀ, with σ̄ the mean of σ: every direction counts alike.

    Marczak et al. 2025, arXiv 2502.04959, section 4.1. The mean is over the rank of the sum: the directions beyond it,
    which the authors' code counts too for a full fine-tuning, are arbitrary of an adapter.
    """
    joint = join(pairs)
    U, S, Vh = torch.linalg.svd(joint.total, full_matrices=False)
    rank = max(1, joint.rank(S))
    return joint.expand(U[:, :rank] * S[:rank].mean(), Vh[:rank])


def tsv(pairs: Sequence[Pair]) -> Pair:
    """U⊥ diag(σ) V⊥ᵀ of the top singular triplets of each ΔW_t side by side, U⊥ and V⊥ the nearest orthonormal columns.

    TSV-Merge (Gargiulo et al. 2025, arXiv 2412.00081, section 4): min(M, N) / T triplets of each adapter at most, which
    is all of them but for many adapters of high rank; U⊥ = X Yᵀ with [U_1 … U_T] = X D Yᵀ.
    """
    joint = join(pairs)
    most = max(1, min(len(joint.Q), len(joint.P)) // len(pairs))
    triplets = [_top(joint, core, most) for core in joint.cores()]
    U, S, Vh = (torch.cat(parts, dim) for parts, dim in zip(zip(*triplets, strict=True), (1, 0, 0), strict=True))
    return joint.expand(_orthonormal(joint, U) * S, _orthonormal(joint, Vh.mT).mT)


def _top(joint: Joint, core: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    rank = min(most, joint.rank(S))
    return U[:, :rank], S[:rank], Vh[:rank]


def _orthonormal(joint: Joint, X: Tensor) -> Tensor:
    """The nearest to `X` (d, k) with orthonormal columns; where its columns depend on one another, the partial isometry
    on what they span."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    rank = joint.rank(S) if len(S) else 0
    return U[:, :rank] @ Vh[:rank]


def aligned(pairs: Sequence[Pair]) -> tuple[Tensor, list[Pair]]:
    """U (M, R) and, for each adapter, the factors (R, r_t) and (r_t, N) of Σ V_tᵀ, where [ΔW_1 … ΔW_T] = U Σ [V_1ᵀ …].

    KnOTS (Stoica et al. 2025, arXiv 2410.19735, section 4): entries are compared in a basis of what all adapters write.
    R is the rank of the concatenation.
    """
    joint = join(pairs)
    U, S, _ = torch.linalg.svd(torch.cat(joint.cores(), 1), full_matrices=False)
    U = U[:, : max(1, joint.rank(S))]
    rotated = [((U.mT @ B).to(joint.dtype), A.to(joint.dtype)) for B, (_, A) in zip(joint.B, pairs, strict=True)]
    return (joint.Q @ U).to(joint.dtype), rotated
