"""What a language model says of the tokens that it is to predict, by no more logits than that takes.

The model is called as always, adapters and virtual tokens included, but its head gets nothing to do. What comes to the
head is kept; of that the positions at which something is predicted go through it, so many at a time that their logits
fit CHUNK_BYTES. Of a loss each chunk's gradient is taken at once, so that of several chunks none is left for the
backward pass.

What a model does to its logits behind the head (Gemma's soft cap, Cohere's scale) is found by trial. One that does
something else, or whose weights are shared out over ranks, computes the logits of all positions.

Shapes: n examples, t positions, k of them with something to predict, d width, v vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lorabench.spec.task import IGNORE, LanguageModeling, Task, Told
from lorabench.training.examples import Batch
from lorabench.training.passes import base_of, forward

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}
"""Of the float32 logits that are there at a time."""
PLACES = "places"
"""The key of a batch that tells where something is predicted, (k,): else a GPU is waited for to find it."""
MOST = 0.9
"""Share of the positions of which it pays to go through all, where so many have something to predict."""
TRIED = 60.0
"""The logits by which it is tried what becomes of them go from -TRIED to TRIED."""


def task_loss(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    """The task's loss, summed over the batch's predictions, for a backward pass."""
    read = _read(model, batch, task.targets(batch)) if by_tokens(task) else None
    if read is None:
        return task.loss(forward(model, batch), batch)
    if len(read.rows) <= read.size:  # autograd's own way is quicker by what it takes to run it twice
        return cross_entropy(read.head(read.rows), read.targets, ignore_index=IGNORE, reduction="sum")
    trained = [p for p in read.head.module.parameters() if p.requires_grad]
    found: Tensor = _Summed.apply(read, read.rows, *trained)
    return found


def by_tokens(task: Task) -> TypeGuard[LanguageModeling]:
    """Whether a task is language modelling without a loss or scores of its own, which are given logits."""
    cls, general = type(task), LanguageModeling
    return isinstance(task, general) and cls.loss is general.loss and cls.score is general.score


def places(targets: Tensor) -> Tensor:
    """Where there is something to predict, (k,)."""
    return (targets.flatten() != IGNORE).nonzero()[:, 0]


def log_probs(model: nn.Module, batch: Batch, targets: Tensor, temperature: float) -> Tensor:
    """Of each of the `targets`, (n, t) in nats; 0 where there is none. For any loss that is made of them."""

    def of(logits: Tensor, targets: Tensor) -> Tensor:
        return -cross_entropy(logits / temperature, targets, ignore_index=IGNORE, reduction="none")

    read = _read(model, batch, targets)
    if read is None:
        return of(forward(model, batch).flatten(0, 1).float(), targets.flatten()).view_as(targets)
    head = read.head
    if len(read.rows) <= read.size:
        return read.spread([of(head(read.rows), read.targets)], targets)
    found = [
        checkpoint(lambda rows, own: of(head(rows), own), rows, own, use_reentrant=False) for rows, own in read.chunks()
    ]
    return read.spread(found, targets)


@torch.no_grad()
def told(model: nn.Module, batch: Batch, targets: Tensor) -> Told:
    """What the model tells of each of the `targets` (n, t); nothing is kept for a backward pass."""
    read = _read(model, batch, targets)
    if read is None:
        return Told.of(forward(model, batch), targets)
    _, nats, is_right = zip(*(Told.of(read.head(rows), own) for rows, own in read.chunks()), strict=True)
    return Told(targets, read.spread([*nats], targets), read.spread([*is_right], targets))


@torch.no_grad()
def divergences(base: nn.Module, tuned: nn.Module, batch: Batch, targets: Tensor) -> Tensor:
    """KL(base ‖ tuned) in nats of what the two predict where `targets` (n, t) has one; (k,), at least 0."""
    reads = _read(base, batch, targets), _read(tuned, batch, targets)
    if reads[0] is None or reads[1] is None:
        is_asked = targets != IGNORE
        return _kl(*(forward(model, batch)[is_asked] for model in (base, tuned)))
    chunks = zip(reads[0].chunks(), reads[1].chunks(), strict=True)
    found = torch.cat([_kl(reads[0].head(of_base), reads[1].head(of_tuned)) for (of_base, _), (of_tuned, _) in chunks])
    return found[reads[0].targets != IGNORE]


def _kl(base: Tensor, tuned: Tensor) -> Tensor:
    """Of logits (k, v); (k,)."""
    p, q = base.float().log_softmax(-1), tuned.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


class _Summed(torch.autograd.Function):
    """Cross-entropy of rows (k, d), summed; the gradients of rows and of the head's parameters are made beside it."""

    @staticmethod
    def forward(ctx: Any, read: _Read, rows: Tensor, *parameters: Tensor) -> Tensor:
        losses: list[Tensor] = []
        of_rows: list[Tensor] = []
        sums: list[Tensor] = []
        for chunk, own in read.chunks():
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                loss = cross_entropy(read.head(leaf), own, ignore_index=IGNORE, reduction="sum")
            of_chunk, *found = torch.autograd.grad(loss, [leaf, *parameters], materialize_grads=True)
            losses.append(loss.detach())
            of_rows.append(of_chunk)
            sums = [held.add_(each) for held, each in zip(sums, found, strict=True)] if sums else found
        ctx.gradients = [torch.cat(of_rows), *sums]
        return torch.stack(losses).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found, ctx.gradients = ctx.gradients, None
        return None, *(each.mul_(gradient) for each in found)


@dataclass(frozen=True, kw_only=True)
class _Head:
    module: nn.Module
    known: _Known

    def __call__(self, rows: Tensor) -> Tensor:
        """Logits (k, v) in float32 of what came to the head, (k, d)."""
        logits: Tensor = self.known.behind(self.module(rows[None]))[0]
        return logits.float()


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What came to a model's head where something is predicted, and what that is."""

    head: _Head
    rows: Tensor
    """(k, d)."""
    targets: Tensor
    """(k,); IGNORE where there is none."""
    places: Tensor | None
    """(k,) among the n t positions; None: they are all of them."""

    @property
    def size(self) -> int:
        """Rows whose logits may be there at a time."""
        return max(1, CHUNK_BYTES[self.rows.device.type] // (4 * self.head.known.size))

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and targets, so many at a time; once at least."""
        return zip(self.rows.split(self.size), self.targets.split(self.size), strict=True)

    def spread(self, found: list[Tensor], like: Tensor) -> Tensor:
        """What was found of each chunk's rows at its places in (n, t), the shape of `like`; 0 elsewhere."""
        flat = torch.cat(found)
        if self.places is not None:
            flat = flat.new_zeros(like.numel()).index_put((self.places,), flat)
        return flat.view_as(like)


def _read(model: nn.Module, batch: Batch, targets: Tensor) -> _Read | None:
    """None of a model whose logits only its own forward pass makes."""
    base = base_of(model)
    module = base.get_output_embeddings()
    if module is None or hasattr(model, "reshard"):  # FSDP's: the head is whole within the model's own pass alone
        return None
    known = look_at_head(model, batch)
    if known is None or any(map(_is_random, module.modules())):
        return None
    came: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        came.append(args[0])
        return (args[0][:, :0],)

    with module.register_forward_pre_hook(keep):
        forward(model, batch)
    rows, flat = came[0][:, -targets.shape[1] :].flatten(0, 1), targets.flatten()  # virtual tokens stand in front
    where, head = batch[PLACES] if PLACES in batch else places(targets), _Head(module=module, known=known)
    if len(where) >= MOST * len(flat):
        return _Read(head=head, rows=rows, targets=flat, places=None)
    return _Read(head=head, rows=rows.index_select(0, where), targets=flat[where], places=where)


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What becomes of the `size` logits of a head."""

    behind: Callable[[Tensor], Tensor]
    size: int


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known | None] = weakref.WeakKeyDictionary()


def look_at_head(model: nn.Module, batch: Batch) -> _Known | None:
    """What becomes of the logits of a model's head, found at first sight, by a pass over two tokens of a batch."""
    base = base_of(model)
    if base not in _KNOWN:
        _KNOWN[base] = _try(model, batch)
    return _KNOWN[base]


@torch.no_grad()
def _try(model: Any, batch: Batch) -> _Known | None:
    """What the model makes of logits that are put in place of its head's, on the first tokens of a batch."""
    base = base_of(model)
    head = base.get_output_embeddings()
    heads: list[Tensor] = []

    def replace(_: Any, __: Any, logits: Tensor) -> Tensor:
        heads.append(torch.linspace(-TRIED, TRIED, logits.numel()).to(logits).view_as(logits))
        return heads[-1]

    some = {key: batch[key][:1, :2] for key in ("input_ids", "labels")}
    with torch.random.fork_rng(), head.register_forward_hook(replace):
        found = forward(model, some)
    if len(heads) != 1 or heads[0].ndim != 3:
        return None
    logits = heads[0][:, -found.shape[1] :]
    for behind in _behind(base.config.get_text_config()):
        made = behind(logits)
        if made.shape == found.shape and torch.equal(made.float(), found.float()):
            return _Known(behind=behind, size=found.shape[-1])
    return None


def _is_random(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


def _behind(config: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """What a model of this configuration may do to its logits."""
    for key, made in _BY_KEY.items():
        if number := getattr(config, key, None):
            yield partial(made, number)
    yield lambda logits: logits


def _capped(cap: float, logits: Tensor) -> Tensor:
    return torch.tanh(logits / cap) * cap


_BY_KEY: dict[str, Callable[[float, Tensor], Tensor]] = {
    "final_logit_softcapping": _capped,  # Gemma
    "logits_soft_cap": _capped,  # RecurrentGemma
    "logit_scale": lambda scale, logits: logits * scale,  # Cohere
    "logits_scaling": lambda scale, logits: logits / scale,  # Granite
    "lm_head_multiplier": lambda scale, logits: logits * scale,  # Falcon-H1
}
