"""The weights of a loaded model: what they are under quantization, what has become of them, and ΔW put on top."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from lorabench.processes.distributed import is_sharded, whole
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from torch import Tensor, nn


def count(model: nn.Module) -> int:
    """Parameters of a model as it computes: a 4-bit weight packs several into a byte, and what PEFT keeps of a head
    that it trains, to have the untouched one back, is no part of it.
    """
    unused = {
        id(parameter)
        for module in model.modules()
        if type(module).__name__ == "ModulesToSaveWrapper"
        for parameter in module.original_module.parameters()
    }
    shape = lambda p: p.quant_state.shape if getattr(p, "quant_state", None) is not None else p.shape  # noqa: E731
    return sum(math.prod(shape(p)) for p in model.parameters() if id(p) not in unused)


def held_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, and of the scales that bitsandbytes keeps beside quantized weights."""
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            held += [t for name in ("absmax", "code", "offset") if (t := getattr(part, name, None)) is not None]
        if getattr(parameter, "SCB", None) is not None:
            held.append(parameter.SCB)
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in held}.values())


def weight_changes(
    model: nn.Module, base: nn.Module, prefix: str = "", names: Collection[str] | None = None
) -> Iterator[Update]:
    """ΔW of every parameter, or of those in `names`: dense, on the CPU, in (out, in) orientation; vectors as (n, 1).

    Of stacked experts one each.
    """
    for name in names if names is not None else [name for name, _ in model.named_parameters()]:
        parameter, original = model.get_parameter(name), base.get_parameter(name).detach()
        if not is_sharded(parameter):
            original = whole(original)
        delta = whole(parameter.detach().float() - original.to(parameter.device).float())
        module, precision = model.get_submodule(name.rpartition(".")[0]), str(parameter.dtype).removeprefix("torch.")
        if not is_stack(name, module, parameter):
            norm = float(whole(original.float().norm()))
            yield Update(
                parameter=prefix + name, B=_as_matrix(delta, module).cpu(), base_norm=norm, precision=precision
            )
            continue
        norms = whole(original.float()).flatten(1).norm(dim=1)
        for index, part in enumerate(delta.mT if getattr(module, "is_transposed", False) else delta):
            yield Update(
                parameter=expert_name(prefix + name, index),
                B=part.contiguous().cpu(),
                base_norm=float(norms[index]),
                precision=precision,
            )


def _as_matrix(delta: Tensor, module: nn.Module) -> Tensor:
    if delta.ndim == 1:
        return delta[:, None]
    if delta.ndim == 3 and len(delta) == 1:  # a ViT's position embeddings (1, t, d) and its like
        return delta[0].contiguous()
    return (delta.T if is_transposed(module) else delta.flatten(1)).contiguous()


def add_update(model: nn.Module, update: Update) -> None:
    """W0 + ΔW, in place, on a model whose weights are not quantized."""
    import torch

    expert = re.fullmatch(r"(.+)\[(\d+)\]\.weight", update.parameter)
    name = expert[1] if expert else update.parameter
    module = model.get_submodule(name.rpartition(".")[0])
    if module is output_embeddings(model):
        untie(model)  # its input side has an update of its own, or none
    parameter = model.get_parameter(name)
    delta = update.dense().to(parameter.device)
    if expert:
        parameter = parameter[int(expert[2])]
        delta = delta.T if getattr(module, "is_transposed", False) else delta
    elif is_transposed(module) and parameter.ndim > 1:
        delta = delta.T
    with torch.no_grad():
        parameter += delta.reshape(parameter.shape).to(parameter.dtype)


def weight_norm(module: nn.Module) -> float:
    """‖W0‖_F of a linear layer, of its dequantized weight where it is quantized."""
    return float(dequantized(module).float().norm())


def dequantized(module: nn.Module) -> Tensor:
    """W0 of a linear layer, out of its 4-bit or 8-bit form where it has one."""
    weight = module.weight
    match type(weight).__name__:
        case "Params4bit":
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)
        case "Int8Params":  # PEFT's own helper moves the weight, after which the layer's forward pass fails
            from bitsandbytes.functional import int8_vectorwise_dequant

            scales = module.state.SCB if module.state.SCB is not None else weight.SCB
            return int8_vectorwise_dequant(weight.data, scales.to(weight.device))
    return whole(weight.detach())


def dense_linear(module: nn.Module) -> nn.Linear:
    """What a linear layer computes, quantized or Conv1D, as a new one with weight and bias in float32."""
    from torch import nn

    weight = dequantized(module).float()
    weight = weight.T if is_conv1d(module) else weight
    bias = module.bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(whole(bias.detach()).float().clone(), requires_grad=False)
    return linear


def in_features(module: nn.Module) -> int:
    """N of a linear layer (M, N)."""
    return int(module.weight.shape[0] if is_conv1d(module) else module.in_features)


def sides(model: nn.Module, name: str) -> tuple[int, int]:
    """(M, N) of a linear layer, or of a parameter: of one of the experts where it is a stack."""
    try:
        module = model.get_submodule(name)
    except AttributeError:  # a parameter
        out, inner = model.get_parameter(name).shape[-2:]
        return int(out), int(inner)
    if is_conv1d(module):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    if is_convolution(module):
        return int(module.weight.shape[0]), int(module.weight[0].numel())
    return int(module.out_features), int(module.in_features)


def is_linear_layer(module: nn.Module) -> bool:
    """A linear layer, quantized or not, or GPT-2's Conv1D; no router, of which Llama 4's is a Linear of two outputs."""
    from torch import nn

    return (isinstance(module, nn.Linear) and "Router" not in type(module).__name__) or is_conv1d(module)


def is_convolution(module: nn.Module) -> bool:
    """A convolution over images whose every output sees all inputs: its weight is (out, in · height · width) as a
    matrix, the kernel's columns and then its rows running fastest. One in groups, each with its own inputs, is none."""
    from torch import nn

    return isinstance(module, nn.Conv2d) and module.groups == 1


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as (in, out): Conv1D, and an embedding, whose input is a one-hot token."""
    from torch import nn

    return is_conv1d(module) or isinstance(module, nn.Embedding)


def is_stack(name: str, module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter is the same matrix of all experts, (experts, out, in); (experts, in, out) where the module
    says `is_transposed`, as gpt-oss's."""
    return parameter.ndim == 3 and bool(re.search("expert", f"{name} {type(module).__name__}", re.IGNORECASE))


def expert_name(parameter: str, index: int) -> str:
    """What the weight of one of stacked experts is called."""
    return f"{parameter}[{index}].weight"


def as_linear(model: nn.Module) -> None:
    """Replace each of GPT-2's Conv1D layers by the linear layer that computes the same."""
    from torch import nn

    for name, module in list(model.named_modules()):
        if is_conv1d(module):
            inputs, outputs = module.weight.shape
            linear = nn.Linear(inputs, outputs, device="meta")
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)


def output_embeddings(model: Any) -> nn.Module | None:
    """The output matrix of a language model; None of what writes no tokens."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def untie(model: nn.Module) -> None:
    """Give an output matrix that is tied to the input embedding a copy of its own."""
    from torch import nn

    output = output_embeddings(model)
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone())
        model.config.tie_word_embeddings = False
