"""Bottleneck adapters: a small trained network in each block, the model itself frozen.

Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2021, arXiv 2005.00247; He et al. 2022, arXiv 2110.04366.

A(v) = s (U f(D v + b) + c) with D (m, d) and U (d, m): d the model's width, m = d // reduction, so 2 d m + d + m
parameters. With h what the attention or the feed-forward gives after the model's own dropout, and x the residual that
is added to it next:

    houlsby    h + A(h)           after the attention and after the feed-forward
    pfeiffer   h + A(LN(h + x))   after the feed-forward; where the norm comes first (GPT-2, Llama): h + A(h + x)
    parallel   h + A(z)           beside the feed-forward, z being its input

That is AdapterHub's `adapters` (DoubleSeqBnConfig, SeqBnConfig, ParBnConfig), the dropout on A's output included, but:

- U and the biases start at zero and D at N(0, 0.02²), so that the model starts as the base exactly. AdapterHub starts
  U, too, at N(0, 0.02²), Houlsby et al. both at N(0, 0.01²); He et al., and with them AdapterHub's parallel, start U at
  zero and D uniformly in ±1/√d, which is as wide at d = 768.
- z is the feed-forward's own input also where a norm stands before it, as in He et al.'s code; AdapterHub takes the
  residual stream there.
- The norms stay frozen, as in AdapterHub; Houlsby et al. train them as well.
- Encoder and decoder have the same adapters, as in AdapterHub none after the attention on what was read.
- BART has its dropouts in its blocks' own code, and ViT and Swin one for both: houlsby's A stands before them there.
- Nonlinearity and reduction are the same for all three by default; AdapterHub's houlsby has SiLU, its parallel m = d/2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Lt

from lorabench.config.decode import InputError
from lorabench.methods._own_file import OwnFile, new_head_updates
from lorabench.models import targets
from lorabench.models.base_model import new_heads
from lorabench.models.denoisers import is_denoiser
from lorabench.spec.method import LoadBase
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorabench.spec.run_spec import RunSpec


def _plus(y: Tensor, module: nn.Module, x: Tensor, scale: float) -> Tensor:
    """y + A(x), by the adapter of the module that a hook is given: in a copied model, the copy's."""
    adapter = module.bottleneck
    return y.add(adapter(x.to(adapter.down.weight.dtype)).to(y.dtype), alpha=scale)


def _after(module: nn.Module, args: Any, output: Tensor, scale: float) -> Tensor:
    """Forward hook: v + A(v) of the module's output."""
    return _plus(output, module, output, scale)


def _beside(module: nn.Module, args: Any, output: Tensor, scale: float) -> Tensor:
    """Forward hook: the module's output + A of its input."""
    return _plus(output, module, args[0], scale)


def _around_norm(module: nn.Module, args: Any, output: Tensor, scale: float) -> Tensor:
    """Forward hook of a norm: LN(u + A(LN(u))), u being its input h + x."""
    return module.forward(_plus(args[0], module, output, scale))


def _beside_normed(module: Any, args: Any, output: Tensor, scale: float) -> Tensor:
    """Forward hook of a norm, a feed-forward and the sum with their input in one: output + A of what the norm gives."""
    return _plus(output, module, module.layer_norm(args[0]), scale)


def _into_residual(module: nn.Module, args: Any, scale: float) -> Any:
    """Forward pre-hook of a module that is given (its input, the residual x): x + A(x) in place of x."""
    inner, residual = args
    return inner, _plus(residual, module, residual, scale)


def _extended(block: type, scale: float) -> type:
    """The class of a block that gives v + A(v) of its output, or of the first of its outputs.

    As part of its forward pass that is recomputed under gradient checkpointing; a hook of the block stands outside.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = block.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        if isinstance(output, tuple):
            return (_after(self, args, output[0], scale), *output[1:])
        return _after(self, args, output, scale)

    return type(block.__name__, (block,), {"forward": forward})


def _extended_inside(block: type, scale: float) -> type:
    """The class of a block that has no module around its feed-forward: LN(h + x + A(x)), x being the input of fc1."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        read: list[Tensor] = []
        hooks = [
            self.fc1.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])),
            self.final_layer_norm.register_forward_pre_hook(
                lambda _, inputs: _plus(inputs[0], self, read.pop(), scale)
            ),
        ]
        try:
            return block.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            for hook in hooks:
                hook.remove()

    return type(block.__name__, (block,), {"forward": forward})


Placement = Literal["houlsby", "pfeiffer", "parallel"]
PLACEMENTS = get_args(Placement)
Layout = dict[str, dict[str, Callable[..., Any]]]
EXTENDING = (_extended, _extended_inside)
"""What is no hook, but gives a class for the module."""
LAYOUTS: dict[str, Layout] = {
    "Llama": {
        "houlsby": {"self_attn.o_proj": _after, "mlp.down_proj": _after},
        "pfeiffer": {"": _extended},
        "parallel": {"mlp": _beside},
    },
    "Mixtral": {
        "houlsby": {"self_attn.o_proj": _after, "mlp": _after},
        "pfeiffer": {"": _extended},
        "parallel": {"mlp": _beside},
    },
    "GPT-2": {
        "houlsby": {"attn.resid_dropout": _after, "mlp.dropout": _after},
        "pfeiffer": {"": _extended},
        "parallel": {"mlp": _beside},
    },
    "GPT-NeoX": {
        "houlsby": {"post_attention_dropout": _after, "post_mlp_dropout": _after},
        "pfeiffer": {"": _extended},
        "parallel": {"mlp": _beside},
    },
    "Bloom and Falcon": {
        "houlsby": {"self_attention.dense": _after, "mlp.dense_4h_to_h": _after},
        "pfeiffer": {"": _extended},
        "parallel": {"mlp": _beside},
    },
    "OPT": {
        "houlsby": {"self_attn.out_proj": _after, "fc2": _after},
        "pfeiffer": {"": _extended},
    },
    "ModernBERT": {
        "houlsby": {"attn.out_drop": _after, "mlp.Wo": _after},
        "pfeiffer": {"": _extended},
        "parallel": {"mlp": _beside},
    },
    "DINOv2": {
        "houlsby": {"layer_scale1": _after, "layer_scale2": _after},
        "pfeiffer": {"": _extended},
        "parallel": {"mlp": _beside},
    },
    "ViT and Swin": {
        "houlsby": {"attention.o_proj": _after, "mlp": _after},
        "pfeiffer": {"": _extended},
        "parallel": {"mlp": _beside},
    },
    "BERT": {
        "houlsby": {"attention.output.dropout": _after, "output.dropout": _after},
        "pfeiffer": {"output.LayerNorm": _around_norm},
        "parallel": {"output": _into_residual},
    },
    "DistilBERT": {
        "houlsby": {"attention.out_lin": _after, "ffn": _after},
        "pfeiffer": {"output_layer_norm": _around_norm},
        "parallel": {"ffn": _beside},
    },
    **{
        f"T5's {side}": {
            "houlsby": {"layer.0.dropout": _after, f"{last}.dropout": _after},
            "pfeiffer": {last: _after},
            "parallel": {last: _beside_normed},
        }
        for side, last in {"decoder": "layer.2", "encoder": "layer.1"}.items()
    },
    "BART": {
        "houlsby": {"self_attn.out_proj": _after, "fc2": _after},
        "pfeiffer": {"final_layer_norm": _around_norm},
        "parallel": {"": _extended_inside},
    },
}
"""Where each placement hooks into a block, the block itself being "": by what the modules are called.

A pre-norm block's own output is h + x, so pfeiffer's h + A(h + x), with x added, is that block's, extended; where
attention and feed-forward stand side by side (GPT-NeoX, Falcon), h is what both give. The dropout of OPT, Bloom and
Falcon is no module: h is what they apply it to.
"""
ONLY = {"BART": r"(Bart|PLBart|Marian)(En|De)coderLayer"}
"""The classes of blocks of a layout, where others name modules alike in another order: OPT's norms come first."""
WITH = {"OPT": "do_layer_norm_before"}
"""What a block must say of itself to be of a layout: where an OPT's norms come last, it is of none."""


@dataclass(frozen=True, kw_only=True)
class Adapter(OwnFile):
    """Two adapters a block with `houlsby`, else one; a new task head is trained too."""

    placement: Placement = "pfeiffer"
    reduction: Annotated[int, Ge(1)] = 16
    """The model's width over the bottleneck's."""
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    scale: Annotated[float, Gt(0)] | None = None
    """s (None: the papers', 4 for parallel and 1 for the others)."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of what the adapter adds."""
    layers: str | None = None
    """Only these blocks, from 0: `"0-3,11"` (None: all)."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the adapters' weights."""

    @property
    def has_update(self) -> bool:
        return False

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        if self.layers is not None:
            try:
                targets.parse_layers(self.layers)
            except InputError as error:
                yield from error.problems

    def attach(self, model: nn.Module, spec: RunSpec) -> nn.Module:
        if is_denoiser(model):
            what = f"places are known in transformers of text and images, and in no denoiser ({type(model).__name__})"
            raise InputError(f'method.name = "{self.name}": its {what}; use lora, loha, lokr, oft, bitfit, full …')
        blocks = _find_blocks(model)
        choices = [name for name in PLACEMENTS if all(name in layout for layout in blocks.values())]
        if self.placement not in choices:
            raise InputError(
                f'method.placement = "{self.placement}": the feed-forward of {type(model).__name__} is no module that '
                f"an adapter could stand beside. Choices: {', '.join(choices)}"
            )
        scale = self.scale or (4.0 if self.placement == "parallel" else 1.0)
        usual = model.config.get_text_config().hidden_size
        model.requires_grad_(False)
        for head in new_heads(model):
            model.get_submodule(head).float().requires_grad_(True)
        for block in targets.in_layers([f"{name}." for name in blocks], self.layers):
            device = next(model.get_submodule(block.rstrip(".")).parameters()).device
            for path, hook in blocks[block.rstrip(".")][self.placement].items():
                module = model.get_submodule((block + path).rstrip("."))
                width = _width(model.get_submodule(block.rstrip(".")), usual)
                module.bottleneck = self._bottleneck(width).to(device)
                if hook in EXTENDING:
                    module.__class__ = hook(type(module), scale)
                elif hook is _into_residual:
                    module.register_forward_pre_hook(partial(hook, scale=scale))
                else:
                    module.register_forward_hook(partial(hook, scale=scale))
        return model

    def _bottleneck(self, width: int) -> nn.Module:
        """U f(D v + b) + c, and dropout of it."""
        import torch
        from torch import nn

        size = width // self.reduction
        if size < 1:
            raise InputError(f"method.reduction = {self.reduction}: must be at most {width}, the model's width")
        kinds = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
        adapter = nn.Sequential()
        adapter.add_module("down", nn.Linear(width, size))
        adapter.add_module("nonlinearity", kinds[self.nonlinearity]())
        adapter.add_module("up", nn.Linear(size, width))
        adapter.add_module("dropout", nn.Dropout(self.dropout))
        for parameter in adapter.parameters():
            nn.init.zeros_(parameter)
        nn.init.normal_(adapter.down.weight, std=0.02)
        return adapter.to(getattr(torch, self.adapter_dtype))

    def updates(self, model: nn.Module, load_base: LoadBase) -> Iterator[Update]:
        """Of a new task head alone: an adapter changes no weight."""
        return new_head_updates(model, load_base)


def _width(block: nn.Module, usual: int) -> int:
    """Of a block's states; a Swin's widen from stage to stage, by what its own norm says."""
    norm: Any = getattr(block, "layernorm_before", None)
    return usual if norm is None else int(norm.normalized_shape[0])


def _find_blocks(model: nn.Module) -> dict[str, Layout]:
    """The names of the model's blocks, and the layout of each. InputError where they are of no known layout."""
    from torch import nn

    found: dict[str, Layout] = {}
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or not len(stack):
            continue
        kind = next((kind for kind in LAYOUTS if all(_fits(kind, block) for block in stack)), None)
        if kind is not None:
            found |= {f"{name}.{index}": LAYOUTS[kind] for index in range(len(stack))}
    if found:
        return found
    raise InputError(
        f'method.name = "adapter": the blocks of {type(model).__name__} are built in no way that is known here. '
        f"Supported: models with blocks like those of {', '.join(LAYOUTS)}"
    )


def _fits(kind: str, block: nn.Module) -> bool:
    places = {path for hooks in LAYOUTS[kind].values() for path in hooks}
    is_known = re.fullmatch(ONLY.get(kind, ".*"), type(block).__name__) is not None
    says_so = kind not in WITH or bool(getattr(block, WITH[kind], False))
    return is_known and says_so and places <= {path for path, _ in block.named_modules()}


EXAMPLE = Adapter(reduction=8)
