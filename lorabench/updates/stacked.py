"""LoRA on stacked experts as PEFT has it (`target_parameters`): one pair of factors for all experts of a parameter.

Shapes: M out features, N in features, r rank, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorabench.updates.peftfile import Target
from lorabench.updates.readers._entry import Entry
from lorabench.updates.readers._factors import Layer
from lorabench.updates.readers._names import PREFIX

_EXPERT = re.compile(r"\[(\d+)\]\.weight$")


def wrapper_of(config: dict[str, Any], entry: Entry) -> str | None:
    """PEFT's name of the LoRA that a ΔW is a part of, where the target is a parameter."""
    if config.get("target_parameters") and isinstance(entry, Layer):
        return entry.names["A"].removeprefix(PREFIX).removesuffix(".lora_A.weight")
    return None


def parameter_of(config: dict[str, Any], name: str) -> str:
    """What PEFT's patterns call the parameter of an expert's ΔW: `MODULE.down_proj` of `MODULE.down_proj[3].weight`."""
    stack = _EXPERT.sub("", name)
    if any(f".{stack}".endswith(f".{target}") for target in config["target_parameters"]):
        return stack
    return stack.removesuffix(".weight")


def expert_of(name: str) -> int:
    """3 of `MODULE.down_proj[3].weight`; 0 where there is one."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else 0


def stacked(module: str, parameter: str, factors: Sequence[tuple[Tensor, Tensor]]) -> Target:
    """B (M, r) and A (r, N) of each expert in PEFT's order: A expert by expert, B (M, r E) with the expert last. Of
    several ranks the largest counts; what is lacking in it is zero."""
    rank = max(len(A) for _, A in factors)
    A = torch.cat([pad(A, (0, 0, 0, rank - len(A))) for _, A in factors])
    B = torch.stack([pad(B, (0, rank - B.shape[1])) for B, _ in factors], 2).flatten(1)
    return Target(module=module, B=B, A=A, rank=rank, parameter=parameter)
