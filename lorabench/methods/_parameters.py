"""LoRA on a parameter itself (PEFT's `target_parameters`): stacked experts, routers, and layers that PEFT renames.

Shapes: E experts, M out features, N in features, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lorabench.models.targets import Targets
from lorabench.models.weights import expert_name
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER = "default"


def split_targets(model: nn.Module, found: Targets) -> tuple[list[str], list[str]]:
    """What is given to PEFT as `target_modules`, and what as `target_parameters`.

    Of models whose experts were linear layers in transformers 4, PEFT takes the names that those had (`gate_proj`) for
    the stacked parameters, wherever they stand: a linear layer that is so called can be named by its weight alone.
    """
    renamed = {leaf for leaf in {_leaf(name) for name in found.layers} if _is_renamed(model, leaf)}
    by_weight = [f"{name}.weight" for name in found.layers if _leaf(name) in renamed]
    return [name for name in found.layers if _leaf(name) not in renamed], [*by_weight, *found.stacked]


def parameter_updates(name: str, wrapper: Any) -> Iterator[Update]:
    """ΔW of a parameter that LoRA is on; of a stack one for each expert e, `NAME[e].weight`."""
    parameter, weight = parameter_name(name, wrapper), wrapper.get_param().detach()
    scale = wrapper.scaling[ADAPTER]
    for index, (B, A) in enumerate(_factors(wrapper)):
        expert = weight if weight.ndim == 2 else weight[index]
        yield Update(
            parameter=parameter if weight.ndim == 2 else expert_name(parameter, index),
            B=B * scale,
            A=A,
            base_norm=float(expert.float().norm()),
            scale_source="config",
        )


def parameter_name(name: str, wrapper: Any) -> str:
    """The full name of the parameter that a wrapper is on; one of several on a module is within another."""
    return f"{name.replace('.base_layer', '')}.{wrapper.parameter_name}"


def _factors(wrapper: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies of B (M, r) and A (r, N) of each expert, which PEFT has side by side: B (M, r E), A (E r, N)."""
    A, B = wrapper.lora_A[ADAPTER].weight.detach(), wrapper.lora_B[ADAPTER].weight.detach()
    count = wrapper.num_experts
    As, Bs = A.reshape(count, -1, A.shape[1]), B.reshape(B.shape[0], -1, count)
    return ((Bs[..., index].clone(), As[index].clone()) for index in range(count))


def _is_renamed(model: nn.Module, leaf: str) -> bool:
    """Whether PEFT puts another target in place of a layer's of that name."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of two that it has fused
        return True
    return leaf not in (config.target_modules or ())


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
