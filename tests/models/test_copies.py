"""A copy is what `copy.deepcopy` makes, and nothing that is done to it is done to the model."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lorabench.models.copies import copied


class Shared(nn.Module):
    """Two names for one empty dictionary, and a hook that is there already."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = {}
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.seen: list[int] = []
        self.inner.register_forward_hook(lambda *_: self.seen.append(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_copy_is_whole_and_its_own() -> None:
    model = Shared()
    own = copied(model, {id(p): p for p in model.parameters()})
    assert [name for name, _ in own.named_modules()] == [name for name, _ in model.named_modules()]
    assert own.inner[0].weight is model.inner[0].weight and own.inner is not model.inner
    assert own.first is own.second and own.first is not model.first
    own.first["key"] = 1
    own.inner[1].register_forward_hook(lambda *_: own.seen.append(2))
    own(torch.ones(1, 3))
    assert model.first == {} and not model.inner[1]._forward_hooks
    assert model.seen == [1]  # as deepcopy has it: a function is not copied, nor what it holds
    assert own.seen == [2]


def test_all_that_a_module_has_is_of_the_kind_that_deepcopy_gives() -> None:
    model = Shared()
    own, want = copied(model, {}), copy.deepcopy(model)
    for name, module in want.named_modules():
        mine = vars(own.get_submodule(name))
        assert {key: type(value) for key, value in mine.items()} == {k: type(v) for k, v in vars(module).items()}
        assert all(id(value) != id(vars(model.get_submodule(name))[key]) for key, value in mine.items() if value == {})
