"""Several of torch's optimizers as one, for a run that steps some of its parameters one way and others another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def several(parts: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Steps each of them. Its groups are theirs, one after the other; its state is all that they keep."""
    import torch

    class Several(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([group for part in parts for group in part.param_groups], {})
            self._share()

        def _share(self) -> None:
            """What they step by is what is told and loaded here."""
            groups = iter(self.param_groups)
            for part in parts:
                part.param_groups = [*itertools.islice(groups, len(part.param_groups))]
                part.state = self.state

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for part in parts:
                part.step()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self._share()

    return Several()
