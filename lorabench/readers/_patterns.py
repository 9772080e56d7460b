"""Rank and scale of a module by a PEFT configuration, wherever it is kept: its own file, or another file's header."""

from __future__ import annotations

import math
import re
from typing import Any

from lorabench.decode import InputError

REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations whose first B A is not zero and was taken out of the base: ΔW is what was added to it."""


def module_scale(config: dict[str, Any], module: str, rank: int, where: str) -> float:
    """s = α / r, or α / √r for rsLoRA, by the first pattern that matches, where there are patterns.

    `rank` is that of the module's factors, which must be what the configuration says. InputError where it is another,
    where r or α is missing, or the first B A is not zero.
    """
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise InputError(f"{where}: r = {config.get('r')}: must be a whole number, at least 1")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise InputError(f"{where}: lora_alpha = {config.get('lora_alpha')}: must be a number")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(REBASED):
        raise InputError(f"{where}: init_lora_weights = {start}: ΔW needs the initial factors, not in the file")
    told = _by_pattern(config, "rank_pattern", module, config["r"], where)
    if told != rank:
        raise InputError(f"{where}: r = {told} for {module}: its factors have rank {rank}")
    alpha = _by_pattern(config, "alpha_pattern", module, config["lora_alpha"], where)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: dict[str, Any], key: str, module: str, default: Any, where: str) -> Any:
    """By PEFT's rule (`peft.utils.other.get_pattern_key`)."""
    patterns = config.get(key) or {}
    try:
        return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", module)), default)
    except re.error as error:
        raise InputError(f"{where}: {key}: not a regular expression: {error}") from None
