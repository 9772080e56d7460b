"""ΔW carried from the old base's singular vectors to the new one's (Cross-LoRA, Xia et al. 2025).

LoRA-Align (arXiv 2508.05232, equations 1 to 6) solves P_U = argmin ‖P U − U'‖_F and P_V = argmin ‖P V − V'‖_F for the
first k singular vectors of the old and the new W0. The columns of U and V are orthonormal: the solutions of least norm
are P_U = U' Uᵀ and P_V = V' Vᵀ, and reach U' and V' exactly. Here ΔW' = P_U ΔW P_Vᵀ, what ΔW does between the old
vectors done between the new ones, for any widths. The paper's equation 7 puts P_U U and P_V V into a projection, which
is then `project`, and has a meaning only where the widths are the same.
"""

from __future__ import annotations

from lorabench.adapters.moving.maps import Move, Side, in_step
from lorabench.linalg.decompose import ThinSVD


def cross_lora(source: ThinSVD, target: ThinSVD) -> Move:
    """Of the truncated SVDs of both W0."""
    paired, onto, known = in_step(source, target)
    return Move(out=Side(onto=onto.U, of=paired.U), into=Side(onto=onto.Vh.mT, of=paired.Vh.mT), signs_known=known)
