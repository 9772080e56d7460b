"""What a sweep says of its runs: whether its claims could be decided, and stand for what its paper reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorabench.config import plugins
from lorabench.config.decode import show
from lorabench.spec.claim import Claim
from lorabench.spec.known import places_of, unknown_keys, unknown_measures, unknown_runs
from lorabench.spec.measures import Measure
from lorabench.spec.paper import Paper
from lorabench.spec.run_spec import RunSpec


def untestable(
    claim: Claim, runs: list[RunSpec], labels: dict[str, str], measures: Mapping[str, Measure], where: str
) -> list[str]:
    """Why no runs of the sweep could ever decide it."""
    problems = [
        problem
        for side, name in claim.measures.items()
        if side == "where" or name != claim.measure
        for problem in unknown_measures(
            [name],
            places_of() if claim.places[side] else measures,
            f"{where}{'' if side == 'where' else f'{side}.'}measure",
        )
    ]
    for side, at in claim.places.items():
        columns = places_of().get(claim.measures[side], ())
        key = f"{where}{'' if side == 'where' else f'{side}.'}at"
        problems += unknown_keys([*at], [*columns], key) if columns else []
    return problems + [
        problem for key, wanted in claim.sides.items() for problem in unknown_runs(wanted, runs, labels, key, where)
    ]


def unreported(paper: Paper | None, claims: Sequence[Claim | None]) -> list[str]:
    """A problem for each claim that names nothing which the paper reports."""
    items, what = [item.item for item in paper.reports] if paper else [], "item of paper.reports"
    return [
        f"claim {number}: reported = {show(claim.reported)}: {plugins.unknown(what, claim.reported, items)}"
        for number, claim in enumerate(claims, 1)
        if claim and claim.reported is not None and claim.reported not in items
    ]
