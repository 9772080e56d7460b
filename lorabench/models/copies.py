"""Copies of a tree of modules, in two fifths of the time that `copy.deepcopy` takes by itself."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
ATOMS = {
    bool, int, float, complex, str, bytes, type, type(None), FunctionType, BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size,
}  # fmt: skip
"""What is its own copy."""


def copied(model: Model, memo: dict[int, Any]) -> Model:
    """A deep copy; `memo` gives what stands in it for things of the model, by their `id`.

    What a module holds is copied here, and `copy.deepcopy` copies what else there is: a module has a dozen
    dictionaries, mostly of hooks that nobody has registered, which it takes apart and puts together again.
    """
    modules = [module for module in model.modules() if id(module) not in memo and _is_ordinary(type(module))]
    for module in modules:
        memo[id(module)] = object.__new__(type(module))
    for module in modules:
        state = module.__getstate__()
        vars(memo[id(module)]).update({name: _copied(held, memo) for name, held in state.items()})
    return cast(Model, _copied(model, memo))


def _is_ordinary(kind: type[nn.Module]) -> bool:
    """Whether its copy has a copy of all that it has, and nothing else is to be done."""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is nn.Module.__getstate__
        and kind.__setstate__ is nn.Module.__setstate__
    )


def _copied(held: Any, memo: dict[int, Any]) -> Any:
    kind = type(held)
    if kind in ATOMS:
        return held
    if id(held) in memo:
        return memo[id(held)]
    if kind not in (dict, OrderedDict):
        return copy.deepcopy(held, memo)
    memo[id(held)] = made = kind()
    for key, value in held.items():
        made[_copied(key, memo)] = _copied(value, memo)
    return made
