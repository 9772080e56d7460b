"""What a figure is: a frozen dataclass of its options that draws itself from a sweep's results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.config.plugins import Plugin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from pandas import DataFrame as Frame
else:
    Axes = Canvas = Frame = Any  # a sweep file is read without them

SECTIONS = {
    "cost": "What it reaches and costs",
    "spectra": "What ΔW is: spectra, ranks and norms",
    "base": "ΔW beside W0",
    "training": "Over training",
    "pairs": "Between runs",
    "other": "Other",
}
"""The headings of a report's figures, in its order."""


@dataclass(frozen=True, kw_only=True)
class Figure(Plugin, ABC):
    """Add a figure by adding one file to `lorabench/report/figures/`; its name stands in a sweep's `[[figure]]`."""

    folder: ClassVar[str] = "figures"
    in_sweep: ClassVar[tuple[str, str]] = ("[[figure]]", "")
    section: ClassVar[str] = "other"
    """Under which heading of the report it stands: a key of `SECTIONS`."""
    needs: ClassVar[str] = "runs that are done"
    """What there must be for it to draw: told where there is not."""
    intervals: ClassVar[bool] = True
    """Whether it draws intervals over seeds, which its caption then explains."""
    always: ClassVar[bool] = False
    """Whether it also stands in the report of a sweep that asks for other figures."""
    most: ClassVar[int | None] = None
    """How many settings it has room for; of more it shows some, and its caption says so."""

    where: dict[str, Any] = field(default_factory=dict)
    """The runs that it shows, named by keys of the sweep as in a claim (empty: all)."""
    width: Literal["column", "page"] | None = None
    """How wide it is in print: a column (3.3 in) or the page (6.9 in); None: a column where it is one panel."""

    @property
    def measures(self) -> list[str]:
        """What its options `costs` and `value` ask for, one measure or several, for the check when a sweep is read."""
        asked = [getattr(self, option, None) or () for option in ("costs", "value")]
        return [name for names in asked for name in ([names] if isinstance(names, str) else names)]

    @abstractmethod
    def draw(self, results: Any) -> Canvas | None:
        """The figure from `results` (a `lorabench.report.results.Results`); None where there is nothing to draw."""

    @abstractmethod
    def caption(self) -> str:
        """One or two sentences that stand under the figure: what is shown, and how to read it.

        What holds of one sweep and not of another (choices, seeds, what is left out) the report adds.
        """

    def notes(self, results: Any) -> list[str]:
        """Sentences of the caption that are true of some sweeps alone."""
        return []

    @property
    def of_kinds(self) -> str:
        """For captions: ` (q_proj)`, where only some kinds of layers are asked for."""
        kinds = getattr(self, "kinds", ())
        return f" ({', '.join(kinds)})" if kinds else ""
