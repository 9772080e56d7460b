"""Which triplets of W0 + ΔW an intervention scales: the intruders of a matrix, and what they are held against.

    intruders   of the top k left singular vectors those that are like none of W0 (see analysis `intruders`)
    control     as many triplets that are no intruders: of those that analyses look at (32), the nearest in σ
    random      the intruders' singular values in random directions: a change of the same size

Shapes: M out features, N in features, n intruders.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabench.analyses.intruders import judge
from lorabench.analysis.bases import Bases
from lorabench.config.decode import InputError
from lorabench.linalg.decompose import ThinSVD, one_thread
from lorabench.store.record import RunRecord
from lorabench.updates import formats
from lorabench.updates.base import Tuned

INTRUDERS, CONTROL, RANDOM = KINDS = ("intruders", "control", "random")


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """Of one matrix W0 + ΔW (M, N) the `triplets` of each kind, n of them (of `control` fewer where there are no more).

    `cosines`: the largest |cos| with W0's left singular vectors, by which intruders and control were told apart.
    `num_degenerate` intruders have a neighbour's singular value to 1%, so that their single vectors mean little.
    """

    parameter: str
    triplets: dict[str, ThinSVD]
    cosines: dict[str, Tensor]
    num_degenerate: int

    def describe(self) -> dict[str, Any]:
        """For a record: what was scaled, without the vectors."""
        return {
            "parameter": self.parameter,
            "singular_values": {kind: self.triplets[kind].S.tolist() for kind in self.cosines},
            "largest_cosines": {kind: cosines.tolist() for kind, cosines in self.cosines.items()},
            "num_degenerate": self.num_degenerate,
        }


def find_directions(record: RunRecord, folder: Path, bases: Bases, epsilon: float, top: int) -> list[Directions]:
    """Of every matrix that has changed and has a W0. InputError where the base or ΔW cannot be read."""
    if bases.find(record) is None:
        raise InputError(f"RUN = {record.run_id}: intruders are counted against its base, which cannot be read")
    found = []
    for entry in formats.open_layers(folder).values():
        tuned = bases.tuned(record, formats.load_layer(entry))
        if tuned is not None and tuned.layer.svd.numerical_rank:
            with one_thread():
                found.append(choose(tuned, epsilon, top))
    return found


def choose(tuned: Tuned, epsilon: float, top: int) -> Directions:
    """The intruders among the top triplets of one matrix, and their controls."""
    svd, judged = tuned.svd, judge(tuned.base, tuned.svd)
    is_intruder = judged.cosines < epsilon
    intruders, others = is_intruder[:top].nonzero().flatten(), (~is_intruder).nonzero().flatten()
    chosen = {INTRUDERS: intruders, CONTROL: others[nearest(svd.S[intruders], svd.S[others])]}
    triplets = {kind: ThinSVD(U=svd.U[:, at], S=svd.S[at], Vh=svd.Vh[at]) for kind, at in chosen.items()}
    parameter = tuned.layer.parameter
    return Directions(
        parameter=parameter,
        triplets=triplets | {RANDOM: random_triplets(parameter, svd.S[intruders], tuned.layer.shape)},
        cosines={kind: judged.cosines[at] for kind, at in chosen.items()},
        num_degenerate=int(judged.degenerate[intruders].sum()),
    )


def nearest(wanted: Tensor, given: Tensor) -> Tensor:
    """Pair the values (n,) with others (m,), each once, at the smallest total distance: min(n, m) indices into m."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment((wanted[:, None] - given).abs().numpy())
    return torch.from_numpy(columns).sort().values


def random_triplets(parameter: str, S: Tensor, shape: tuple[int, int]) -> ThinSVD:
    """Values S (n,) in random orthonormal directions: the same at each call, others in each matrix."""
    generator = torch.Generator().manual_seed(zlib.crc32(parameter.encode()))
    U, V = (torch.linalg.qr(torch.randn(d, len(S), generator=generator)).Q for d in shape)
    return ThinSVD(U=U, S=S, Vh=V.mT)
