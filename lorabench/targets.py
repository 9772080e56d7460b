"""Which linear layers a method is attached to: presets that mean the same on every architecture.

Names are read from the model, so Llama-like (`q_proj`), GPT-2 (`c_attn`, a fused Conv1D), BERT-like
(`attention.self.query`) and others (`q_lin`, `Wqkv`) are found by what they are called.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorabench.decode import InputError

if TYPE_CHECKING:
    from torch import nn

_QUERY = r"(q_proj|query|q_lin|wq|query_proj|q)$"
_KEY = r"(k_proj|key|k_lin|wk|key_proj|k)$"
_VALUE = r"(v_proj|value|v_lin|wv|value_proj|v)$"
_FUSED = r"(c_attn|qkv_proj|query_key_value|Wqkv|qkv)$"
_OUTPUT = r"(o_proj|out_proj|out_lin|wo|attn\.c_proj|attention\.output\.dense|attention\.dense|attn\.Wo|dense)$"
_MLP = (
    r"(gate_proj|up_proj|down_proj|gate_up_proj|c_fc|mlp\.c_proj|fc1|fc2|lin1|lin2|w1|w2|w3|"
    r"intermediate\.dense|(?<!attention\.)output\.dense|mlp\.Wi|mlp\.Wo|dense_h_to_4h|dense_4h_to_h)$"
)
DOWN = r"(down_proj|mlp\.c_proj|fc2|lin2|w2|(?<!attention\.)output\.dense|mlp\.Wo|dense_4h_to_h)$"
"""The feed-forward's last matrix: the places of IA3 together with keys and values."""
PRESETS = {
    "query": [_QUERY],
    "query-value": [_QUERY, _VALUE],
    "attention": [_QUERY, _KEY, _VALUE, _FUSED, _OUTPUT],
    "mlp": [_MLP],
    "key-value-down": [_KEY, _VALUE, _FUSED, DOWN],
    "all-linear": [r""],
}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of the base (quantized ones and GPT-2's Conv1D included), without output heads."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    heads = head_modules(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(name == h or name.startswith(h + ".") for h in heads)
    }


def head_modules(model: nn.Module) -> list[str]:
    """The modules on top of the base model: the language-model head, or the classifier and pooler."""
    prefix = getattr(model, "base_model_prefix", "")
    tops = [name for name, module in model.named_children() if name != prefix and list(module.parameters())]
    poolers = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "pooler"]
    return tops + poolers


def parse_layers(text: str) -> set[int]:
    """`"0-3,11"` -> {0, 1, 2, 3, 11}. InputError where it is not written so."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise InputError(f'method.layers = "{text}": must be numbers and ranges from 0, such as "0-3,11"')
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
            f'method.layers = "{layers}": there is no layer {missing[0]}; those with targets are {sorted(present)}'
        )
    return [name for name in names if layer_index(name) in wanted]


def match(model: nn.Module, targets: str, layers: str | None = None) -> list[str]:
    """Full names of the layers that `targets` (a preset, or a regular expression on full names) means.

    An expression matches as PEFT's does: the whole name, or its end after a dot. `layers` (`"0-3,11"`) keeps only
    those of some blocks. InputError if nothing fits.
    """
    return in_layers(_match(model, targets), layers)


def _match(model: nn.Module, targets: str) -> list[str]:
    layers = linear_layers(model)
    if targets in PRESETS:
        found = [name for name in layers if any(re.search(rf"(^|\.){p}" if p else "", name) for p in PRESETS[targets])]
        if targets == "attention":
            mlp = re.compile(rf"(^|\.){_MLP}")
            found = [name for name in found if not mlp.search(name)]
    else:
        try:
            pattern = re.compile(rf"(.*\.)?({targets})")
        except re.error as error:
            raise InputError(f'method.targets = "{targets}": not a regular expression: {error}') from None
        found = [name for name in layers if pattern.fullmatch(name)]
    if not found:
        kinds = sorted({name.rpartition(".")[2] for name in layers})
        raise InputError(
            f'method.targets = "{targets}": fits no linear layer of {type(model).__name__}. '
            f"Presets: {', '.join(PRESETS)}; or a regular expression on layer names that end in: {', '.join(kinds)}"
        )
    return found
