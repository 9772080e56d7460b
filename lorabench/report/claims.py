"""Verdicts on a sweep's claims, each from its own runs: whether the whole interval lies where the claim has it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from lorabench.config.decode import InputError
from lorabench.models.shapes import NAMES, Shape
from lorabench.report.aggregate import CONFIDENCE, by_seed, number, places, plain, seed_means
from lorabench.report.differences import Estimate, Seeds, difference, mean, ratio, seeds_needed
from lorabench.report.labels import (
    capitalized,
    key_label,
    measure,
    measure_label,
    series_label,
    shown_factor,
    value_label,
)
from lorabench.report.results import Results, grouped, kept_rows, selected
from lorabench.report.typeset import Column, Sheet
from lorabench.report.update_metrics import at_place
from lorabench.spec.claim import CHOSEN, Claim
from lorabench.spec.measures import INTERVENED

HOLDS, FAILS, OPEN = "holds", "does not hold", "not enough data"
COUNTED = ("model_gib", "optimizer_state_gib", "tensor_peak_gib", "resident_adapter_gib", "flops_per_step")
"""Measures that are counted, beside those of parameters and files."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the runs say of a claim; `why` they do not say more."""

    claim: Claim
    verdict: str
    estimate: Estimate | None
    why: str = ""
    seeds: tuple[int, ...] = ()
    """Of each side."""
    run_ids: tuple[str, ...] = ()


def verdicts(results: Results) -> list[Verdict]:
    """Of each of the sweep's claims, in order; from the runs that are compared, each setting at its best value of
    what [select] chooses."""
    return [judge(claim, results) for claim in results.sweep.claims]


def judge(claim: Claim, results: Results) -> Verdict:
    """Runs of one seed are averaged first, as in every table."""
    if claim.counted_on is not None:
        return _by_counting(claim, claim.counted_on, results)
    runs = selected(results).done
    sides, run_ids, left_out = [], [], []
    for side, wanted in claim.sides.items():
        named, name, at = set(results.of(wanted).runs.index), claim.measures[side], claim.places[side]
        own = kept_rows(runs, [run_id in named for run_id in runs.index])
        own = own.assign(**{name: at_place(results, name, at)}) if at else own
        own, lacking = _whole(own, results.settings, name)
        sides.append(seed_means(own, claim.measures[side]))
        run_ids += list(own.index)
        left_out += lacking
    seeds, ids = tuple(map(len, sides)), tuple(dict.fromkeys(run_ids))
    if not all(sides):
        empty = list(claim.sides)[[bool(side) for side in sides].index(False)]
        asked = "; lorabench intervene makes it" if claim.measures[empty].startswith(INTERVENED) else ""
        why = f'no run of "{empty}" is done and has the measure{asked}'
        return Verdict(claim=claim, verdict=OPEN, estimate=None, why=why, seeds=seeds, run_ids=ids)
    if claim.ratio_to is not None and any(value <= 0 for side in sides for value in side.values()):
        why = "a ratio is of positive values"
        return Verdict(claim=claim, verdict=OPEN, estimate=None, why=why, seeds=seeds, run_ids=ids)
    estimate = _counted(claim, sides) or _estimated(claim, sides)
    verdict, why = _decided(claim, estimate)
    if left_out:
        why = "; ".join(filter(None, [why, f"without {', '.join(dict.fromkeys(left_out))}, which lacks seeds"]))
    return Verdict(claim=claim, verdict=verdict, estimate=estimate, why=why, seeds=seeds, run_ids=ids)


def not_intervened(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """The runs that are compared, and the places of `lorabench intervene` in them, that claims ask for and that are
    not there."""
    found, runs = [], selected(results).done
    for claim in results.sweep.claims:
        for side, wanted in claim.sides.items():
            at = claim.places[side] or {}
            if claim.measures[side].startswith(INTERVENED) and "lambda" in at:
                named = [run_id for run_id in results.of(wanted).runs.index if run_id in runs.index]
                found += [(run_id, at) for run_id in named if not _is_there(at, results.interventions.get(run_id, []))]
    return found


def _is_there(at: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> bool:
    return any(all(point.get(key) == value for key, value in at.items()) for point in points)


def _by_counting(claim: Claim, shape: Shape, results: Results) -> Verdict:
    """The mean over the settings that are named, done or not: a count depends on no run, nor on the selection."""
    from lorabench.launch.counted import count_on

    specs, values = {spec.id: spec for spec in results.sweep.runs}, []
    why = f"counted on the shapes of {NAMES[shape]}"
    try:
        for side, wanted in claim.sides.items():
            name = claim.measures[side]
            named = grouped(results.of(wanted).runs, [*results.settings])
            counts = [count_on(specs[runs.index[0]], shape)[name] for _, runs in named]
            values.append(shown_factor(name) * fmean(counts))
    except InputError as error:
        return Verdict(claim=claim, verdict=OPEN, estimate=None, why=f"{why}: {error}")
    estimate = _exact(claim, values, n=0)
    return Verdict(claim=claim, verdict=_decided(claim, estimate)[0], estimate=estimate, why=why)


def _whole(runs: pd.DataFrame, settings: list[str], name: str) -> tuple[pd.DataFrame, list[str]]:
    """The runs of those settings that have the measure for each seed that any has, and what the others are called.

    Else some seeds' mean would be over other settings than the rest's.
    """
    found = [(values, chunk, set(by_seed(chunk, name))) for values, chunk in grouped(runs, settings)]
    found = [(values, chunk, seeds) for values, chunk, seeds in found if seeds]
    every = set().union(*(seeds for _, _, seeds in found))
    whole = [chunk for _, chunk, seeds in found if seeds == every]
    if not whole:  # no setting has them all: those of the most seeds
        most = max((len(seeds) for *_, seeds in found), default=0)
        first = next((seeds for *_, seeds in found if len(seeds) == most), set())
        whole = [chunk for _, chunk, seeds in found if seeds == first]
        every = first
    lacking = [series_label(settings, values) for values, _, seeds in found if seeds != every]
    return (pd.concat(whole) if whole else runs.iloc[:0]), lacking


def _estimated(claim: Claim, sides: Sequence[Seeds]) -> Estimate:
    if claim.ratio_to is not None:
        return ratio(*sides)
    return difference(*sides) if claim.minus is not None else mean(sides[0])


def _counted(claim: Claim, sides: Sequence[Seeds]) -> Estimate | None:
    """What is counted and the same for every seed is exact; None of anything else."""
    if not all(map(_is_count, claim.measures.values())) or any(len(set(side.values())) > 1 for side in sides):
        return None
    return _exact(claim, [next(iter(side.values())) for side in sides], n=min(map(len, sides)))


def _exact(claim: Claim, values: Sequence[float], n: int) -> Estimate:
    """What is counted has no spread."""
    value = values[0] / values[1] if claim.ratio_to is not None else values[0] - sum(values[1:])
    return Estimate(value=value, low=value, high=value, n=n, error=0.0)


def _is_count(name: str) -> bool:
    return measure(name).group == "counts" or name.endswith("_bytes") or name in (*COUNTED, CHOSEN)


def _decided(claim: Claim, estimate: Estimate) -> tuple[str, str]:
    low, high = estimate.low, estimate.high
    if estimate.error == 0 and not claim.counted_on and not all(map(_is_count, claim.measures.values())):
        return OPEN, f"its {estimate.n} seeds are alike: no spread to judge by"
    if low is None or high is None:
        return OPEN, f"{estimate.n} seed has no interval; two or more do" if estimate.n == 1 else "no interval"
    least = -math.inf if claim.at_least is None else claim.at_least
    most = math.inf if claim.at_most is None else claim.at_most
    if least <= low and high <= most:
        return HOLDS, ""
    if high < least or low > most:
        return FAILS, ""
    near = min(abs(estimate.value - bound) for bound in (least, most))
    needed = seeds_needed(estimate, _distance(claim, estimate, near))
    told = f"about {needed} seeds would tell" if needed else "no number of seeds in reach would tell"
    return OPEN, f"the bound lies inside the interval; {told}"


def _distance(claim: Claim, estimate: Estimate, near: float) -> float:
    """To the nearest bound, on the scale of the error: of a ratio the logarithm's."""
    if claim.ratio_to is None:
        return near
    bounds = [bound for bound in (claim.at_least, claim.at_most) if bound is not None and bound > 0]
    return min((abs(math.log(estimate.value / bound)) for bound in bounds), default=0.0)


FILE = "claims.csv"
"""Of a report's tables, the one that `read` reads."""


def read(tables: Path) -> list[dict[str, Any]]:
    """The verdicts that stand in a report's tables, a row a claim."""
    if not (tables / FILE).is_file():
        return []
    found: list[dict[str, Any]] = json.loads(pd.read_csv(tables / FILE).to_json(orient="records"))
    return found


def claims_sheet(results: Results, name: str = "claims") -> Sheet | None:
    """A row a claim; None where the sweep makes none."""
    found = verdicts(results)
    if not found:
        return None
    columns = [
        Column(label=label, numeric=False) for label in ("Claim", "Measured", "Bound", "Seeds", "Verdict", "Remark")
    ]
    rows = [
        [item.claim.says, _measured(item), item.claim.bound, _seeds_text(item), item.verdict, item.why]
        for item in found
    ]
    notes = [
        f"A claim holds where the whole two-sided {CONFIDENCE:.0%} interval over seeds lies within its bound, and does "
        "not where all of it lies outside. Where two sides have two or more seeds in common the interval is that of "
        "the pairs (Student's t; ratios by their logarithms), else Welch's; what is counted and the same for each seed "
        "is exact, as is what is counted on a model's shapes. Each claim stands for itself: of twenty that are just at "
        "their bound one is decided by chance."
    ]
    return Sheet(name=name, caption="Claims", columns=columns, rows=rows, notes=notes, tidy=_tidy(found))


def _tidy(found: list[Verdict]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for item in found:
        claim, estimate = item.claim, item.estimate
        rows.append({
            "claim": claim.says, "measure": claim.measure, "other_measure": _other_measure(claim), "kind": _kind(claim),
            "at": _at_text(claim.at) or None, "counted_on": claim.counted_on, "reported": claim.reported,
            "verdict": item.verdict,
            "estimate": estimate.value if estimate else None, "low": estimate.low if estimate else None,
            "high": estimate.high if estimate else None, "at_least": claim.at_least, "at_most": claim.at_most,
            "num_seeds": min(item.seeds, default=0), "paired": estimate.is_paired if estimate else None,
            "why": item.why, "runs": " ".join(item.run_ids),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _other_measure(claim: Claim) -> str | None:
    """Of the runs that are held against, where it is not the claim's."""
    return next((name for name in claim.measures.values() if name != claim.measure), None)


def _kind(claim: Claim) -> str:
    return "ratio" if claim.ratio_to is not None else "difference" if claim.minus is not None else "mean"


def _seeds_text(item: Verdict) -> str:
    return "counted" if item.claim.counted_on else " and ".join(map(str, item.seeds))


def _measured(item: Verdict) -> str:
    """`validation loss, lora over full: 1.02 [1.00, 1.04]`."""
    claim, estimate = item.claim, item.estimate
    other = _other_measure(claim)
    names = [
        series_label(list(wanted), [_one(value) for value in wanted.values()]) or "all runs"
        for wanted in claim.sides.values()
    ]
    if other and len(set(names)) == 1:
        names[1:] = [measure_label(other)]
    elif other:
        names[1:] = [f"{measure_label(other)} of {names[1]}"]
    places_of = [*claim.places.values()]
    shared = {key: value for key, value in claim.at.items() if all(at.get(key) == value for at in places_of)}
    own = [_at_text({key: value for key, value in at.items() if key not in shared}) for at in places_of]
    names = [f"{name} at {text}" if text else name for name, text in zip(names, own, strict=True)]
    unit = "" if claim.ratio_to is not None else measure(claim.measure).unit
    if claim.minus is not None:
        unit = unit.replace("%", "points")
    between = " over " if claim.ratio_to is not None else " less "
    where = f" at {_at_text(shared)}" if shared else ""
    what = capitalized(f"{measure_label(claim.measure)}{where}, {between.join(names)}")
    return f"{what}: {_number(estimate)}{f' {unit}' if unit and estimate else ''}"


def _at_text(at: Mapping[str, Any]) -> str:
    """`k 10, epsilon 0.5`."""
    return ", ".join(f"{key_label(key)} {value_label(_one(value))}" for key, value in at.items())


def _one(value: Any) -> Any:
    return " / ".join(map(str, value)) if isinstance(value, list) else value


def _number(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    if not estimate.error or estimate.low is None or estimate.high is None:
        return plain(estimate.value)
    decimals = places(min(estimate.value - estimate.low, estimate.high - estimate.value))  # of a ratio they differ
    low, value, high = (number(value, decimals) for value in (estimate.low, estimate.value, estimate.high))
    return f"{value} [{low}, {high}]"
