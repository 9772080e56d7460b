"""A claim about a sweep's runs: a sentence, what is measured for it, and the bound that decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorabench.config.quote import show
from lorabench.models.shapes import Shape
from lorabench.spec.measures import find
from lorabench.spec.run_spec import UNNAMED, flatten

SIDES = ("where", "ratio_to", "minus")
"""The fields that say which runs count, and which these are held against."""
MEASURE, AT = "measure", "at"
"""In the runs that are held against: another measure, or another place of it, where it is not the claim's."""
NULL = ":null"
"""How the number ends that chance gives: `subspace.phi:null`."""
COUNTABLE = ("num_parameters", "num_trainable", "trainable_share", "storage_bytes", "model_gib", "peak_gib")
"""What a model's shapes alone say."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`measure` of the runs of `where`, or its ratio to, or difference from, that of other runs, lies in a range.

    Runs are named by keys of the sweep, each with a value or a list of values: `{ method.name = "lora" }`. These that
    are held against may have a `measure` of their own: `ratio_to = { method.name = "lora", measure = "load_seconds" }`.
    """

    says: str
    """The sentence that is put to the test."""
    measure: str
    where: dict[str, Any] = field(default_factory=dict)
    """The runs that count (empty: all)."""
    ratio_to: dict[str, Any] | None = None
    """Divide by the measure of these runs."""
    minus: dict[str, Any] | None = None
    """Subtract the measure of these runs."""
    at: dict[str, Any] = field(default_factory=dict)
    """Of a metric of ΔW that has several values a layer, or is of pairs of runs (`intruders.count`, `subspace.phi`;
    with `:null` what chance gives): which, by columns of the analysis' table, each with a value or a list of values:
    `{ k = 10, epsilon = 0.5 }`. It is the mean over these rows; a pair counts for the seed of its first run. The runs
    that are held against may have an `at` of their own, of what differs."""
    at_least: float | None = None
    at_most: float | None = None
    """As tables show the measure: percentages times 100."""
    counted_on: Shape | None = None
    """Not by the runs, but by what their methods would train, store and take on this model, counted on its shapes."""
    reported: str | None = None
    """The `item` of [[paper.reports]] that it puts to the test."""

    def __post_init__(self) -> None:
        problems = [*self._problems()]
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        if not self.says.strip():
            yield 'says = "": needs the claim\'s sentence'
        if self.at_least is None and self.at_most is None:
            yield "at_most: is missing: a claim needs at_least, at_most or both"
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            yield f"at_least = {self.at_least:g}: is above at_most = {self.at_most:g}"
        if self.ratio_to is not None and self.minus is not None:
            yield f"minus = {show(self.minus)}: not beside ratio_to"
        if self.counted_on and self.at:
            yield f"at = {show(self.at)}: not beside counted_on"
        for name in self.measures.values() if self.counted_on else ():
            if name not in COUNTABLE:
                yield f"measure = {show(name)}: is nothing that can be counted. Choices: {', '.join(COUNTABLE)}"

    def senseless(self) -> Iterator[str]:
        """Why no answer would mean anything. A sweep that has been run with such a claim is analyzed all the same."""
        if self.ratio_to is not None and self.at_most is not None and self.at_most <= 0:
            yield f"at_most = {self.at_most:g}: a ratio is of positive values"
        units = {name: known.unit for name in self.measures.values() if (known := find(name))}
        if len({*units.values()}) > 1:
            told = " and ".join(f"{name} in {unit or 'no unit'}" for name, unit in units.items())
            yield f"measure = {show(self.measure)}: cannot be held against the other side's: {told}"
        sides = [*self.sides.values()]
        places = [*self.places.values()]
        alike = [len(set(self.measures.values())) == 1, *(each[0] == each[-1] for each in (sides, places))]
        if len(sides) == 2 and all(alike):
            yield f"where = {show(self.where)}: are the runs that these are held against"

    @property
    def sides(self) -> dict[str, dict[str, Any]]:
        """Field -> flattened key -> value, of the runs that count and of those they are held against."""
        given = {key: flatten(value) for key in SIDES if (value := getattr(self, key)) is not None}
        return {
            side: {k: v for k, v in wanted.items() if side == "where" or (k != MEASURE and not k.startswith(f"{AT}."))}
            for side, wanted in given.items()
        }

    @property
    def measures(self) -> dict[str, str]:
        """The measure of each of these."""
        held = self.ratio_to or self.minus or {}
        return {side: self.measure if side == "where" else held.get(MEASURE, self.measure) for side in self.sides}

    @property
    def places(self) -> dict[str, dict[str, Any]]:
        """What `at` is of each of these."""
        held = self.ratio_to or self.minus or {}
        return {side: self.at if side == "where" else self.at | held.get(AT, {}) for side in self.sides}

    @property
    def bound(self) -> str:
        """`≤ 1.05`, `−1 to 2`."""
        ends = [f"{end:g}".replace("-", "−", 1) for end in (self.at_least, self.at_most) if end is not None]
        return " to ".join(ends) if len(ends) == 2 else f"{'≥' if self.at_most is None else '≤'} {ends[0]}"


def matches(flat: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a run with these flattened keys is one of those that are named."""
    return all(
        any(flat.get(key, UNNAMED.get(key)) == item for item in (value if isinstance(value, list) else [value]))
        for key, value in wanted.items()
    )
