"""MLX (mlx-lm): `adapters.safetensors`, and `adapter_config.json` with `lora_parameters`.

ΔW = s bᵀ aᵀ with `lora_a` (N, r) and `lora_b` (r, M), and s is `scale` itself, not α / r. Embeddings have a
(vocabulary, r) and b (r, dim), so that ΔW is (dim, vocabulary). Experts (`LoRASwitchLinear`) have a (experts, r, N) and
b (experts, M, r): a layer each, `MODULE[e]`. DoRA (`m`): ΔW needs W0;
without, what is read is its part s bᵀ aᵀ.
Source: `mlx_lm/tuner/lora.py` and `dora.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.readers._dora import Dora
from lorabench.updates.readers._entry import CONFIG_FILE, Found, Source, Tensors
from lorabench.updates.readers._experts import Kept
from lorabench.updates.readers._factors import (
    Layer,
    Scale,
    adapter_file,
    as_dora,
    by_convention,
    configuration,
    found,
    is_other_file,
    rank_of,
    stems,
)
from lorabench.updates.readers._peft_config import is_number
from lorabench.updates.weightfile import is_embedding

ADAPTER_FILE = r"adapters\.safetensors"
OWN_FILE = r"(?:\d+_)?adapters\.safetensors"
"""Also of a checkpoint."""
_OF_LORA = {"rank", "scale", "dropout", "keys"}
A_LEAF, B_LEAF, MAGNITUDE = ".lora_a", ".lora_b", ".m"
ASSUMED = "no scale in a configuration beside it: it is assumed to be 1 (--alpha tells α, and s = α / r)"


def find(source: Source) -> Found | None:
    """The adapter of a folder, or of one of its files (`0000100_adapters.safetensors`); None where there is none."""
    config = configuration(source, OWN_FILE)
    if not is_other_file(source, OWN_FILE):
        _refuse_tuned_weights(source, config)
    tensors = adapter_file(source, lambda tensors: bool(stems(tensors, A_LEAF)), named=ADAPTER_FILE)
    if tensors is None:
        return None
    modules, names = stems(tensors, A_LEAF), set(tensors.names)
    scale = partial(_scale, config, source)
    layers: list[Layer | Dora] = []
    for module in modules:
        for layer in _layers(tensors, module, scale):
            m, by_input = module + MAGNITUDE, is_embedding(layer.parameter)
            layers += as_dora(layer, source, m, by_input=by_input) if m in names else [layer]
    used = {module + leaf for module in modules for leaf in (A_LEAF, B_LEAF, MAGNITUDE)}
    return found("mlx", layers, assumed=ASSUMED, left_out=[*(names - used), *_unused_fields(config)])


def _unused_fields(config: dict[str, Any]) -> list[str]:
    """Of the LoRA's own parameters; the others are those of training."""
    parameters = config.get("lora_parameters")
    unused = parameters.keys() - _OF_LORA if isinstance(parameters, dict) else ()
    return [f"{CONFIG_FILE}: lora_parameters.{name}" for name in unused]


def _refuse_tuned_weights(source: Source, config: dict[str, Any]) -> None:
    if config.get("fine_tune_type") == "full" and "lora_parameters" in config:
        raise InputError(f"{source.path}: fine_tune_type = full: tuned weights, no adapter: compare with their base")


def _layers(tensors: Tensors, module: str, scale_of: Callable[[int], Scale]) -> Iterator[Layer]:
    names = {"B": module + B_LEAF, "A": module + A_LEAF}
    shape = tensors.shape(names["A"])
    scale = scale_of(rank_of(tensors, names["A"], axis=1))
    if len(shape) == 3:
        tensors = Kept(tensors)
        for index in range(shape[0]):
            form = partial(_expert, index=index)
            yield Layer(tensors=tensors, parameter=f"{module}[{index}].weight", names=names, scale=scale, form=form)
        return
    yield Layer(tensors=tensors, parameter=f"{module}.weight", names=names, scale=scale, form=_transposed)


def _scale(config: dict[str, Any], source: Source, rank: int) -> Scale:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if scale is None:
        return by_convention(source, rank)
    if not is_number(scale):
        raise InputError(f"{source.folder / CONFIG_FILE}: lora_parameters.scale = {clip(scale)}: must be a number")
    return Scale(value=float(scale), source="config")


def _transposed(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    return B.transpose(0, 1), A.transpose(0, 1)


def _expert(B: Tensor, A: Tensor, *, index: int) -> tuple[Tensor, Tensor]:
    return B[index], A[index]
