"""PEFT's configuration of a LoRA adapter, in its own file or another's header: rank and scale of each module by it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.readers._patterns import patterns_of

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.bin")
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations whose first B A is not zero and was taken out of the base: ΔW is what was added to it."""
_MOST_LAYERS = 100_000
_BLOCK = re.compile(r"(?<=\.layers\.)\d{1,6}(?=\.)|(?<=\.layer\.)\d{1,6}(?=\.)|(?<=\.h\.)\d{1,6}(?=\.)")
"""What PEFT replicates: blocks of Llama-, BERT- and Falcon-like models."""
_OTHER_FORMS = ("use_bdlora", "use_qalora", "kasa_config", "monteclora_config")


def check_lora(config: dict[str, Any], file: Path | str) -> None:
    """Refuse what is not ΔW = s B A, or no sensible number, rather than give wrong ones."""
    if not _is_rank(config.get("r")):
        raise InputError(f"{file}: r = {clip(config.get('r'))}: must be a whole number, at least 1")
    if not is_number(config.get("lora_alpha")):
        raise InputError(f"{file}: lora_alpha = {clip(config.get('lora_alpha'))}: must be a number")
    check_patterns(config, file)
    for key in _OTHER_FORMS:
        if config.get(key):
            raise InputError(f"{file}: {key} = {clip(config[key])}: its ΔW is not s B A, and cannot be read")


def check_patterns(config: dict[str, Any], file: Path | str) -> None:
    for key, valid in _PATTERNS.items():
        patterns_of(config, key, valid, file)


def rank_and_scale(config: dict[str, Any], module: str, file: Path | str) -> tuple[int, float]:
    """r, and s = α / r (rsLoRA: α / √r), of one module."""
    rank = by_pattern(config, "rank_pattern", module, config["r"], file)
    alpha = by_pattern(config, "alpha_pattern", module, config["lora_alpha"], file)
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def scale_of_factors(config: dict[str, Any], module: str, rank: int, file: Path | str) -> float:
    """s of a module whose factors have this rank, where `file` has no initial factors beside it.

    InputError where the configuration says another rank, no number, or that the first B A is not zero.
    """
    check_lora(config, file)
    if targets := config.get("target_parameters"):
        raise InputError(f"{file}: target_parameters = {clip(targets)}: its ΔW is not s B A, and cannot be read")
    if start := rebased(config):
        raise InputError(f"{file}: init_lora_weights = {clip(start)}: ΔW needs the initial factors, not in the file")
    told, scale = rank_and_scale(config, module, file)
    if told != rank:
        raise InputError(f"{file}: r = {clip(told)} for {module}: its factors have rank {rank}")
    return scale


def original_layers(config: dict[str, Any], file: Path | str) -> list[int]:
    """Of a model whose blocks `layer_replication` repeats: which block of the base each one is; empty of any other."""
    told = config.get("layer_replication") or []
    try:
        spans = [range(start, stop) for start, stop in told]
    except (TypeError, ValueError):
        spans = [range(0)]
    if told and not 0 < sum(map(len, spans)) <= _MOST_LAYERS:
        raise InputError(f"{file}: layer_replication = {clip(told)}: must be a list of [start, stop]")
    return [layer for span in spans for layer in span]


def original_name(name: str, layers: list[int]) -> str:
    """The base's name of a parameter: `layers` as `original_layers` gives them."""

    def number(match: re.Match[str]) -> str:
        return str(layers[int(match[0])]) if int(match[0]) < len(layers) else match[0]

    return _BLOCK.sub(number, name, count=1) if layers else name


def rebased(config: dict[str, Any]) -> str | None:
    """The name of an initialization whose first B A is not zero; None for another."""
    start = str(config.get("init_lora_weights", True)).lower()
    return start if start.startswith(REBASED) else None


def by_pattern(config: dict[str, Any], key: str, module: str, default: Any, file: Path | str) -> Any:
    """The value of the first pattern that matches."""
    return patterns_of(config, key, _PATTERNS[key], file).value(module, default)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """A finite one, of a size that scales have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


_PATTERNS = {"rank_pattern": _is_rank, "alpha_pattern": is_number}
