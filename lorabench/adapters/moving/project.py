"""ΔW projected onto the span of the new base's leading singular vectors (LoRA-X, Farhadzadeh et al. 2025).

ΔW' = U' U'ᵀ ΔW V' V'ᵀ with the first k singular vectors U' (M', k), V' (N', k) of the new W0 (arXiv 2501.16559,
section 4.2, equation 3). Where the width of a side differs, the least-squares map U' Uᵀ of the old vectors to the new
ones takes the place of that side's projection.
"""

from __future__ import annotations

from lorabench.adapters.moving.maps import Move, Side, in_step
from lorabench.linalg.decompose import ThinSVD


def project(source: ThinSVD, target: ThinSVD) -> Move:
    """Of the truncated SVDs of both W0."""
    paired, onto, known = in_step(source, target)
    is_same_out, is_same_in = len(source.U) == len(target.U), source.Vh.shape[1] == target.Vh.shape[1]
    U, V = target.U, target.Vh.mT
    return Move(
        out=Side(onto=U, of=U) if is_same_out else Side(onto=onto.U, of=paired.U),
        into=Side(onto=V, of=V) if is_same_in else Side(onto=onto.Vh.mT, of=paired.Vh.mT),
        signs_known=known,
    )
