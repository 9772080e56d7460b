"""What a figure is: a frozen dataclass of its options that draws itself from a sweep's results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.plugins import Plugin

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


class Figure(Plugin, ABC):
    """Add a figure by adding one file to `lorabench/figures/`; its name stands in a sweep's `[[figure]]`."""

    folder: ClassVar[str] = "figures"

    @property
    def measures(self) -> list[str]:
        """The measures that the sweep file asked it to draw, for the check when a sweep is read."""
        return []

    @abstractmethod
    def draw(self, results: Any) -> MatplotlibFigure | None:
        """The figure from `results` (a `lorabench.results.Results`); None where there is nothing to draw."""

    @abstractmethod
    def caption(self) -> str:
        """One or two sentences that stand under the figure: what is shown, and how to read it."""
