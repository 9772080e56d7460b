"""DoRA's ΔW, which needs W0, from its part s B A and its magnitudes.

Shapes: M out features, N in features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorabench.decode import InputError
from lorabench.readers._entry import Entry, Tensors
from lorabench.update import Update
from lorabench.weightfile import WeightFiles

DORA_PART = "sBA"
"""`Update.part` of its factors, which are reported beside ΔW."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dora:
    """ΔW = m ⊙ (W0 + s B A) / ‖W0 + s B A‖ - W0, by row: Liu et al. 2024, arXiv 2402.09353, equation 5."""

    sBA: Entry
    """Its factors, whichever the format."""
    tensors: Tensors
    magnitude: str
    """Name of m, one number a row, in `tensors`."""
    weights: WeightFiles
    parameter: str

    @property
    def shape(self) -> tuple[int, int]:
        shape, base = self.sBA.shape, self.weights.shape(self.parameter)
        m = math.prod(self.tensors.shape(self.magnitude))
        if not (shape == base and m == shape[0]):
            raise InputError(
                f"{self.tensors.file}: {self.parameter}: ΔW {shape}, m {m} and W0 {base} of "
                f"{self.weights.path} do not fit"
            )
        return shape

    def load(self) -> Update:
        W0, m = self.weights.read(self.parameter), self.tensors.read(self.magnitude)
        update = self.sBA.load()
        assert isinstance(update, Update)  # of singular vectors alone there is no DoRA
        part = update.dense()
        norms = (W0 + part).double().norm(dim=1)
        if not norms.all():
            raise InputError(f"{self.tensors.file}: {self.parameter}: a row of W0 + s B A is zero")
        ratio = (m.double().flatten() / norms)[:, None]
        delta = (ratio - 1) * W0 + ratio * part  # so that ΔW = 0 is 0, to the last digit of m
        return Update(
            parameter=self.parameter,
            B=delta.to(W0.dtype),
            base_norm=float(W0.double().norm()),
            precision=self.tensors.dtype(self.magnitude),  # m rounded makes of W0 a ΔW of full rank
            scale_source=update.scale_source,
        )
