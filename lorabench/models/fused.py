"""Which rows of a fused matrix are which of its parts: told by the model's configuration, or its experts' class.

Parts are called as everywhere: `q`, `k`, `v`; of a feed-forward `gate` is what goes through the nonlinearity, `up` what
that multiplies, whatever the model's code calls them. Shapes: M out features, N in features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.models.denoisers import is_denoiser
from lorabench.models.weights import dequantized, expert_name, is_conv1d, is_linear_layer, is_stack
from lorabench.updates.parts import Part

if TYPE_CHECKING:
    from torch import Tensor, nn

Parts = dict[str, Part]


def _in_turn(groups: int = 1, **sizes: int) -> Parts:
    """Parts of so many rows, one after the other, in each of equal groups of rows."""
    stops = [*accumulate(sizes.values())]
    return {name: Part(groups=groups, start=stop - sizes[name], stop=stop)
            for name, stop in zip(sizes, stops, strict=True)}  # fmt: skip


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _qkv(config: Any) -> Parts:
    """All queries, then all keys, then all values."""
    queries = config.num_attention_heads * _head(config)
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * _head(config)
    return _in_turn(q=queries, k=keys, v=keys)


def _by_head(config: Any) -> Parts:
    """Query, key and value of the first head, then those of the next."""
    size = _head(config)
    return _in_turn(config.num_attention_heads, q=size, k=size, v=size)


def _falcon(config: Any) -> Parts:
    """Falcon 40B: queries of a group of heads, their key and value; 7B: one key and value, last; RW: by head."""
    size, heads = _head(config), config.num_attention_heads
    if config.new_decoder_architecture:
        return _in_turn(config.num_kv_heads, q=heads // config.num_kv_heads * size, k=size, v=size)
    return _in_turn(q=heads * size, k=size, v=size) if config.multi_query else _by_head(config)


def _codegen(config: Any) -> Parts:
    """A quarter of the queries, of the values and of the keys, four times."""
    size = config.hidden_size // 4
    return _in_turn(4, q=size, v=size, k=size)


def _latent(config: Any) -> Parts:
    """Of each head the part of the key that is not rotated, and the value."""
    return _in_turn(config.num_attention_heads, k=config.qk_nope_head_dim, v=config.v_head_dim)


def _gate_up(config: Any) -> Parts:
    return _in_turn(gate=config.intermediate_size, up=config.intermediate_size)


LAYOUTS: dict[str, dict[str, Callable[[Any], Parts]]] = {
    "gpt2": {"c_attn": _qkv},
    "phi3": {"qkv_proj": _qkv, "gate_up_proj": _gate_up},
    "modernbert": {"Wqkv": _qkv, "Wi": _gate_up},
    "gpt_neox": {"query_key_value": _by_head},
    "bloom": {"query_key_value": _by_head},
    "falcon": {"query_key_value": _falcon},
    "codegen": {"qkv_proj": _codegen},
    "deepseek_v3": {"kv_b_proj": _latent},
}
"""By the model's type, and by the last name of a linear layer. What is not here is analyzed as one matrix."""


def fused_parts(model: nn.Module) -> dict[str, Parts]:
    """The parts of each fused matrix of an untouched base, by parameter, with ‖W0‖ of each.

    Also of each expert's gate and up, where experts are stacked: `STACK[e].weight`.
    """
    if is_denoiser(model):
        return {}
    config: Any = model.config.get_text_config()
    layouts, found = LAYOUTS.get(config.model_type, {}), {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in layouts and is_linear_layer(module):
            weight = dequantized(module)
            found[f"{name}.weight"] = _with_norms(layouts[leaf](config), weight.T if is_conv1d(module) else weight)
        for key, parameter in module.named_parameters(recurse=False):
            if key == "gate_up_proj" and is_stack(f"{name}.{key}", module, parameter):
                for index, parts in enumerate(_of_experts(module)):
                    found[expert_name(f"{name}.{key}", index)] = parts
    return found


def parts_by_config(table: dict[str, Any], shapes: dict[str, tuple[int, int]], where: str) -> dict[str, Parts]:
    """The parts of these matrices, (M, N) by parameter, by what the base's `config.json` holds; without ‖W0‖.

    None of one whose name or rows are not as the configuration has them. InputError where that cannot be used.
    """
    import transformers

    try:
        config = transformers.AutoConfig.for_model(**table).get_text_config()
        layouts = {leaf: parts(config) for leaf, parts in LAYOUTS.get(config.model_type, {}).items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{where}: is no configuration of a model: {clip(error)}") from None
    found = {name: layouts.get(name.removesuffix(".weight").rpartition(".")[2], {}) for name in shapes}
    return {name: parts for name, parts in found.items() if parts and _num_rows(parts) == shapes[name][0]}


def _num_rows(parts: Parts) -> int:
    return sum(part.groups * (part.stop - part.start) for part in parts.values())


def _of_experts(module: Any) -> Iterator[Parts]:
    """Gate and up of each expert: one after the other, or row by row in turn, as its class says. None of Llama 4's,
    which are stored as (E, in, out) where nothing says so."""
    is_transposed = getattr(module, "is_transposed", False)
    stack, down = (s.detach().mT if is_transposed else s.detach() for s in (module.gate_up_proj, module.down_proj))
    _, width, inner = down.shape
    if stack.shape[1:] != (2 * inner, width):
        return
    whole = getattr(module, "is_concatenated", True)
    parts = _in_turn(gate=inner, up=inner) if whole else _in_turn(inner, gate=1, up=1)
    yield from (_with_norms(parts, expert) for expert in stack)


def _with_norms(parts: Parts, weight: Tensor) -> Parts:
    """Of W0 (M, N)."""
    return {name: replace(part, base_norm=float(part.rows(weight).float().norm())) for name, part in parts.items()}
