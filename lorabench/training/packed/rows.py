"""What several runs train, each a row of a buffer: gradients are clipped and AdamW steps row by row, for all at once.

Runs of about one size that stand side by side are a group, whose rows are as long as they must be for all of them.

Between steps the rows are what the runs hold; a run that looks at its own model and optimizer has its row written to
them (`pull`), and a row is read from them again where it may have been changed (`push`). So a run's checkpoint, and all
else that is its own, is what it is when the run is computed alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lorabench.spec.method import Factor
from lorabench.training.packed.layer import Factors, Head, Unpackable
from lorabench.training.state import Training

HYPERPARAMETERS = ("lr", "weight_decay", "betas", "eps")
"""Of an optimizer's group."""


Places = dict[str, tuple[tuple[int, int], tuple[int, int]]]
"""The shapes (R, N), (R, M) of the factors in each layer, by its name in the base."""


class Rows:
    """Of K runs on one base; `layers` are what the runs together train, by the layer's name in the base."""

    def __init__(self, trainings: Sequence[Training]):
        own = [training.spec.method.factors(training.model) for training in trainings]
        self.groups = [Group(trainings[runs], own[runs], runs) for runs in _alike_in_size(own)]
        names = dict.fromkeys(name for group in self.groups for name in group.layers)
        self.layers = {name: [g.layers[name] for g in self.groups if name in g.layers] for name in names}
        self.heads = {name: [group.heads[name] for group in self.groups] for name in self.groups[0].heads}
        self._where = [(group, row) for group in self.groups for row in range(len(group.trainings))]

    def push(self, row: int) -> None:
        """Read a row from the run's own model and optimizer."""
        group, own = self._where[row]
        group.push(own)

    def pull(self, row: int) -> None:
        """Write a row to the run's own model and optimizer."""
        group, own = self._where[row]
        group.pull(own)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Clip and update all rows, by the learning rates that the runs' own optimizers have now; the norms (K,)."""
        norms = torch.cat([group.clip() for group in self.groups])
        alike: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = {}
        for group in self.groups:
            for options, parts in group.parts():
                alike.setdefault(options, []).append(parts)
        for (lr, weight_decay, (beta1, beta2), eps), places in alike.items():
            values, grads, first, second, steps = map(list, zip(*places, strict=True))
            adamw(
                values, grads, first, second, [], steps,
                fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps,
                maximize=False,
            )  # fmt: skip
        for group in self.groups:
            group.grads.zero_()
        return norms


class Group:
    """The runs `runs` of a pack, k of them, and their rows."""

    def __init__(self, trainings: Sequence[Training], own: Sequence[dict[str, Factor]], runs: slice):
        self.trainings, self.own, self.runs = trainings, own, runs
        self.own_heads = [_heads(training, factors) for training, factors in zip(trainings, own, strict=True)]
        self.places = _places(self.own)
        self.num_A = sum(math.prod(A) for A, _ in self.places.values())
        self.num_factors = self.num_A + sum(math.prod(B) for _, B in self.places.values())
        length = self.num_factors + sum(p.numel() for p in _flat(self.own_heads[0]))
        like = next(iter(self.own[0].values())).A
        buffers = [torch.zeros(len(self.own), length, dtype=like.dtype, device=like.device) for _ in range(4)]
        self.values, self.grads, self.first, self.second = buffers
        self.steps = torch.zeros(len(self.own), 3, device=like.device)
        """AdamW's count for A, for B and for the heads."""
        self.layers, self.heads = self._layers(), self._heads()

    def _layers(self) -> dict[str, Factors]:
        found, at_A, at_B = {}, 0, self.num_A
        for name, (shape_A, shape_B) in self.places.items():
            ends = at_A + math.prod(shape_A), at_B + math.prod(shape_B)
            cut = [(slice(at_A, ends[0]), shape_A), (slice(at_B, ends[1]), shape_B)]
            A, B = (self.values[:, part].unflatten(1, shape) for part, shape in cut)
            grad_A, grad_B = (self.grads[:, part].unflatten(1, shape) for part, shape in cut)
            factors = [own.get(name) for own in self.own]
            scale = A.new_tensor([each.scale if each else 0.0 for each in factors], dtype=torch.float32)
            found[name] = Factors(
                runs=self.runs,
                A=A,
                B=B,
                grad_A=grad_A,
                grad_B=grad_B,
                scale=scale[:, None, None],
                dropout=[each.dropout if each else None for each in factors],
                start=_starts(factors, shape_A[1], shape_B[1]),
            )
            at_A, at_B = ends
        return found

    def _heads(self) -> dict[str, Head]:
        found, at = {}, self.num_factors
        for name, parameters in self.own_heads[0].items():
            leaves = []
            for shape in (parameter.shape for parameter in parameters):
                part = slice(at, at := at + shape.numel())
                leaf = self.values[:, part].unflatten(1, shape).requires_grad_()
                leaf.grad = self.grads[:, part].unflatten(1, shape)
                leaves.append(leaf)
            found[name] = Head(self.runs, *leaves)
        return found

    def _views(self, buffer: Tensor, row: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each of a run's own parameters, with its place in a buffer, in the parameter's orientation."""
        at_A, at_B = 0, self.num_A
        for name, (shape_A, shape_B) in self.places.items():
            factor = self.own[row].get(name)
            if factor is not None:
                rank = len(factor.A)
                yield factor.A, buffer[row, at_A : at_A + math.prod(shape_A)].view(shape_A)[:rank]
                yield factor.B, buffer[row, at_B : at_B + math.prod(shape_B)].view(shape_B)[:rank].T
            at_A, at_B = at_A + math.prod(shape_A), at_B + math.prod(shape_B)
        for parameter in _flat(self.own_heads[row]):
            yield parameter, buffer[row, at_B : (at_B := at_B + parameter.numel())].view(parameter.shape)

    @torch.no_grad()
    def push(self, row: int) -> None:
        """Read a row from the run's own model and optimizer."""
        optimizer = self.trainings[row].optimizer
        for parameter, place in self._views(self.values, row):
            place.copy_(parameter)
        for key, buffer in (("exp_avg", self.first), ("exp_avg_sq", self.second)):
            for parameter, place in self._views(buffer, row):
                known = optimizer.state.get(parameter)
                place.copy_(known[key]) if known else place.zero_()
        counts = [optimizer.state[p]["step"] for p in self._sides(row) if p in optimizer.state]
        self.steps[row] = nn.functional.pad(torch.stack(counts), (0, 3 - len(counts))) if counts else 0.0

    @torch.no_grad()
    def pull(self, row: int) -> None:
        """Write a row to the run's own model and optimizer."""
        optimizer = self.trainings[row].optimizer
        for parameter, place in self._views(self.values, row):
            parameter.copy_(place)
        if not self.steps[row].any():
            return
        moments = (self._views(buffer, row) for buffer in (self.first, self.second))
        num_factors = 2 * len(self.own[row])
        for index, ((parameter, first), (_, second)) in enumerate(zip(*moments, strict=True)):
            optimizer.state[parameter] = {
                "step": self.steps[row, index % 2 if index < num_factors else 2].clone(),
                "exp_avg": first.clone(memory_format=torch.contiguous_format),
                "exp_avg_sq": second.clone(memory_format=torch.contiguous_format),
            }

    def _sides(self, row: int) -> list[nn.Parameter]:
        """An A, a B and of a head: all parameters of a side are in one group, and have taken as many steps."""
        factor = next(iter(self.own[row].values()))
        return [factor.A, factor.B, *_flat(self.own_heads[row])[:1]]

    def clip(self) -> Tensor:
        """Scale the gradients of each run to its limit; their norms before that, (k,)."""
        norms = torch.linalg.vector_norm(self.grads, dim=1)
        limits = [math.inf if t.spec.clip == "none" else t.spec.clip for t in self.trainings]
        self.grads.mul_((norms.new_tensor(limits) / (norms + 1e-6)).clamp_(max=1.0)[:, None])
        return norms

    def parts(self) -> Iterator[tuple[tuple[Any, ...], tuple[Tensor, ...]]]:
        """Of each row A, B and heads: hyperparameters, then values, gradients, both moments and the count of steps."""
        buffers = (self.values, self.grads, self.first, self.second)
        for row, training in enumerate(self.trainings):
            ends = (0, self.num_A, self.num_factors, None)
            sides = zip(self._sides(row), itertools.starmap(slice, itertools.pairwise(ends)), strict=False)
            for side, (parameter, part) in enumerate(sides):
                groups = training.optimizer.param_groups
                own = next(group for group in groups if any(p is parameter for p in group["params"]))
                options = tuple(own[key] for key in HYPERPARAMETERS)
                yield options, (*(buffer[row, part] for buffer in buffers), self.steps[row, side])


def _heads(training: Training, factors: dict[str, Factor]) -> dict[str, list[nn.Parameter]]:
    """What a run trains beside its factors, by the module's name. Unpackable where that is not all."""
    heads = training.spec.method.heads(training.model)
    found = {name: list(module.parameters()) for name, module in heads.items()}
    known = {id(p) for factor in factors.values() for p in (factor.A, factor.B)} | {id(p) for p in _flat(found)}
    others = [name for name, p in training.model.named_parameters() if p.requires_grad and id(p) not in known]
    if others or any(type(module) is not nn.Linear for module in heads.values()):
        raise Unpackable(f"{', '.join(others or heads)}: neither factors nor linear heads")
    if any(factor.A.ndim != 2 for factor in factors.values()):
        raise Unpackable("factors of a convolution")
    return found


def _flat(heads: dict[str, list[nn.Parameter]]) -> list[nn.Parameter]:
    return [parameter for parameters in heads.values() for parameter in parameters]


MOST_FILLED = 2.0
"""By how much, over what it trains, a run may lengthen the rows of the group before it; else it begins another."""


def _alike_in_size(own: Sequence[dict[str, Factor]]) -> list[slice]:
    """Which runs are groups, in their order."""
    starts, filled = [0], 0
    for end, factors in enumerate(own):
        size = sum(factor.A.numel() + factor.B.numel() for factor in factors.values())
        places = _places(own[starts[-1] : end + 1])
        with_it = (end + 1 - starts[-1]) * sum(math.prod(A) + math.prod(B) for A, B in places.values())
        if with_it - filled > MOST_FILLED * size:
            starts.append(end)
            with_it = size
        filled = with_it
    return [*itertools.starmap(slice, itertools.pairwise([*starts, len(own)]))]


def _places(own: Sequence[dict[str, Factor]]) -> Places:
    """The shapes (R, N), (R, M) of each layer's places, R the highest rank of any run there."""
    found: Places = {}
    for factors in own:
        for name, factor in factors.items():
            rank = max(len(factor.A), found.get(name, ((0, 0), (0, 0)))[0][0])
            found[name] = (rank, factor.A.shape[1]), (rank, factor.B.shape[0])
    return found


def _starts(factors: Sequence[Factor | None], inputs: int, outputs: int) -> tuple[Tensor, Tensor] | None:
    """What some of the runs have taken out of a layer, with its scale; see `Factors.start`."""
    having = [each for each in factors if each is not None and each.start is not None]
    if not having:
        return None
    rank = max(len(each.A) for each in having)
    A, B = (having[0].A.detach().new_zeros(len(factors), rank, size) for size in (inputs, outputs))
    for row, each in enumerate(factors):
        if each is not None and each.start is not None:
            B0, A0 = each.start
            A[row, : len(A0)], B[row, : len(A0)] = A0, each.scale * B0.T
    return A, B
