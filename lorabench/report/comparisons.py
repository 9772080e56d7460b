"""What came out of a sweep: the best setting, how far the others are behind, and what it costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd

from lorabench.report.aggregate import CONFIDENCE, number, places, plain, seed_means, unstable
from lorabench.report.differences import Estimate, Seeds, difference, holm, seeds_needed
from lorabench.report.labels import key_label, measure, measure_label, series_label, value_label, with_unit
from lorabench.report.results import Results, Selection, grouped
from lorabench.report.typeset import Column, Sheet
from lorabench.spec.generate import METRICS

LEVEL = 1 - CONFIDENCE
MOST_SETTINGS = 100
"""Of more no pairs are compared: their correction leaves nothing to find."""
COSTS = ("peak_gib", "total_seconds", "storage_bytes", "updates_bytes", "num_trainable")
NO_DIFFERENCE = "not enough runs to tell"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting that is compared, and its measure by seed, as it is shown."""

    values: tuple[Any, ...]
    name: str
    seeds: Seeds
    runs: pd.DataFrame

    @property
    def mean(self) -> float:
        return fmean(self.seeds.values())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A setting beside the best one: the best's measure less this one's."""

    other: Setting
    estimate: Estimate
    behind: float
    """How far it is behind: below 0 where it is ahead in the seeds that both have."""
    p: float | None
    """Corrected over all pairs of settings (Holm)."""
    needed: int | None
    """Seeds that would tell a difference as large as was seen."""

    @property
    def is_told(self) -> bool:
        return self.p is not None and self.p < LEVEL


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """The settings by one measure, the best first, each of the others beside it."""

    measure: str
    best: Setting
    others: list[Comparison]
    """From the next to the last."""
    num_pairs: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out, in sentences and as a table."""

    sentences: list[str]
    sheet: Sheet


def outcome(results: Results) -> Outcome | None:
    """None where there is nothing to compare. What is measured on different data is never compared."""
    parts = [(task, part, compare(part, part.selection)) for task, part in results.by_task.items()]
    told = {task: (part, found) for task, part, found in parts if found}
    if not told:
        return None
    lines = [
        f"{task}: {line}" if task else line for task, (part, found) in told.items() for line in sentences(part, found)
    ]
    sheet = comparisons_sheet({task: found for task, (_, found) in told.items()})
    return Outcome(sentences=[*lines, *_edges(results, results.selection)], sheet=sheet)


def compare(results: Results, selection: Selection) -> Comparisons | None:
    """None where fewer than two settings have the measure, or too many.

    The best setting was chosen among all, so each comparison is corrected over all pairs, not over those shown alone.
    """
    name = best_by(results)
    better = measure(name).higher_is_better
    settings = [
        Setting(values=values, name=series_label(results.settings, values) or "all runs", seeds=seeds, runs=runs)
        for values, runs in grouped(selection.done, results.settings)
        if (seeds := seed_means(runs, name))
    ]
    if not 2 <= len(settings) <= MOST_SETTINGS or better is None:
        return None
    settings.sort(key=lambda setting: -setting.mean if better else setting.mean)
    pairs = list(itertools.combinations(range(len(settings)), 2))
    estimates = [difference(settings[i].seeds, settings[j].seeds) for i, j in pairs]
    adjusted = holm([1.0 if each.p is None else each.p for each in estimates])
    others = [
        Comparison(
            other=settings[j], estimate=each, behind=each.value if better else -each.value,
            p=None if each.p is None else p,
            needed=seeds_needed(each, abs(each.value), len(pairs)),
        )
        for (i, j), each, p in zip(pairs, estimates, adjusted, strict=True)
        if i == 0
    ]  # fmt: skip
    return Comparisons(measure=name, best=settings[0], others=others, num_pairs=len(pairs))


def best_by(results: Results) -> str:
    """The measure that says which setting is best: of answers that were written, else of predictions; on the test split
    where that was measured, for on the validation split the learning rate was chosen."""
    name = f"valid_{results.quality}"
    if results.sweep.select and results.sweep.select.by in results.runs:
        name = results.sweep.select.by
    tested = [*(f"test_{metric}" for metric in METRICS), "test_" + name.removeprefix("valid_")]
    return next((each for each in tested if each in results.runs and results.runs[each].notna().any()), name)


def sentences(results: Results, found: Comparisons) -> list[str]:
    """What came out, for people."""
    unit = measure(found.measure).unit
    what = f"{measure_label(found.measure)} {_with_unit(plain(found.best.mean), unit)}"
    lines = [f"Best is {found.best.name}: {what} (mean over {_count(len(found.best.seeds), 'seed')})."]
    full = next((item for item in found.others if _is_full(results, item.other)), None)
    apart = unit.replace("%", "percentage points")
    lines += [_beside(found.others[0], "The next", apart)]
    if full and full is not found.others[0]:
        lines.append(_beside(full, "Full fine-tuning", apart))
    return [*lines, *_cost(results, found, full)]


def _beside(item: Comparison, who: str, unit: str) -> str:
    if item.behind == 0 and not item.estimate.error:
        return f"{who}, {item.other.name}, is level with it in each of {item.estimate.n} seeds."
    where = "behind" if item.behind >= 0 else "ahead in the seeds that both have"
    text = f"{who}, {item.other.name}, is {_with_unit(plain(abs(item.behind)), unit)} {where}"
    if item.estimate.low is None:
        return f"{text}: {NO_DIFFERENCE} (an interval takes two seeds of each)."
    if item.p is None:
        return f"{text} in each of {item.estimate.n} seeds: {NO_DIFFERENCE} (without a spread there is no interval)."
    sign = math.copysign(1, item.estimate.value)  # as far as was said, whichever way is better
    low, high = sorted(sign * (end or 0.0) for end in (item.estimate.low, item.estimate.high))
    decimals = places((high - low) / 2) if item.estimate.error else 4
    chance = f"p {'' if item.p < 0.001 else '= '}{_p(item.p)}"
    span = f"{CONFIDENCE:.0%} interval {number(low, decimals)} to {number(high, decimals)}, {chance}"
    if item.is_told:
        return f"{text} ({span}): more than chance."
    needed = f"; about {item.needed} seeds would tell such a difference" if item.needed else ""
    return f"{text} ({span}): {NO_DIFFERENCE}{needed}."


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _is_full(results: Results, setting: Setting) -> bool:
    return bool((setting.runs["method.name"] == "full").all())


def _cost(results: Results, found: Comparisons, full: Comparison | None) -> list[str]:
    """What the best costs beside full fine-tuning, or alone."""
    texts = []
    for name in COSTS:
        own = seed_means(found.best.runs, name)
        if not own or (name == "updates_bytes" and "storage_bytes" in results.runs):
            continue
        text = f"{measure_label(name)} {_with_unit(plain(fmean(own.values())), measure(name).unit)}"
        theirs = seed_means(full.other.runs, name) if full else {}
        if theirs and fmean(theirs.values()) > 0:
            text += f" ({100 * fmean(own.values()) / fmean(theirs.values()):.3g}% of full's)"
        texts.append(text)
    return [f"It costs: {', '.join(texts)}."] if texts else []


def _edges(results: Results, selection: Selection) -> Iterator[str]:
    """The settings whose best value lies at an end of those tried."""
    key = results.over[0] if results.over else ""
    ends: dict[str, list[str]] = {}
    keys = [name for name in selection.choices if name in results.sweep.axes and name not in results.over]
    labels = {repr(values): runs["label"].iloc[0] for values, runs in grouped(results.runs, keys) if "label" in runs}
    for row in selection.rows:
        if row["edge"]:
            setting = tuple(row[name] for name in keys)
            own = [name for name in results.settings if name in row]
            name = labels.get(repr(setting)) or series_label(own, [row[name] for name in own]) or "the runs"
            ends.setdefault(row["edge"], []).append(f"{name} ({value_label(row[key])})")
    for edge, names in ends.items():
        shown = list(dict.fromkeys(names))
        more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
        yield f"The best {key_label(key)} is the {edge} that was tried of {'; '.join(shown[:6])}{more}: try further."


def instabilities(results: Results) -> list[str]:
    """Which runs were trained unstably, in a sentence; none where none was."""
    ids, keys = unstable(results.runs), [*results.settings, *results.over]
    if not ids:
        return []
    settings = [series_label(keys, values) or "all runs" for values, _ in grouped(results.runs.loc[ids], keys)]
    more = f" and {len(settings) - 6} more" if len(settings) > 6 else ""
    num_shown = len({*ids} & {*results.selection.run_ids})
    shown = f"{num_shown} of them {'stand' if num_shown > 1 else 'stands'}" if num_shown else "none of them stands"
    return [
        f"Training was unstable in {len(ids)} of {_count(len(results.runs), 'run')} ({'; '.join(settings[:6])}{more}): "
        f"the loss climbed above that of its start, or ended above its lowest; {shown} behind the tables and figures "
        "below, where unstable runs are marked."
    ]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number > 1 else ''}"


def _with_unit(text: str, unit: str) -> str:
    return f"{text} {unit}" if unit else text


def comparisons_sheet(by_task: dict[str, Comparisons], name: str = "comparisons") -> Sheet:
    """A row a setting: its mean, and its difference from the best one of its task."""
    found = next(iter(by_task.values()))
    measures = {each.measure for each in by_task.values()}
    what, unit = (measure_label(found.measure), measure(found.measure).unit) if len(measures) == 1 else ("mean", "")
    several = len(by_task) > 1
    columns = [
        *([Column(label="task", numeric=False)] if several else []),
        *([Column(label="by", numeric=False)] if len(measures) > 1 else []),
        Column(label="setting", numeric=False), Column(label=what, unit=unit),
        Column(label="best less this", unit=unit.replace("%", "points")),
        Column(label="p (Holm)"), Column(label="seeds"),
        Column(label="more than chance", numeric=False), Column(label="seeds needed"),
    ]  # fmt: skip
    rows, tidy = [], []
    for task, each in by_task.items():
        by = with_unit(each.measure)
        heads = [*([task] if several else []), *([by] if len(measures) > 1 else [])]
        own = {"task": task, "measure": each.measure} if several else {}
        rows += [[*heads, *row] for row in _rows(each)]
        tidy += [own | row for row in _tidy(each)]
    pairs = " and ".join(dict.fromkeys(str(each.num_pairs) for each in by_task.values()))
    notes = [
        f"Student's t over seeds: of the pairs where two or more seeds are shared, else Welch's; intervals are of "
        f"{CONFIDENCE:.0%} each. p is corrected over all {pairs} pairs of settings{' of a task' if several else ''} "
        "(Holm), for the best was chosen among all. Seeds needed: for a difference as large as was seen, with its "
        "spread."
    ]
    caption = f"Each setting beside the best{' of its task' if several else ''}"
    caption += f", by {what}" if len(measures) == 1 else ""
    return Sheet(name=name, caption=caption, columns=columns, rows=rows, notes=notes, tidy=pd.DataFrame(tidy))


def _rows(found: Comparisons) -> list[list[str]]:
    rows = [[found.best.name, plain(found.best.mean), "–", "–", str(len(found.best.seeds)), "best", "–"]]
    for item in found.others:
        told = "yes" if item.is_told else NO_DIFFERENCE
        rows.append([
            item.other.name, plain(item.other.mean), _interval(item.estimate), "–" if item.p is None else _p(item.p),
            str(len(item.other.seeds)), told, str(item.needed) if item.needed and not item.is_told else "–",
        ])  # fmt: skip
    return rows


def _tidy(found: Comparisons) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"setting": found.best.name, "mean": found.best.mean, "n": len(found.best.seeds)}]
    for item in found.others:
        estimate = item.estimate
        rows.append({
            "setting": item.other.name, "mean": item.other.mean, "n": len(item.other.seeds),
            "difference": estimate.value, "low": estimate.low, "high": estimate.high, "paired": estimate.is_paired,
            "p": estimate.p, "p_holm": item.p, "num_seeds_needed": item.needed,
        })  # fmt: skip
    return rows


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None or not estimate.error:
        return plain(estimate.value)
    decimals = places((estimate.high - estimate.low) / 2)
    value, low, high = (number(each, decimals) for each in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
