"""PEFT's `rank_pattern` and `alpha_pattern` of a model that it has attached itself to, one exact name a module.

PEFT takes the first key that fits a module, and writes its configuration with sorted keys: of keys that overlap,
another would be the first when the adapter is read again, which gives it another scale, or ranks that do not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.methods._parameters import parameter_name
from lorabench.updates.advice import exact_key

VALUES = {"rank_pattern": ("r", "effective_rank"), "alpha_pattern": ("lora_alpha", "alpha")}
"""What PEFT's configurations call the value of all others, and its layers that which they were given."""


def make_exact(config: Any, layers: Iterable[tuple[str, Any]], adapter: str) -> None:
    """Put what each layer was given in place of the patterns that gave it. InputError where PEFT has not kept to them.

    Of PEFT 0.21 that is so with HiRA.
    """
    layers = list(layers)
    for key, attributes in VALUES.items():
        patterns = getattr(config, key, None)
        if not patterns or not all(isinstance(value, (int, float)) for value in patterns.values()):
            continue  # AdaLoRA's say which directions are left, by exact names
        usual = _first(config, attributes)
        given = {_pattern_name(name, layer): _first(layer, attributes)[adapter] for name, layer in layers}
        if not hasattr(config, "effective_rank"):  # OSF's ranks, which may be shares, go by another rule
            _check_followed(key, patterns, usual, given)
        setattr(config, key, {exact_key(name): value for name, value in given.items() if value != usual})


def config_as_trained(folder: Path) -> Any:
    """PEFT's configuration of a run's adapter, with the patterns in the order of its spec."""
    from peft import PeftConfig

    from lorabench.updates.readers._peft_files import as_trained  # imports torch, which a sweep file is read without

    config: Any = PeftConfig.from_pretrained(str(folder))
    table = {key: getattr(config, key, None) for key in VALUES}
    for key, patterns in as_trained(table, folder).items():
        if patterns:
            setattr(config, key, patterns)
    return config


def _check_followed(key: str, patterns: dict[str, Any], usual: Any, given: dict[str, Any]) -> None:
    from peft.utils.other import get_pattern_key

    for name, value in given.items():
        asked = patterns.get(get_pattern_key(list(patterns), name), usual)
        if asked != value:
            raise InputError(f"{key}: PEFT does not keep to it: {name} has {value:g} and not {asked:g}")


def _first(owner: Any, attributes: tuple[str, ...]) -> Any:
    return next(getattr(owner, name) for name in attributes if hasattr(owner, name))


def _pattern_name(name: str, layer: Any) -> str:
    """What PEFT holds patterns against."""
    return parameter_name(name, layer) if hasattr(layer, "parameter_name") else name
