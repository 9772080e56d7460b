"""Means over seeds with their intervals, and the number of digits that these allow."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pandas as pd
from scipy import stats

from lorabench.report.labels import shown_factor
from lorabench.spec.generate import METRICS
from lorabench.store.record import FAILURES, Status

CONFIDENCE = 0.95
FEWEST = 3
"""Seeds whose interval is drawn: of two it is nine times as wide as they are apart."""
FREE = (-math.inf, math.inf)
BOUNDED = {
    r"(base_)?(valid|test)_((token_)?accuracy|accuracy_(norm|byte|token)|macro_f1|majority)": (0.0, 100.0),
    r"unstable": (0.0, 100.0),
    r"average_final": (0.0, 100.0),
    rf"(base_)?(valid|test)_({'|'.join(METRICS)})(_low|_high)?": (0.0, 100.0),
    r"(back|for)ward_transfer": (-100.0, 100.0),
    r"(base_)?(valid|test)_(matthews|pearson|spearman)": (-1.0, 1.0),
    r"survival\.\w+|dynamics\.phi\w*": (0.0, 1.0),
}
"""Measures that have a smallest and a largest value, as they are shown (in %: times 100)."""
LARGEST = 1e150
"""Whose square is a number still: of what has diverged further there is no interval."""
FAILED = (*FAILURES, Status.CORRUPT)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measure over the runs of one cell; percentages times 100.

    `half` is half the width of the interval: None for fewer than two seeds. `statuses` counts the runs that are not
    done; `num_runs` is all the runs, `n` those behind the mean, `num_seeds` their distinct seeds.
    """

    mean: float | None
    half: float | None
    n: int
    num_seeds: int
    num_runs: int
    statuses: dict[str, int] = field(default_factory=dict)
    num_unstable: int = 0
    """Runs that are done, and whose training was unstable."""
    null: float | None = None
    applicable: bool = True
    """False where no run behind the cell can have the measure: ΔW of a soft prompt."""
    within: tuple[float, float] = FREE
    """The smallest and the largest value that the measure can have."""

    @property
    def low(self) -> float | None:
        return None if self.half is None or self.mean is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None or self.mean is None else self.mean + self.half

    @property
    def center(self) -> float:
        """The mean of a cell that is known to have one."""
        assert self.mean is not None
        return self.mean

    @property
    def drawn_half(self) -> float | None:
        """As figures show it: None for fewer than FEWEST seeds, too."""
        return self.half if self.num_seeds >= FEWEST else None

    @property
    def is_useless(self) -> bool:
        """Whether the interval is wider to either side than all that the measure can be, and so says nothing."""
        return self.half is not None and self.half >= self.within[1] - self.within[0]

    @property
    def num_failed(self) -> int:
        return sum(count for status, count in self.statuses.items() if status in FAILED)

    @property
    def num_pending(self) -> int:
        return sum(self.statuses.values()) - self.num_failed

    @property
    def status_text(self) -> str:
        """`oom 2/3, unstable 1/3`; empty where each run is done, and none was unstable."""
        counts = sorted(self.statuses.items()) + [("unstable", self.num_unstable)] * bool(self.num_unstable)
        return ", ".join(f"{status} {count}/{self.num_runs}" for status, count in counts)


def cell(runs: pd.DataFrame, name: str) -> Cell:
    """The mean of a measure over `runs` that are done, and its Student-t interval over seeds.

    Runs of one seed (of several settings) are averaged first, so that the interval is one over seeds.
    """
    factor = shown_factor(name)
    values = by_seed(runs, name)
    nulls = by_seed(runs, f"{name}:null")
    means = {seed: math.fsum(items) / len(items) for seed, items in values.items()}
    mean, half = interval(factor * value for value in means.values()) if means else (None, None)
    return Cell(
        mean=mean,
        half=half,
        n=sum(map(len, values.values())),
        num_seeds=len(values),
        num_runs=len(runs),
        statuses=dict(Counter(str(status) for status in runs["status"] if status != Status.DONE)),
        num_unstable=len(unstable(runs)),
        applicable=_is_applicable(runs, name),
        within=bounds(name),
        null=interval(math.fsum(items) / len(items) for items in nulls.values())[0] if nulls else None,
    )


def unstable(runs: pd.DataFrame) -> list[str]:
    """The runs whose training was unstable, of those that are done."""
    if "unstable" not in runs:
        return []
    return list(runs.index[(runs["unstable"] == 1) & (runs["status"] == Status.DONE)])


def bounds(name: str) -> tuple[float, float]:
    """The smallest and the largest value that a measure can have, as it is shown; infinite where there is none."""
    low, high = next((ends for pattern, ends in BOUNDED.items() if re.fullmatch(pattern, name)), FREE)
    return low, high


def drawn_interval(values: Iterable[float], within: tuple[float, float] = FREE) -> tuple[float, float]:
    """The ends of the interval over seeds as figures draw it, inside the measure's bounds; NaN for fewer than FEWEST.

    What `interval` says, in the form that seaborn's `errorbar` takes.
    """
    values = list(values)
    mean, half = interval(values) if values else (math.nan, None)
    if half is None or len(values) < FEWEST:
        return math.nan, math.nan
    return min(mean, max(mean - half, within[0])), max(mean, min(mean + half, within[1]))


def _is_applicable(runs: pd.DataFrame, name: str) -> bool:
    column = "update:na" if "." in name else "merge_error:na" if "_merged_" in name else f"{name}:na"
    if column not in runs:
        return True
    marks = [mark for mark, status in zip(runs[column], runs["status"], strict=True) if status == Status.DONE]
    return not marks or not all(mark is True for mark in marks)


def by_seed(runs: pd.DataFrame, name: str) -> dict[int, list[float]]:
    """The values of the runs that are done and have one, by seed; as the record has them."""
    found: dict[int, list[float]] = {}
    if name in runs:
        for seed, status, value in zip(runs["seed"], runs["status"], runs[name], strict=True):
            if status == Status.DONE and not math.isnan(value):
                found.setdefault(seed, []).append(float(value))
    return found


def seed_means(runs: pd.DataFrame, name: str) -> dict[int, float]:
    """A measure of the runs that are done, as it is shown: each seed's mean, without what is beyond LARGEST."""
    factor = shown_factor(name)
    means = {seed: factor * sum(v / len(values) for v in values) for seed, values in by_seed(runs, name).items()}
    return {seed: value for seed, value in means.items() if abs(value) < LARGEST}


def interval(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and half width of the two-sided 95% Student-t interval; no interval for one value or an infinite one."""
    values = sorted(values)  # a sum of floats depends on its order
    if values[-1] < math.inf and max(-values[0], values[-1]) > LARGEST:
        return math.fsum(value / len(values) for value in values), None
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None
    if values[-1] - values[0] <= 1e-12 * abs(mean):  # equal, but for how their sum was rounded
        return mean, 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return mean, t * math.sqrt(variance / len(values))


def places(half: float) -> int:
    """Decimals that an uncertainty allows: two of its digits up to 35, one above (Particle Data Group, 5.3)."""
    exponent = math.floor(math.log10(half))
    leading = round(half / 10.0 ** (exponent - 1))
    return 1 - exponent if leading <= 35 else -exponent


def common_places(cells: Iterable[Cell]) -> int | None:
    """The median of the decimals that the cells of one measure allow, so that a column reads as one."""
    allowed = sorted(places(c.half) for c in cells if c.half and not c.is_useless)
    return allowed[len(allowed) // 2] if allowed else None


def value_text(item: Cell, common: int | None = None) -> str:
    """`2.31 ± 0.02`: the interval decides the digits; four digits where there is none.

    An interval that tells nothing is called that: `50 (n = 2: no useful interval)`.
    """
    if item.mean is None:
        return ""
    if item.is_useless:
        return f"{plain(item.mean)} (n = {item.num_seeds}: no useful interval)"
    if item.half:
        decimals = _clamp(common, item.half)
        return f"{number(item.mean, decimals)} ± {number(item.half, decimals)}"
    if common is None or not math.isfinite(item.mean) or (item.mean >= 1000 and item.mean == round(item.mean)):
        return plain(item.mean)
    return number(item.mean, common)


def plain(value: float) -> str:
    """Four significant digits; whole numbers in full."""
    if not math.isfinite(value):
        return "inf" if value > 0 else "−inf" if value < 0 else "nan"
    if value == round(value) and abs(value) < 1e12:
        return number(value, 0)
    if not 1e-4 <= abs(value) < 1e9:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return number(value, max(0, 3 - math.floor(math.log10(abs(value)))))


def number(value: float, decimals: int) -> str:
    """With `decimals` (negative: tens, hundreds), thousands grouped, a true minus sign, and never `−0`."""
    rounded = round(value, decimals) + 0.0
    return f"{rounded:,.{max(0, decimals)}f}".replace("-", "−")


def _clamp(common: int | None, half: float) -> int:
    """Near the column's decimals, but with at least one digit of this interval and not many more than it allows."""
    own = places(half)
    if common is None:
        return own
    one_digit = -math.floor(math.log10(half))
    return min(max(common, one_digit), own + 1)
