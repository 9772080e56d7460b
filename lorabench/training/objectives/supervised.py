"""Supervised training: the loss of the data's own texts, labels or scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.spec.objective import Objective

if TYPE_CHECKING:
    from lorabench.training.batches import Batches


@dataclass(frozen=True, kw_only=True)
class Supervised(Objective):
    """The task's loss, as a mean over all predictions of a step's `batch_size` examples."""

    shares_passes: ClassVar[bool] = True

    def batches(self, training: Any, check: Callable[[], None]) -> Batches:
        from lorabench.training.batches import Rows

        return Rows(training)


EXAMPLE = Supervised()
