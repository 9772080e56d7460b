"""Which matrices a method is attached to: presets that mean the same on every architecture.

What is attention and what feed-forward is read from the model: from the modules that a matrix lies in. Only query, key,
value and the feed-forward's last matrix are told by what they are called, within the one or the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorabench.config.decode import InputError
from lorabench.config.quote import show
from lorabench.models.denoisers import is_denoiser
from lorabench.models.weights import is_convolution, is_linear_layer, is_stack

if TYPE_CHECKING:
    from torch import nn

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"mlp|ffn|feed_?forward|convnext(v2)?layer$|expert|dense_?(relu|act|gated)|moe(block|layer)?$", re.IGNORECASE
)
"""In the name or the class of a module around a matrix; of a ConvNeXt the block is the feed-forward."""
_NEITHER = ("Transformer2DModel",)
"""What is called an attention by diffusers, and is several blocks with matrices around them."""
KINDS = {
    "query": r"to_q|add_q_proj|q_proj|query|q_lin|wq|query_proj|q|q_a_proj|q_b_proj",
    "key": r"to_k|add_k_proj|k_proj|key|k_lin|wk|key_proj|k",
    "value": r"to_v|add_v_proj|v_proj|value|v_lin|wv|value_proj|v",
    "fused": r"c_attn|qkv_proj|query_key_value|Wqkv|qkv|kv_b_proj",
}
"""What the attention's layers are called."""
DOWN = (
    r"(down_proj|ff(_context)?\.net\.2|mlp\.c_proj|fc2|fc_out|lin2|w2|DenseReluDense\.wo|(?<!attention\.)output\.dense|mlp\.Wo|"
    r"dense_4h_to_h|ffn_output)$"
)
"""The feed-forward's last matrix: the places of IA3 together with keys and values."""
PRESETS: dict[str, tuple[str, ...]] = {
    "query": ("query",),
    "query-value": ("query", "value"),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "key-value-down": ("key", "value", "fused", "down"),
    "all-linear": ("",),
    "convolutions": ("convolution",),
    "all-layers": ("", "convolution"),
}
"""What each takes: kinds of layers, a part of the blocks, or all there is; of convolutions none but the last two."""
_UNFIT = {
    "dt_proj": ("mamba", "falcon_mamba", "jamba"),
    "out_proj": ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h", "zamba2"),
}
"""Layers that a model type uses by their weight alone, without their forward pass, if only in its fast path: what is
put on such a layer is not computed there. PEFT refuses `out_proj` of some of them."""


CONVOLUTIONS, ALL_LAYERS = "convolutions", "all-layers"


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a choice means on a model."""

    layers: list[str]
    """Linear layers, by module name."""
    stacked: list[str]
    """Matrices that no linear layer has, by parameter name: stacked experts (experts, out, in), and routers."""
    convolutions: list[str] = field(default_factory=list)
    """Convolutions over images, by module name."""


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the base (quantized ones and GPT-2's Conv1D included), without output heads."""
    heads = head_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear_layer(module) and not any(name == h or name.startswith(h + ".") for h in heads)
    }


def convolutions(model: nn.Module) -> list[str]:
    """The convolutions over images that a matrix (out, in · height · width) stands for; see `is_convolution`."""
    return [name for name, module in model.named_modules() if is_convolution(module)]


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the linear layers that bitsandbytes quantizes: transformers keeps some in float32, of a T5 `wo`."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}  # fmt: skip
    return {name: module for name, module in linear_layers(model).items() if kept.isdisjoint(name.split("."))}


def stacked_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Parameter name and module of each matrix of the blocks that no linear layer has: stacked experts, and routers."""
    from torch import nn

    inner = _block_names(model)
    return {
        f"{name}.{key}": module
        for name, module in model.named_modules()
        if _block_of(name, inner) and not (is_linear_layer(module) or isinstance(module, nn.Embedding))
        for key, parameter in module.named_parameters(recurse=False)
        if (parameter.ndim == 2 and key == "weight") or is_stack(name, module, parameter)
    }


def head_modules(model: nn.Module) -> list[str]:
    """The modules on top of the base model: a language model's head, a classifier and pooler; a denoiser has none."""
    if is_denoiser(model):
        return []
    body = _body(model)
    tops = [name for name, module in model.named_children() if name not in body and list(module.parameters())]
    poolers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "pooler"]
    return tops + poolers


def _body(model: nn.Module) -> list[str]:
    """The child that is the base model below its heads; Llama 4's has another name than its class says.

    A T5 that writes is the one model, with all beside its output matrix.
    """
    children, prefix = dict(model.named_children()), getattr(model, "base_model_prefix", "")
    if prefix in children or not hasattr(model, "get_input_embeddings"):
        return [prefix]
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if any(child is embeddings for child in children.values()):
        return [name for name, child in children.items() if child is not output]
    return [name for name, child in children.items() if any(m is embeddings for m in child.modules())]


def parse_layers(text: str) -> set[int]:
    """`"0-3,11"` -> {0, 1, 2, 3, 11}. InputError where it is not written so."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise InputError(f'method.layers = {show(text)}: must be numbers and ranges from 0, such as "0-3,11"')
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def layer_index(name: str) -> int | None:
    """The number of the block that a module belongs to: 3 for `model.layers.3.mlp.up_proj`."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def in_layers(names: list[str], layers: str | None) -> list[str]:
    """The names whose block is among `layers`. InputError where the model has no such block."""
    if layers is None:
        return names
    wanted, present = parse_layers(layers), {index for name in names if (index := layer_index(name)) is not None}
    if missing := sorted(wanted - present):
        raise InputError(
            f"method.layers = {show(layers)}: there is no layer {missing[0]}; those with targets are {sorted(present)}"
        )
    return [name for name in names if layer_index(name) in wanted]


def find(model: nn.Module, targets: str, layers: str | None = None) -> Targets:
    """What `targets` (a preset, or a regular expression on full names) means on this model.

    An expression matches as PEFT's does: the whole name, or its end after a dot. `layers` (`"0-3,11"`) keeps only
    those of some blocks. InputError if nothing fits.
    """
    linear, stacked, convolved = list(linear_layers(model)), list(stacked_matrices(model)), convolutions(model)
    names = [*linear, *map(_plain, stacked)]
    if targets == CONVOLUTIONS:
        found = convolved
    elif targets == ALL_LAYERS:
        found = [*_preset(model, "all-linear", names), *convolved]
    else:
        found = _preset(model, targets, names) if targets in PRESETS else _expression(targets, [*names, *convolved])
    if not found:
        raise InputError(_fits_nothing(model, targets, [*names, *convolved]))
    kept = set(in_layers(found, layers))
    return Targets(
        layers=[name for name in linear if name in kept],
        stacked=[name for name in stacked if _plain(name) in kept],
        convolutions=[name for name in convolved if name in kept],
    )


def match(model: nn.Module, targets: str, layers: str | None = None) -> list[str]:
    """The linear layers of `find`. InputError if there are none."""
    found = find(model, targets, layers)
    if found.convolutions:
        raise InputError(
            f"method.targets = {show(targets)}: fits convolutions of {type(model).__name__} "
            f"({found.convolutions[0]} …), which method lora alone can be put on"
        )
    if not found.layers:
        kinds = ", ".join(sorted({_leaf(_plain(name)) for name in found.stacked}))
        raise InputError(
            f"method.targets = {show(targets)}: fits no linear layer of {type(model).__name__}, only stacked experts "
            f"and routers ({kinds}), which method lora alone can be put on"
        )
    return found.layers


def unreached(model: nn.Module, found: Targets) -> list[str]:
    """What the blocks' matrices are called, the block's number apart, that are not among those found."""
    from torch import nn

    reached, inner = {*(f"{name}.weight" for name in found.layers), *found.stacked}, _block_names(model)
    left = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if _block_of(name, inner) and not isinstance(module, nn.Embedding)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and not key.endswith("bias") and f"{name}.{key}" not in reached
    ]
    return in_block(model, left)


def parts(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """`attention` or `mlp` of each matrix by the nearest module around it that is either; "" of one in neither.

    Where a block has an attention and nothing that is a feed-forward by itself, what else is in it makes one up.
    """
    modules, inner = dict(model.named_modules()), _block_names(model)
    found, blocks = {}, {name: _block_of(name, inner) for name in names}
    for name, block in blocks.items():
        around = name
        found[name] = ""
        while not found[name] and len(around := around.rpartition(".")[0]) > len(block or ""):
            if type(modules[around]).__name__ in _NEITHER:
                break
            if _is_in(_ATTENTION, _leaf(around), modules[around]):
                found[name] = "attention"
            elif _is_in(_FEED_FORWARD, _leaf(around), modules[around]):
                found[name] = "mlp"
    of_block: dict[str | None, set[str]] = {}
    for name, part in found.items():
        of_block.setdefault(blocks[name], set()).add(part)
    for name, block in blocks.items():
        if block and not found[name] and of_block[block] == {"attention", ""}:
            found[name] = "mlp"
    return found


def in_block(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What the parameters of blocks are called within them, each once."""
    lists = _block_names(model)
    return list(dict.fromkeys(_plain(name).removeprefix(f"{_block_of(name, lists)}.") for name in names))


def _preset(model: nn.Module, preset: str, names: list[str]) -> list[str]:
    if preset == "all-linear":
        unfit = {leaf for leaf, types in _UNFIT.items() if getattr(model.config, "model_type", None) in types}
        return [name for name in names if _leaf(name) not in unfit]
    part = parts(model, names)
    wanted = {kind: [name for name in names if _is_kind(kind, name, part[name])] for kind in PRESETS[preset]}
    missing = {kind for kind, found in wanted.items() if not found}
    if missing - {"fused"} - ({"key", "value"} if wanted.get("fused") else set()):
        return []  # some of them alone would be another experiment
    chosen = {name for found in wanted.values() for name in found}
    return [name for name in names if name in chosen]


def _is_kind(kind: str, name: str, part: str) -> bool:
    if kind in KINDS:
        return part == "attention" and bool(re.fullmatch(KINDS[kind], _leaf(name)))
    if kind == "down":
        return part == "mlp" and bool(re.search(rf"(^|\.){DOWN}", name))
    return part == kind


def _expression(targets: str, names: list[str]) -> list[str]:
    try:
        pattern = re.compile(rf"(.*\.)?({targets})")
    except re.error as error:
        raise InputError(f"method.targets = {show(targets)}: not a regular expression: {error}") from None
    return [name for name in names if pattern.fullmatch(name)]


def _fits_nothing(model: nn.Module, targets: str, names: list[str]) -> str:
    kinds = sorted(set(map(_leaf, names)))
    part = parts(model, names)
    fused = sorted({_leaf(name) for name in names if _is_kind("fused", name, part[name])})
    of_one = f", which has queries, keys or values in one matrix ({', '.join(fused)}), for attention to take whole"
    return (
        f"method.targets = {show(targets)}: fits no linear layer of {type(model).__name__}"
        f"{of_one if fused and 'query' in PRESETS.get(targets, ()) else ''}. "
        f"Presets: {', '.join(PRESETS)}; or a regular expression on layer names that end in: {', '.join(kinds)}"
    )


def _block_names(model: nn.Module) -> list[str]:
    """The names of the members of the model's outermost lists of modules: a transformer's blocks."""
    from torch import nn

    outermost: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost.append(name)
    return outermost


def _block_of(name: str, lists: list[str]) -> str | None:
    """`model.layers.3` for what lies in it; None for what is in no block."""
    outer = next((outer for outer in lists if name.startswith(f"{outer}.")), None)
    return None if outer is None else f"{outer}.{name.removeprefix(outer + '.').partition('.')[0]}"


def _is_in(pattern: re.Pattern[str], name: str, module: nn.Module) -> bool:
    return bool(pattern.search(name) or pattern.search(type(module).__name__))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _plain(parameter: str) -> str:
    return parameter.removesuffix(".weight")
