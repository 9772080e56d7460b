"""A linear layer of the base with the factors of several runs on it, each on its own rows of the batch.

Shapes: K runs, n examples of t positions each in a pass, N in and M out features, R the highest rank of the runs here.
The factors of a run of lower rank are filled up with rows of zeros, which stay zero: the gradient of either side of
such a row is a product with the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Unpackable(Exception):
    """The model does not compute the rows of a batch one by one here, so that several runs could not share it."""


@dataclass
class Lanes:
    """Of the pass that is being computed: whose rows are whose."""

    num_rows: int = 0
    """K n."""
    lengths: Sequence[int] = ()
    """Of each run's own batch, which may be padded to that of another."""
    generators: Sequence[torch.Generator] = ()
    """Each run's own, of which its dropout is drawn."""
    hook: Tensor = field(default_factory=lambda: torch.zeros(0, requires_grad=True))
    """Makes autograd call the layers' backward pass, where the gradients of the factors are made, unknown to it."""


@dataclass(kw_only=True)
class Factors:
    """What the runs train in a layer, and where its gradients are added up; zeros of a run that trains nothing here."""

    A: Tensor
    """(K, R, N)."""
    B: Tensor
    """(K, R, M), transposed."""
    grad_A: Tensor
    grad_B: Tensor
    scale: Tensor
    """(K, 1, 1)."""
    dropout: list[float | None]
    """None: the run has no factors here, and draws nothing."""
    start: tuple[Tensor, Tensor] | None = None
    """What some runs have taken out of the base, with its scale: A0 (K, R0, N), s B0 (K, R0, M)."""


class PackedLinear(nn.Module):
    """In the place of a linear layer, quantized or not, for a batch of all runs' rows, one run after another."""

    factors: Factors

    def __init__(self, base_layer: nn.Module, lanes: Lanes):
        super().__init__()
        self.base_layer, self.lanes = base_layer, lanes
        self.is_plain = type(base_layer) is nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(K n, t, N) -> (K n, t, M)."""
        if x.ndim != 3 or x.shape[0] != self.lanes.num_rows:
            raise Unpackable(f"a layer is given {tuple(x.shape)}, not the {self.lanes.num_rows} rows of the batch")
        y = None if self.is_plain else self.base_layer(x)
        return _Packed.apply(self.lanes.hook, x, y, self, self._mask(x))

    def _mask(self, x: Tensor) -> Tensor | None:
        """(K, n t, N): what dropout multiplies each run's inputs by, drawn as torch draws it for the run alone."""
        shares = self.factors.dropout
        if not self.training or not any(shares):
            return None
        rows, features = x.shape[0] // len(shares), x.shape[2]
        mask = torch.ones(len(shares), rows, x.shape[1], features, dtype=self.factors.A.dtype, device=x.device)
        for own, share, length, generator in zip(mask, shares, self.lanes.lengths, self.lanes.generators, strict=True):
            if share:
                drawn = mask.new_empty(rows, length, features).bernoulli_(1 - share, generator=generator)
                own[:, :length] = drawn.div_(1 - share)
        return mask.flatten(1, 2)


class _Packed(torch.autograd.Function):
    """y + s (x ∘ mask) Aᵀ B, run by run; y = W x + b where the base layer is plain, else it is given."""

    @staticmethod
    def forward(
        ctx: Any, hook: Tensor, x: Tensor, y: Tensor | None, layer: PackedLinear, mask: Tensor | None
    ) -> Tensor:
        factors, base = layer.factors, layer.base_layer
        ctx.factors, ctx.shape, ctx.dtype = factors, x.shape, x.dtype
        auto = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        with torch.autocast(x.device.type, enabled=False) if auto else contextlib.nullcontext():
            if y is None:
                weight, bias = base.weight, base.bias
                if auto is not None:
                    x, weight, bias = x.to(auto), weight.to(auto), None if bias is None else bias.to(auto)
                y = nn.functional.linear(x, weight, bias)
                ctx.weight = weight
            else:
                ctx.weight = None
                y = y.clone()
            dtype = auto or factors.A.dtype
            inputs = x.reshape(len(factors.A), -1, x.shape[-1]).to(dtype)
            outputs = y.view(len(factors.A), -1, y.shape[-1])
            if factors.start is not None:
                A0, B0 = (part.to(dtype) for part in factors.start)
                _add_product(outputs, torch.bmm(inputs, A0.mT).neg_(), B0)
            if mask is not None:
                inputs = inputs * mask.to(dtype)
            h = torch.bmm(inputs, factors.A.to(dtype).mT).mul_(factors.scale.to(dtype))
            _add_product(outputs, h, factors.B.to(dtype))
        ctx.save_for_backward(inputs, h, mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, h, mask = ctx.saved_tensors
        factors, dtype = ctx.factors, inputs.dtype
        own = grad.reshape(len(factors.A), -1, grad.shape[-1]).to(dtype)
        _add_product(factors.grad_B, h.mT, own)
        dh = torch.bmm(own, factors.B.to(dtype).mT).mul_(factors.scale.to(dtype))
        _add_product(factors.grad_A, dh.mT, inputs)
        to_given = grad if ctx.weight is None else None
        if not ctx.needs_input_grad[1]:
            return None, None, to_given, None, None
        if ctx.weight is not None:
            dx = grad.reshape(-1, grad.shape[-1]) @ ctx.weight
        else:
            dx = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device)
        dx = dx.view(len(factors.A), -1, ctx.shape[-1])
        if mask is None:
            _add_product(dx, dh, factors.A.to(dtype))
        else:
            dx.add_(torch.bmm(dh, factors.A.to(dtype)).mul_(mask.to(dtype)))
        if factors.start is not None:
            A0, B0 = (part.to(dtype) for part in factors.start)
            _add_product(dx, torch.bmm(own, B0.mT).neg_(), A0)
        return None, dx.view(ctx.shape).to(ctx.dtype), to_given, None, None


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """to += left @ right, run by run."""
    if to.dtype == left.dtype and to.is_contiguous():  # else torch multiplies one run after another
        to.baddbmm_(left, right)
    else:
        to.add_(torch.bmm(left, right))
