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
    where r or α is no number, or the first B A is not zero.
    """
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(REBASED):
        raise InputError(f"{where}: init_lora_weights = {start}: ΔW needs the initial factors, not in the file")
    told = _by_pattern(config, "rank_pattern", module, config.get("r"), where)
    if told != rank:
        raise InputError(f"{where}: r = {told} for {module}: its factors have rank {rank}")
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"), where)
    if not is_number(alpha):
        raise InputError(f"{where}: lora_alpha = {alpha} for {module}: must be a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _by_pattern(config: dict[str, Any], key: str, module: str, default: Any, where: str) -> Any:
    """By PEFT's rule (`peft.utils.other.get_pattern_key`)."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{where}: {key} = {patterns}: must be a table")
    try:
        return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", module)), default)
    except re.error as error:
        raise InputError(f"{where}: {key}: not a regular expression: {error}") from None
