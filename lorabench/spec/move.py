"""How adapters of a sweep's runs are moved to another base, once they are done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from lorabench.config.quote import show

RANK = 320
"""Singular vectors of each base that the ways by weights use, as in both papers."""
BY_DATA = "trans-lora"


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What `trans-lora` makes its prompts of, and how long the new adapter learns from the old one's answers.

    250 prompts and 5 examples are those of Wang et al. 2024, arXiv 2405.17258, sections 3 and 4.
    """

    prompts: Annotated[int, Ge(2)] = 250
    """That the discriminator is to keep; as many of the task's own, and made ones, it is trained on."""
    examples: Annotated[int, Ge(1)] = 5
    """Of the task's training prompts, which show the generator what to write."""
    generator: Literal["source", "target"] = "source"
    """Whose base writes prompts to distil on; what the discriminator learns to know is always the source's."""
    generator_steps: Annotated[int, Ge(0)] = 0
    """0: the examples stand in the generator's context, as in the paper. Else it is trained on them for so many steps,
    by the run's own method: a base that is too small to go by its context."""
    steps: Annotated[int, Ge(1)] | None = None
    """Of the new adapter (None: as many as the run's)."""
    lr: Annotated[float, Gt(0)] | None = None
    """Of the new adapter (None: the run's)."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """Each adapter of the runs of `where` on another base, beside what it stands against there."""

    to: str
    """The new base: Hub id, local folder, or `builtin:NAME`."""
    by: Literal["project", "cross-lora", "trans-lora"] = "project"
    where: dict[str, Any] = field(default_factory=dict)
    """The runs that are moved, named by keys of the sweep as in a claim (empty: all)."""
    rank: Annotated[int, Ge(1)] = RANK
    """Singular vectors of each base that are used."""
    distil: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        problems = [*self._problems()]
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        if not self.to:
            yield f"to = {show(self.to)}: must name a base"
        if self.by == BY_DATA and self.rank != RANK:
            yield f'rank = {self.rank}: is of the ways by weights, not of by = "{BY_DATA}"'
        if self.by != BY_DATA and self.distil != Distillation():
            yield f'distil: is of by = "{BY_DATA}" alone'
