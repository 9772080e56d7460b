"""Copies of a tree of modules, in half the time that `copy.deepcopy` takes by itself."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, memo: dict[int, Any]) -> Model:
    """A deep copy; `memo` gives what stands in it for things of the model, by their `id`.

    Each module has a dozen dictionaries, mostly of hooks that nobody has registered, and Python copies one in far more
    time than it takes to make an empty one.
    """
    for module in model.modules():
        for held in vars(module).values():
            if type(held) in (dict, OrderedDict) and not held:
                memo.setdefault(id(held), type(held)())
    return copy.deepcopy(model, memo)
