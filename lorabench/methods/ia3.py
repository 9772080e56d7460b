"""IA3: a learned vector scales keys, values and the feed-forward's hidden activations.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper", arXiv 2205.05638. By PEFT.
ΔW = diag(l - 1) W0 where outputs are scaled, W0 diag(l - 1) where inputs are; biases of scaled outputs change too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorabench.config.decode import InputError
from lorabench.config.quote import show
from lorabench.methods._peft import Tuner, bias_update, exact, tuner_layers
from lorabench.models import targets
from lorabench.spec.method import LoadBase
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Ia3(Tuner):
    """The paper's places are keys, values and, on its input, the feed-forward's last matrix."""

    targets: str = "key-value-down"
    feedforward: str = "down"
    """Those of the targets whose input is scaled: `down` (the feed-forward's last matrix), or a regular expression."""

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        try:
            re.compile(self.feedforward)
        except re.error as error:
            yield f"method.feedforward = {show(self.feedforward)}: not a regular expression: {error}"

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        from peft import IA3Config

        names = self.match(model)
        if self.feedforward == "down":
            inputs = [name for name in names if re.search(targets.DOWN, name)]
        else:
            inputs = [name for name in names if re.fullmatch(rf"(.*\.)?({self.feedforward})", name)]
        if (
            not inputs
            and self.feedforward == "down"
            and (stacked := targets.find(model, self.targets, self.layers).stacked)
        ):
            raise InputError(
                f'method.name = "ia3": the feed-forward of {type(model).__name__} ends in stacked experts, on which '
                f"PEFT has no IA3: {stacked[0]} …"
            )
        if not inputs:
            raise InputError(f"method.feedforward = {show(self.feedforward)}: fits none of the targets: {names[:4]} …")
        return IA3Config(target_modules=names, feedforward_modules=inputs)

    def layer_updates(self, model: nn.Module, load_base: LoadBase) -> Iterator[Update]:
        for name, module in tuner_layers(model):
            yield self.layer_update(name, module)
            yield from bias_update(name, exact(module), exact(module.get_base_layer()))


EXAMPLE = Ia3()
