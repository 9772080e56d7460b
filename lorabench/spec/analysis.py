"""What an analysis is: a small class that turns thin SVDs of updates into tidy rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.config.plugins import Plugin

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "metric": "what `value` is",
    "value": "the number",
    "null": "the number that chance gives: what it is of is told with the metric",
    "null_std": "standard deviation of the number by chance",
    "side": "`input`: right singular vectors; `output`: left ones; `both`: neither by itself",
    "index": "number of a singular value or angle, from 1",
    "k": "number of top singular directions that count, or of the one direction meant, from 1",
    "r": "number of top singular directions of ΔW that count",
    "step": "optimizer steps after which the number stood; empty where it is one of the whole training",
}
"""Columns that mean the same in every analysis."""
LAYERS = ("layer", "kind", "depth")
"""What the engine puts before them, of a layer; and of a pair of runs:"""
PAIRS = ("axis", "value_a", "value_b")


class Analysis(Plugin, ABC):
    """Add an analysis by adding one file to `lorabench/analyses/`; never knows which method made an update."""

    folder: ClassVar[str] = "analyses"
    in_sweep: ClassVar[tuple[str, str]] = ("[[table]]", "")
    needs: ClassVar[Literal["layer", "base", "pair", "base_pair", "trajectory"]]
    """What `compute` is called with. `layer`: each layer of a run. `base`: each layer on its W0 (`base.Tuned`).
    `pair`: the same layer of two runs that differ in one axis. `base_pair`: the same, each on its W0. `trajectory`: the
    same layer of a run after each of its snapshots, in order of `step`, the end of training last."""
    version: ClassVar[int] = 1
    """Part of the cache key: raise it when the numbers change."""
    metrics: ClassVar[dict[str, str]] = {}
    """Metric -> what it is, for the column documentation."""
    per_layer: ClassVar[dict[str, str]] = {}
    """Where `needs` is not `layer`: the metrics that are one number a layer, for tables -> their unit."""
    columns: ClassVar[dict[str, str]] = {}
    """Column -> what it is; what is in COLUMNS need not be told again."""
    values: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Where rows have a column for each metric, not `metric` and `value`: these columns -> those of what chance gives,
    its mean, its standard deviation and, where it is simulated, the standard error of that mean."""
    max_pairs: ClassVar[int] = 2048
    """Pairs along one axis, at most, that it is made of; of more a sample (`lorabench.analysis.pairs`)."""

    @classmethod
    def is_of_pairs(cls) -> bool:
        return cls.needs in ("pair", "base_pair")

    @classmethod
    def is_beside_base(cls) -> bool:
        return cls.needs in ("base", "base_pair")

    @abstractmethod
    def compute(self, *layers: Any) -> list[dict[str, Any]]:
        """Tidy rows; the engine puts the run's and the layer's columns before them.

        A row may hold one-dimensional arrays of one length, and then stands for that many rows.
        """

    def over_layers(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of all layers of all runs or pairs, with those added that need more than one layer."""
        return frame
