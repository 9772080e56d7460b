"""A linear layer of the base with the factors of several runs on it, each on its own rows of the batch.

Shapes: K runs, n examples of t positions each in a pass, N in and M out features. Runs of about one rank are a group,
of k runs; R is the highest rank in it. The factors of a run of lower rank are filled up with rows of zeros, which stay
zero: the gradient of either side of such a row is a product with the other.
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
    """Of each run's own batch, which may be padded to that of another; 0 of images, all of which have as many."""
    generators: Sequence[torch.Generator] = ()
    """Each run's own, of which its dropout is drawn."""
    hook: Tensor = field(default_factory=lambda: torch.zeros(0, requires_grad=True))
    """Makes autograd call the layers' backward pass, where the gradients of the factors are made, unknown to it."""


@dataclass(kw_only=True)
class Factors:
    """What a group of runs trains in a layer, and where its gradients are added up; zeros of a run that trains nothing
    here."""

    runs: slice
    """Which of the K they are."""
    A: Tensor
    """(k, R, N)."""
    B: Tensor
    """(k, R, M), transposed."""
    grad_A: Tensor
    grad_B: Tensor
    scale: Tensor
    """(k, 1, 1)."""
    dropout: list[float | None]
    """None: the run has no factors here, and draws nothing."""
    start: tuple[Tensor, Tensor] | None = None
    """What some runs have taken out of the base, with its scale: A0 (k, R0, N), s B0 (k, R0, M)."""


class PackedLinear(nn.Module):
    """In the place of a linear layer, quantized or not, for a batch of all runs' rows, one run after another."""

    groups: list[Factors]
    """Of the runs that train something here, in their order."""

    def __init__(self, base_layer: nn.Module, lanes: Lanes):
        super().__init__()
        self.base_layer, self.lanes = base_layer, lanes
        self.is_plain = type(base_layer) is nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(K n, t, N) -> (K n, t, M)."""
        if x.ndim != 3 or x.shape[0] != self.lanes.num_rows:
            raise Unpackable(f"a layer is given {tuple(x.shape)}, not the {self.lanes.num_rows} rows of the batch")
        y = None if self.is_plain else self.base_layer(x)
        return _Packed.apply(self.lanes.hook, x, y, self, [self._mask(group, x) for group in self.groups])

    def _mask(self, group: Factors, x: Tensor) -> Tensor | None:
        """(k, n t, N): what dropout multiplies each run's inputs by, drawn as torch draws it for the run alone."""
        shares = group.dropout
        if not self.training or not any(shares):
            return None
        lengths, generators = self.lanes.lengths[group.runs], self.lanes.generators[group.runs]
        rows, features = x.shape[0] // len(self.lanes.lengths), x.shape[2]
        mask = torch.ones(len(shares), rows, x.shape[1], features, dtype=group.A.dtype, device=x.device)
        for own, share, length, generator in zip(mask, shares, lengths, generators, strict=True):
            if share:
                drawn = mask.new_empty(rows, length or x.shape[1], features).bernoulli_(1 - share, generator=generator)
                own[:, : drawn.shape[1]] = drawn.div_(1 - share)
        return mask.flatten(1, 2)


@dataclass
class Head:
    """What a group of runs trains in the place of the base's head, leaves whose gradients autograd adds up."""

    runs: slice
    weight: Tensor
    """(k, M, N)."""
    bias: Tensor | None = None
    """(k, M)."""


class PackedHead(nn.Module):
    """In the place of a linear head, for what it is given of all runs' rows, one run after another."""

    groups: list[Head]
    """Of all runs, in their order."""

    def __init__(self, base_layer: nn.Module, lanes: Lanes):
        super().__init__()
        self.base_layer, self.lanes = base_layer, lanes

    def forward(self, x: Tensor) -> Tensor:
        """(K n, …, N) -> (K n, …, M)."""
        if x.shape[0] != self.lanes.num_rows:
            raise Unpackable(f"the head is given {tuple(x.shape)}, not the {self.lanes.num_rows} rows of the batch")
        inputs = x.reshape(len(self.lanes.lengths), -1, x.shape[-1])
        found = [torch.bmm(inputs[group.runs], group.weight.mT) for group in self.groups]
        pairs = zip(found, self.groups, strict=True)
        outputs = [y if group.bias is None else y + group.bias[:, None].to(y) for y, group in pairs]
        return torch.cat(outputs).view(*x.shape[:-1], -1)


class _Packed(torch.autograd.Function):
    """y + s (x ∘ mask) Aᵀ B, run by run; y = W x + b where the base layer is plain, else it is given.

    What is between the factors is held as (k, R, n t): A xᵀ takes a CPU half the time of x Aᵀ at small ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, hook: Tensor, x: Tensor, y: Tensor | None, layer: PackedLinear, masks: list[Tensor | None]
    ) -> Tensor:
        base, num_runs = layer.base_layer, len(layer.lanes.lengths)
        ctx.groups, ctx.num_runs, ctx.shape, ctx.dtype = layer.groups, num_runs, x.shape, x.dtype
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
            dtype = auto or layer.groups[0].A.dtype
            inputs = x.reshape(num_runs, -1, x.shape[-1]).to(dtype)
            outputs = y.view(num_runs, -1, y.shape[-1])
            saved: list[Tensor | None] = []
            for group, mask in zip(layer.groups, masks, strict=True):
                own, to = inputs[group.runs], outputs[group.runs]
                if group.start is not None:
                    A0, B0 = (part.to(dtype) for part in group.start)
                    _add_product(to, torch.bmm(own, A0.mT).neg_(), B0)
                if mask is not None:
                    own = own * mask.to(dtype)
                h = torch.bmm(group.A.to(dtype), own.mT).mul_(group.scale.to(dtype))
                _add_product(to, h.mT, group.B.to(dtype))
                saved += [own, h, mask]
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        own = grad.contiguous()
        grads = own.view(ctx.num_runs, -1, grad.shape[-1]).to(saved[0].dtype)
        dx = None
        if ctx.needs_input_grad[1]:
            if ctx.weight is not None:
                dx = own.view(-1, grad.shape[-1]) @ ctx.weight
            else:
                dx = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device)
            dx = dx.view(ctx.num_runs, -1, ctx.shape[-1])
        for place, group in enumerate(ctx.groups):
            inputs, h, mask = saved[3 * place : 3 * place + 3]
            to = None if dx is None else dx[group.runs]
            _group_backward(group, grads[group.runs], inputs, h, mask, to)
        to_given = grad if ctx.weight is None else None
        return None, None if dx is None else dx.view(ctx.shape).to(ctx.dtype), to_given, None, None


def _group_backward(
    group: Factors, grad: Tensor, inputs: Tensor, h: Tensor, mask: Tensor | None, dx: Tensor | None
) -> None:
    """Add what the gradient (k, n t, M) of a group's outputs gives to those of its factors, and of its inputs."""
    dtype = inputs.dtype
    _add_product(group.grad_B, h, grad)
    dh = torch.bmm(group.B.to(dtype), grad.mT).mul_(group.scale.to(dtype))
    _add_product(group.grad_A, dh, inputs)
    if dx is None:
        return
    if mask is None:
        _add_product(dx, dh.mT, group.A.to(dtype))
    else:
        dx.add_(torch.bmm(dh.mT, group.A.to(dtype)).mul_(mask.to(dtype)))
    if group.start is not None:
        A0, B0 = (part.to(dtype) for part in group.start)
        _add_product(dx, torch.bmm(grad, B0.mT).neg_(), A0)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """to += left @ right, run by run."""
    if to.dtype == left.dtype and to.is_contiguous():  # else torch multiplies one run after another
        to.baddbmm_(left, right)
    else:
        to.add_(torch.bmm(left, right))
