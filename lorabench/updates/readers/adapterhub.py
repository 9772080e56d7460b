"""AdapterHub (`adapters`): `pytorch_adapter.bin` or `adapter.safetensors`, and an `adapter_config.json` of its own.

Its configuration lies under `config`, and has an `architecture`. LoRA: ΔW = s B A with `MODULE.loras.NAME.lora_A` (r,
in), `lora_B` (out, r), s = `alpha` / `r`. A fused linear of q, k and v is as loralib's, and `attn_matrices` tells which
of them have a LoRA. With `use_dora`, what is read is s B A: its forward pass leaves s out of the norms and its merge
leaves it out altogether, so that ΔW is not one matrix. Bottleneck adapters, prefixes and prompts have no ΔW, and those
that scale activations or gate them by the input none of this form: all are refused.

Source: `adapters/methods/lora.py`.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.readers._entry import CONFIG_FILE, Found, Source, Tensors
from lorabench.updates.readers._factors import (
    Layer,
    Scale,
    adapter_file,
    as_part,
    configuration,
    found,
    grouped,
    is_other_file,
    plain,
    rank_of,
)
from lorabench.updates.readers._peft_config import is_number

ADAPTER_FILE = r"pytorch_adapter\.bin|adapter\.safetensors"
FUSED = ("c_attn", "in_proj", "Wqkv", "qkv")
"""What `adapters` wraps as a fused linear: GPT-2, DeBERTa, ModernBERT."""

DORA = "what adapters computes with is not what it merges, so that ΔW itself is not told"

_FIELDS = {"architecture", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "r", "alpha", "dropout",
           "attn_matrices", "composition_mode", "init_weights", "init_weights_seed", "use_gating", "use_dora",
           "vera_d", "vera_b", "dtype"}  # fmt: skip
"""Of its LoRAConfig: what is used, and what says where and how it was trained."""
_NAME = re.compile(r"(?P<module>.+)\.loras\.[^.]+\.lora_A")


def find(source: Source) -> Found | None:
    """The adapter of a folder, or of a file with its configuration beside it; None where there is none."""
    told = configuration(source, ADAPTER_FILE)
    config, where = told.get("config"), f"{source.folder / CONFIG_FILE}"
    if not isinstance(config, dict) or "peft_type" in told or not {"model_class", "version"} & told.keys():
        return None
    if not is_other_file(source, ADAPTER_FILE):
        _check_readable(config, where)
    tensors = adapter_file(source, lambda tensors: bool(_modules(tensors)), named=ADAPTER_FILE)
    if tensors is None and is_other_file(source, ADAPTER_FILE):
        return None
    _check_readable(config, where)
    if tensors is None:
        raise InputError(f"{source.path}: no LoRA factors (….loras.NAME.lora_A) beside {CONFIG_FILE}")
    modules = _modules(tensors)
    layers = [_layer(tensors, stem, module, config) for stem, module in modules.items()]
    dora = {f"{stem}.m.weight" for stem in modules} if config.get("use_dora") else set()
    used = {f"{stem}.{factor}" for stem in modules for factor in ("lora_A", "lora_B")} | dora
    return found("adapterhub", layers, dora=DORA, left_out=[*(set(tensors.names) - used), *_unused_fields(config)])


def _check_readable(config: dict[str, Any], where: str) -> None:
    """Refuse what is not ΔW = s B A, rather than give wrong numbers."""
    architecture = config.get("architecture")
    if architecture in (None, "prefix_tuning", "prompt_tuning", "reft"):  # None: a bottleneck adapter
        raise InputError(f"{where}: architecture = {clip(architecture or 'bottleneck')}: not applicable: it has no ΔW")
    if architecture != "lora":
        raise InputError(f"{where}: architecture = {clip(architecture)}: only lora can be read")
    for key, readable in (("composition_mode", "add"), ("use_gating", False), ("vera_d", None), ("vera_b", None)):
        if config.get(key, readable) != readable:
            raise InputError(f"{where}: {key} = {clip(config[key])}: its ΔW is not s B A, and cannot be read")
    for key in ("r", "alpha"):
        if not is_number(config.get(key)) or config[key] <= 0:
            raise InputError(f"{where}: {key} = {clip(config.get(key))}: must be a number above 0")


def _unused_fields(config: dict[str, Any]) -> list[str]:
    return [f"{CONFIG_FILE}: config.{name}" for name in config.keys() - _FIELDS]


def _modules(tensors: Tensors) -> dict[str, str]:
    """`MODULE.loras.NAME` -> `MODULE`."""
    matches = (_NAME.fullmatch(name) for name in tensors.names)
    return {match.string.removesuffix(".lora_A"): match["module"] for match in matches if match}


def _layer(tensors: Tensors, stem: str, module: str, config: dict[str, Any]) -> Layer:
    on = tuple(matrix in config.get("attn_matrices", ()) for matrix in "qkv")
    fused = module.rpartition(".")[2] in FUSED and any(on)
    rank = rank_of(tensors, f"{stem}.lora_A") / (sum(on) if fused else 1)
    if rank != config["r"]:
        raise InputError(
            f"{tensors.file}: {module}: its factors have rank {rank:g}, and {CONFIG_FILE} r = {clip(config['r'])}"
        )
    layer = Layer(
        tensors=tensors,
        parameter=f"{module}.weight",
        names={"B": f"{stem}.lora_B", "A": f"{stem}.lora_A"},
        scale=Scale(value=config["alpha"] / rank, source="config"),
        form=partial(grouped, on=on) if fused else plain,
    )
    return as_part(layer) if config.get("use_dora") else layer
