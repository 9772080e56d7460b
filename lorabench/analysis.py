"""What an analysis is: a small class that turns thin SVDs of updates into tidy rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.plugins import Plugin

if TYPE_CHECKING:
    from lorabench.layer import LayerSVD


class Analysis(Plugin, ABC):
    """Add an analysis by adding one file to `lorabench/analyses/`; never knows which method made an update."""

    folder: ClassVar[str] = "analyses"
    needs: ClassVar[Literal["layer", "pair"]]
    """`layer`: called with each layer of a run. `pair`: with the same layer of two runs that differ in one axis."""
    version: ClassVar[int] = 1
    """Part of the cache key: raise it when the numbers change."""
    metrics: ClassVar[dict[str, str]] = {}
    """Metric -> what it is, for the column documentation."""

    @abstractmethod
    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        """Tidy rows; the engine puts the run's and the layer's columns before them.

        A row may hold one-dimensional arrays of one length, and then stands for that many rows.
        """
