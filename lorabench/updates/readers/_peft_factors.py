"""The factors of one module in PEFT's format.

Shapes: M out features, N in features, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.updates.readers._entry import Tensors
from lorabench.updates.update import Update


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """The tensors `B` and `A` of one module."""

    tensors: Tensors
    B: str
    A: str
    parameter: str
    scale: float
    rank: int
    base_norm: float | None
    part: str | None = None
    magnitude: str | None = None
    """Of DoRA: the name of m, one number an output."""
    initial: tuple[Tensors, str, str] | None = None
    """Where B0 and A0 are, and their names."""
    scale_source: str = "config"

    @property
    def groups(self) -> int:
        """Of a grouped convolution, whose B (out, r / groups, 1, 1) is a block of a block-diagonal one."""
        B, A = self.tensors.shape(self.B), self.tensors.shape(self.A)
        if min(len(A), len(B)) < 3 or not B[1]:
            return 1
        number = A[0] // B[1]
        return number if number and A[0] % B[1] == 0 == B[0] % number else 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """As in `Update`."""
        return self.tensors.shape(self.A)[2:]

    @property
    def shape(self) -> tuple[int, int]:
        B, A = self.tensors.shape(self.B), self.tensors.shape(self.A)
        if not (len(A) == len(B) >= 2 and B[1] * self.groups == A[0] == self.rank and set(B[2:]) <= {1}):
            raise InputError(
                f"{self.tensors.file}: {self.parameter}: B {B} and A {A} do not fit each other and rank {self.rank}"
            )
        return B[0], math.prod(A[1:])

    def load(self) -> Update:
        B, A = self._pair(self.tensors, self.B, self.A)
        if self.initial:
            B0, A0 = self._pair(*self.initial)
            B, A = torch.cat([B, -B0.to(B)], 1), torch.cat([A, A0.to(A)])
        return Update(
            parameter=self.parameter,
            part=self.part,
            B=B,
            A=A,
            base_norm=self.base_norm,
            scale=self.scale,
            scale_source=self.scale_source,
            kernel=self.kernel,
        )

    def _pair(self, tensors: Tensors, B_name: str, A_name: str) -> tuple[Tensor, Tensor]:
        M, N = self.shape
        B, A = tensors.read(B_name), tensors.read(A_name)
        if B.numel() * self.groups != M * self.rank or A.numel() != self.rank * N:
            raise InputError(f"{tensors.file}: {A_name}: {tuple(A.shape)} is not of the trained factors' shape")
        dtype = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
        B = B.to(dtype).reshape(M, -1) * self.scale
        if self.groups > 1:
            B = torch.block_diag(*B.chunk(self.groups))
        return B, A.to(dtype).reshape(self.rank, N)
