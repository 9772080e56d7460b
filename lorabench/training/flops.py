"""FLOPs of a training step: its matrix products and convolutions, counted on a copy of the model without numbers.

The copy stands on the meta device, so that a pass takes no memory and the same time whatever the batch; autograd itself
says which products the backward pass takes. Counted are those of forward and backward over all positions, padding and
virtual tokens included and the logits of all, by torch's own formulas (`torch.utils.flop_counter`), and those of the
method's penalty. Not counted are what gradient checkpointing computes again, elementwise operations, factorizations and
transforms. Attention is that of the full square, in two products forward and four backward; experts are those that a
token is sent to.

Shapes: n examples of t positions in a pass.
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lorabench.models import denoisers
from lorabench.models.copies import copied
from lorabench.training.examples import PIXELS
from lorabench.training.passes import forward

if TYPE_CHECKING:
    from lorabench.spec.method import Method

_Form = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
Shape = tuple[int, ...]
"""(n, t) of a forward pass; (n, t, s) where a decoder has s positions beside the t that an encoder reads; of images
(n, channels, height, width)."""
ABOUT = "matrix products of forward and backward, padding included and recomputation apart, as torch counts them"
MAX_PASSES = 4
"""Of text, that are counted one by one; of more shapes than that a + n (b + c t + d t²) tells, which is what a pass
takes: a is what no token changes, such as ΔW formed from factors. A decoder adds n (e s + f s² + g t s) to it."""


def without_numbers(model: nn.Module) -> nn.Module:
    """A copy on the meta device in float32, quantized layers as the linear ones whose products they compute.

    A model that has no numbers is itself made ready.
    """
    if all(
        t.is_meta and (t.dtype == torch.float32 or not t.is_floating_point())
        for t in itertools.chain(model.parameters(), model.buffers())
    ):
        return _countable(model)
    memo: dict[int, Any] = {id(p): nn.Parameter(_empty(p), requires_grad=p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): _empty(buffer) for buffer in model.buffers()}
    for module in model.modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(module, "base_layer"):
            size: Any = module
            linear = nn.Linear(size.in_features, size.out_features, size.bias is not None, device="meta")
            memo[id(module)] = linear.requires_grad_(False)
    return _countable(copied(model, memo))


def _countable(model: Any) -> nn.Module:
    if denoisers.is_denoiser(model):
        return model.train()
    model.set_attn_implementation("eager")  # fused kernels have no formula on every device
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # others ask for the numbers of tokens
    return model.train()


def skeleton_of(tuned: nn.Module) -> nn.Module | None:
    """A copy for counting FLOPs; None where the model cannot be copied, which fails no run."""
    try:
        return without_numbers(tuned)
    except Exception:  # whatever a model cannot have copied, it can be trained
        traceback.print_exc()
        return None


def of_step(copied: nn.Module, shapes: Mapping[Shape, int], method: Method, num_steps: int = 1) -> float:
    """FLOPs of a step, the mean of so many whose passes together have these shapes: how often each.

    `copied` is what `without_numbers` gives. RuntimeError and its kin where the model asks for numbers.
    """
    return _of_passes(copied, shapes) / num_steps + _of_penalty(copied, method)


def _of_passes(copied: nn.Module, shapes: Mapping[Shape, int]) -> float:
    if len(shapes) <= MAX_PASSES or any(map(_is_of_images, shapes)):
        return float(sum(times * of_pass(copied, shape) for shape, times in shapes.items()))
    axes = [sorted(set(axis)) for axis in zip(*shapes, strict=True)]
    most = tuple(axis[-1] for axis in axes)
    points = {(axes[0][0], *most[1:]), (most[0], *(axis[0] for axis in axes[1:]))} | {
        (*most[:place], axes[place][which], *most[place + 1 :])
        for place in range(1, len(axes))
        for which in (0, len(axes[place]) // 2, -1)
    }
    scale = _terms(*most)
    rows = np.array([_terms(*point) / scale for point in points])
    found, *_ = np.linalg.lstsq(rows, np.array([float(of_pass(copied, point)) for point in points]), rcond=1e-12)
    return float(sum(times * (_terms(*shape) / scale) @ found for shape, times in shapes.items()))


def _terms(n: int, t: int, s: int = 0) -> np.ndarray:
    return np.array([1.0, n, n * t, n * t * t, *([n * s, n * s * s, n * t * s] if s else [])])


def num_positions(shape: Shape) -> int:
    """Of all that a pass of this shape goes through; images count one each."""
    return shape[0] if _is_of_images(shape) else shape[0] * sum(shape[1:])


def _is_of_images(shape: Shape) -> bool:
    return len(shape) == 4


def _inputs(model: nn.Module, shape: Shape) -> dict[str, Tensor]:
    if denoisers.is_denoiser(model):
        meta = torch.device("meta")
        told = denoisers.some_conditions(model, shape[0], meta)
        return {PIXELS: torch.zeros(shape, device=meta), denoisers.TIMESTEP: torch.zeros(shape[0], device=meta)} | told
    if _is_of_images(shape):
        return {"pixel_values": torch.zeros(shape, device="meta")}
    n, *lengths = shape
    ids = [torch.zeros(n, length, dtype=torch.long, device="meta") for length in lengths]
    return dict(zip(("input_ids", "decoder_input_ids"), ids, strict=False))


def _output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = forward(model, inputs) if denoisers.TIMESTEP in inputs else model(**inputs).logits
    return found


def of_pass(copied: nn.Module, shape: Shape) -> int:
    """Of one forward and backward pass."""
    inputs = _inputs(copied, shape)
    fork = torch.random.fork_rng(devices=[])  # some tuners draw numbers for their dropout
    with fork, _no_autocast(), _Counter() as counter:
        _output(copied, inputs).sum().backward()
    copied.zero_grad()
    return counter.total


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """The meta device has none, not even to be turned off, as PEFT does around its product with stacked experts."""
    autocast = torch.autocast
    torch.autocast = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What something computes: FLOPs of matrix products, bytes that all its operations write, and their number."""

    flops: float = 0.0
    written: float = 0.0
    operations: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            flops=self.flops + other.flops,
            written=self.written + other.written,
            operations=self.operations + other.operations,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(flops=times * self.flops, written=times * self.written, operations=times * self.operations)

    def at(self, size: float) -> Cost:
        """Of as many operations on so many times the positions."""
        return Cost(flops=size * self.flops, written=size * self.written, operations=self.operations)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A pass by its shape: what the forward pass alone costs, what both do, and bytes that the one keeps for the other
    (squares of attention apart, which fused kernels do not keep)."""

    forward: Cost
    both: Cost
    kept: float


def profile(copied: nn.Module, shape: Shape) -> Profile:
    """Of a forward and backward pass, in float32; see `of_pass`."""
    inputs, lengths = _inputs(copied, shape), () if _is_of_images(shape) else shape[1:]
    weights = {t.untyped_storage()._cdata for t in itertools.chain(copied.parameters(), copied.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and not (tensor.ndim == 4 and {*tensor.shape[-2:]} <= {*lengths}):
            kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), _no_autocast(), _Counter() as counter, hooks:
        logits = _output(copied, inputs)
        forward = counter.cost
        logits.sum().backward()
    copied.zero_grad()
    return Profile(forward=forward, both=counter.cost, kept=float(sum(kept.values())))


def _of_penalty(copied: nn.Module, method: Method) -> int:
    with _Counter() as counter:
        penalty = method.penalty(copied)
        if penalty is not None:
            penalty.backward()
    copied.zero_grad()
    return counter.total


class _Counter(TorchDispatchMode):
    """Adds up FLOPs; a model that asks whether something holds of its numbers (nothing is masked) is told: it does.

    What an operation makes of tensors without numbers follows from their shapes, and is worked out once for all blocks
    of a model: by torch's formulas in Python, which otherwise take most of the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.written = 0
        self.operations = 0
        self._known: dict[Any, tuple[int, list[_Form], bool]] = {}
        """FLOPs of an operation on arguments of these forms, and what it makes: one tensor, or several."""

    @property
    def cost(self) -> Cost:
        return Cost(flops=float(self.total), written=float(self.written), operations=float(self.operations))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        kwargs = kwargs or {}
        aliases = [returned.alias_info for returned in func._schema.returns]
        makes_anew = bool(aliases) and not any(aliases)
        key = (func, _form(args), _form((*kwargs.items(),))) if makes_anew else None
        if key in self._known:
            flops, forms, several = self._known[key]
            outputs = [torch.empty_strided(*size_and_strides, dtype=dtype, device=device)
                       for *size_and_strides, dtype, device in forms]  # fmt: skip
            found: Any = outputs if several else outputs[0]
        else:
            found = func(*args, **kwargs)
            formula = flop_registry.get(func._overloadpacket)
            flops, several = formula(*args, **kwargs, out_val=found) if formula else 0, isinstance(found, tuple | list)
            outputs = [*found] if several else [found]
            if key is not None and all(isinstance(t, Tensor) and t.is_meta for t in outputs):
                self._known[key] = flops, [_form(t) for t in outputs], several
        self.total += flops
        if aliases and (aliases[0] is None or aliases[0].is_write):  # else it is a view
            self.operations += 1
            self.written += sum(t.nbytes for t in outputs if isinstance(t, Tensor))
        return found


def _form(value: Any) -> Any:
    """All that matters of an argument to what an operation makes of it: of a tensor without numbers, its `_Form`."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_form, value)) if isinstance(value, tuple | list) else (type(value), value)


def _empty(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
