"""ΔW of one weight that two files have: what was trained, less what it began with."""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.config.decode import InputError
from lorabench.updates.update import Update
from lorabench.updates.weightfile import WeightFiles

_COARSEST_FIRST = ("float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Difference:
    """One weight in both checkpoints."""

    tuned: WeightFiles
    base: WeightFiles
    name: str
    parameter: str
    """Its name in the base."""
    called: str | None = None
    """The name of ΔW, where it is not that in the base (blocks that are replicated)."""

    @property
    def shape(self) -> tuple[int, int]:
        shape, before = self.tuned.shape(self.name), self.base.shape(self.parameter)
        if shape != before:
            raise InputError(f"{self.tuned.path}: {self.name}: {shape}, and the base's is {before}")
        return shape

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a convolution: (height, width)."""
        stored = self.base.stored_shape(self.parameter)
        return stored[2:] if len(stored) == 4 else ()

    def load(self) -> Update:
        delta = self.tuned.read(self.name)
        before = self.base.read(self.parameter)
        norm = float(before.double().norm())
        return Update(
            parameter=self.called or self.parameter,
            B=(delta.to(before.dtype) - before).contiguous(),
            base_norm=norm,
            precision=coarser(self.tuned.dtype(self.name), self.base.dtype(self.parameter)),
        )


def coarser(one: str, other: str) -> str:
    """The dtype of the two that has fewer bits after the point; an unknown one is the coarsest."""
    return min(one, other, key=lambda dtype: _COARSEST_FIRST.index(dtype) if dtype in _COARSEST_FIRST else -1)
