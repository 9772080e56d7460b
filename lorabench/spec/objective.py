"""What a run trains for: where a step's examples come from, and what its loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.config.plugins import Plugin

if TYPE_CHECKING:
    from lorabench.spec.run_spec import RunSpec


class Objective(Plugin, ABC):
    """Fields are hyperparameters. Add an objective by adding one file to `lorabench/training/objectives/`.

    Everything else of a run, what is measured of it too, is the same with each.
    """

    folder: ClassVar[str] = "objectives"
    in_sweep: ClassVar[tuple[str, str]] = ("[base]", "objective")
    by_name: ClassVar[bool] = True
    writes: ClassVar[bool] = False
    """Whether the model writes to the prompts of the training split, whose references then have to hold an answer."""
    shares_passes: ClassVar[bool] = False
    """Whether a step is one pass over rows that stand in the data, so that several runs can have one together."""
    reports: ClassVar[tuple[str, ...]] = ()
    """The names that `metrics` gives, without `train_`."""

    watched: ClassVar[tuple[str, bool]] = ("loss", True)
    """The number of `steps.jsonl` that tells whether training goes well, and whether it is a loss; else it is a share,
    and more of it is better."""
    columns: ClassVar[dict[str, str]] = {}
    """What each thing is that `steps.jsonl` has of a step beside loss, gradient norm and learning rate."""

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """Why this objective cannot be trained for as `spec` asks: `key = value: reason`."""
        return iter(())

    def longest(self, spec: RunSpec) -> tuple[int, ...]:
        """Tokens of the longest example that a step trains on, as `Task.longest` has them."""
        return spec.task.longest(spec.seq_len)

    def not_estimated(self, spec: RunSpec) -> str:
        """What a plan's estimate from the formula leaves out of its time and memory; empty where that is nothing."""
        return ""

    @abstractmethod
    def batches(self, training: Any, check: Callable[[], None]) -> Any:
        """The source of the steps of the task being trained, a `lorabench.training.batches.Batches`.

        `check` may raise where the run is to stop.
        """

    def metrics(self, rows: list[dict[str, float]]) -> dict[str, float]:
        """`train_…` measures, of the rows of `steps.jsonl` of the last tenth of the steps."""
        return {}
