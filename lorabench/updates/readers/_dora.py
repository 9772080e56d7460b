"""DoRA's ΔW, which needs W0, from its part s B A and its magnitudes.

Shapes: M out features, N in features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.updates.readers._entry import Entry, Tensors
from lorabench.updates.update import Update
from lorabench.updates.weightfile import WeightFiles


@dataclass(frozen=True, kw_only=True, eq=False)
class Dora:
    """ΔW = m ⊙ (W0 + s B A) / ‖W0 + s B A‖ - W0, by row: Liu et al. 2024, arXiv 2402.09353, equation 5.

    `parameter` names it as the file does; the base's name may be another.
    """

    sBA: Entry
    """Its factors, whichever the format."""
    tensors: Tensors
    magnitude: str
    """Name of m, one number a row, in `tensors`."""
    weights: WeightFiles
    parameter: str
    base_name: str | None = None
    """Of W0, where it is not `parameter` (blocks that are replicated)."""
    by_input: bool = False
    """Whether m has one number an input instead: of MLX's embeddings (a token), and where LyCORIS is told so."""
    rows: range | None = None
    """Those of a fused linear that these are, of m too."""

    @property
    def shape(self) -> tuple[int, int]:
        shape, base = self.sBA.shape, self.weights.shape(self.base_name or self.parameter)
        m = math.prod(self.tensors.shape(self.magnitude))
        m = m if self.rows is None else len(range(m)[self.rows.start : self.rows.stop])
        fits = m > 0 and shape[1] % m == 0 if self.by_input else m == shape[0]
        if not (shape == base and fits):
            raise InputError(
                f"{self.tensors.file}: {self.parameter}: ΔW {shape}, m {m} and W0 {base} of "
                f"{self.weights.path} do not fit"
            )
        return shape

    @property
    def kernel(self) -> tuple[int, ...]:
        """As in `Update`."""
        return getattr(self.sBA, "kernel", ())

    def load(self) -> Update:
        W0, m = self.weights.read(self.base_name or self.parameter), self.tensors.read(self.magnitude)
        update = self.sBA.load()
        assert isinstance(update, Update)  # of singular vectors alone there is no DoRA
        part = update.dense()
        m = m.double().flatten() if self.rows is None else m.double().flatten()[self.rows.start : self.rows.stop]
        ratio = self._ratio(W0 + part, m)
        delta = (ratio - 1) * W0 + ratio * part  # so that ΔW = 0 is 0, to the last digit of m
        return Update(
            parameter=self.parameter,
            B=delta.to(W0.dtype),
            base_norm=float(W0.double().norm()),
            precision=self.tensors.dtype(self.magnitude),  # m rounded makes of W0 a ΔW of full rank
            scale_source=update.scale_source,
        )

    def _ratio(self, weight: Tensor, m: Tensor) -> Tensor:
        """m / ‖weight‖ as (M, 1), or by input as (1, N), over the inputs' kernels."""
        M, N = weight.shape
        norms = (
            weight.double().reshape(M, len(m), -1).norm(dim=(0, 2)) if self.by_input else weight.double().norm(dim=1)
        )
        if not norms.all():
            side = "an input" if self.by_input else "a row"
            raise InputError(f"{self.tensors.file}: {self.parameter}: {side} of W0 + s B A is zero")
        return (m / norms).repeat_interleave(N // len(m))[None] if self.by_input else (m / norms)[:, None]
