"""What the methods that train a choice of the base's own parameters share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorabench.config.decode import InputError
from lorabench.models.base_model import new_heads
from lorabench.models.weights import is_linear_layer, weight_changes
from lorabench.spec.method import LoadBase, Method
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


class Chosen(Method):
    """`choose` names the parameters that train, all others are frozen; a new task head trains too."""

    @abstractmethod
    def choose(self, model: nn.Module) -> list[str]:
        """Full names of the parameters that train, a new task head's apart. InputError where there are none."""

    def attach(self, model: nn.Module, spec: RunSpec) -> nn.Module:
        names = self.choose(model)
        heads = tuple(f"{head}." for head in new_heads(model))
        model.requires_grad_(False)
        for name in [*names, *(name for name, _ in model.named_parameters() if heads and name.startswith(heads))]:
            module = model.get_submodule(name.rpartition(".")[0])
            if not is_linear_layer(module):
                module.float()  # a norm whose gain and bias are of two dtypes does not compute
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return model

    def unload(self, model: nn.Module) -> nn.Module:
        return model

    def updates(self, model: nn.Module, load_base: LoadBase) -> Iterator[Update]:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return weight_changes(model, load_base(), names=names)


def none_found(method: Method, what: str, model: nn.Module) -> InputError:
    return InputError(f'method.name = "{method.name}": {type(model).__name__} has no {what} to train')
