"""What a paper reports beside the claims of a sweep that put it to the test, and whether these say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lorabench.report.claims import FAILS, HOLDS, OPEN
from lorabench.report.typeset import Sheet
from lorabench.spec.paper import Paper, Reported

SAME, OTHER, UNTESTED = "the same", "not the same", "not put to the test"


@dataclass(frozen=True, kw_only=True)
class Beside:
    """One table or figure of a paper, and the sweep's verdicts on what it reports."""

    item: Reported
    heads: list[str]
    claims: list[list[str]]
    """A row a claim, as the sweep's table `claims` has it."""
    verdicts: list[str]

    @property
    def shows(self) -> str:
        """`the same` where all claims hold, `not the same` where one does not, else that there are not enough data."""
        if not self.verdicts:
            return UNTESTED
        return OTHER if FAILS in self.verdicts else SAME if {*self.verdicts} == {HOLDS} else OPEN

    @property
    def counts(self) -> str:
        """`2 hold, 1 does not hold`."""
        found = Counter(self.verdicts)
        words = {HOLDS: ("holds", "hold"), FAILS: ("does not hold", "do not hold"), OPEN: ("open", "open")}
        return ", ".join(
            f"{found[key]} {one if found[key] == 1 else many}" for key, (one, many) in words.items() if found[key]
        )


def beside(paper: Paper | None, claims: Sheet | None) -> list[Beside]:
    """An entry for each table or figure that the paper reports, in its order; `claims` is the sweep's table of them."""
    heads = [column.label for column in claims.columns] if claims else []
    rows = [*zip(claims.tidy["reported"], claims.tidy["verdict"], claims.rows, strict=True)] if claims else []
    found = []
    for item in paper.reports if paper else ():
        own = [(verdict, row) for reported, verdict, row in rows if reported == item.item]
        found.append(
            Beside(item=item, heads=heads, claims=[row for _, row in own], verdicts=[verdict for verdict, _ in own])
        )
    return found


def by_name(found: Sequence[Beside]) -> dict[str, list[Beside]]:
    """Name of a table or figure of the sweep -> what stands beside it; "" -> what nothing of the sweep shows."""
    names = dict.fromkeys(name for each in found for name in each.item.shown_by)
    shown = {name: [each for each in found if name in each.item.shown_by] for name in names}
    return shown | {"": [each for each in found if not each.item.shown_by]}
