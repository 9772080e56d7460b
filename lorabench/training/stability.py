"""Whether training was unstable, told from the log of its steps.

Series are smoothed by their mean over a tenth of the steps, so that what counts has lasted so long. Training was
unstable where the smoothed loss

- climbed above that of the model at its start, where Wortsman et al. 2023, arXiv 2309.14322, section 2.2, cut off the
  losses of what diverges (here the larger of its validation loss and of the first tenth of the steps'); or
- ended above its own minimum: a spike that it did not recover from (Chowdhery et al. 2022, arXiv 2204.02311, section
  5.1), though it may be better than at its start still,

by more than SHARE of the loss at its start, and by more than the noise: CLIMB_ERRORS or END_ERRORS standard errors of
the difference of two such means. The noise of a step is told from how far successive ones are apart, which no trend is
in (von Neumann 1941); it is mostly that some batches are harder. Seeds have other batches each, so those of one setting
are also looked at together: a climb that each of them makes need not be told from noise in any one of them. Of a share
that is to rise, the reward, the same holds upside down, SHARE being one of 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorabench.spec.run_spec import canonical_json
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import RunState

if TYPE_CHECKING:
    from lorabench.spec.run_spec import RunSpec

WINDOWS = 10
"""The smoothed series is of means over the steps' number divided by this."""
FEWEST = 2 * WINDOWS
"""Steps of which it can be told."""
SHARE = 0.05
CLIMB_ERRORS, END_ERRORS = 3.5, 4.5
"""Of runs without a trend one in a thousand goes as far; the latter has to allow for the choice of the minimum."""
TINY = sys.float_info.min


@dataclass(frozen=True, kw_only=True)
class Course:
    """How far a smoothed series that is to fall went up: as a share, in standard errors, and after which step."""

    climb: float
    climb_errors: float
    climb_step: int
    rise: float
    """At its end, above its minimum."""
    rise_errors: float
    low_step: int

    @property
    def text(self) -> str:
        """What of it was unstable; empty where nothing was."""
        if self.climb > SHARE and self.climb_errors > CLIMB_ERRORS:
            return f"{self.climb:.0%} worse than at its start at step {self.climb_step}"
        if self.rise > SHARE and self.rise_errors > END_ERRORS:
            return f"{self.rise:.0%} worse at its end than at step {self.low_step}"
        return ""


def course(values: Sequence[float], start: float | None = None, scale: float | None = None) -> Course:
    """Of a series (n,), n ≥ 2. `start` is its mean before the first step, where that was measured; `scale` what shares
    are taken of, else what it was at its start."""
    import numpy as np

    series = np.asarray(values, float)
    width = math.ceil(len(series) / WINDOWS)
    means = np.convolve(series, np.full(width, 1 / width), "valid")
    noise = math.sqrt(math.pi) / 2 * float(np.abs(np.diff(series)).mean())
    error = max(noise * math.sqrt(2 / width), TINY)
    first = max(float(means[0]), -math.inf if start is None else start)
    whole = max(abs(first) if scale is None else scale, TINY)
    highest, lowest = int(means.argmax()), int(means.argmin())
    climb, rise = float(means[highest]) - first, float(means[-1] - means[lowest])
    return Course(
        climb=climb / whole, climb_errors=climb / error, climb_step=highest + width,
        rise=rise / whole, rise_errors=rise / error, low_step=lowest + width,
    )  # fmt: skip


def instability(
    spec: RunSpec, rows: Sequence[Mapping[str, float]], starts: Sequence[float | None]
) -> tuple[dict[str, float], dict[str, str]]:
    """The measures of a run's stability and what was unstable, in words; nothing where its steps do not tell.

    `rows` are those of its log, `starts` each task's validation loss before it was trained. Each task is looked at by
    itself: a jump where one begins tells nothing.
    """
    column, is_loss = spec.objective.watched
    series = [row[column] for row in rows if column in row]
    if spec.steps < FEWEST or len(series) < spec.total_steps or not all(map(math.isfinite, series)):
        return {}, {}
    starts = [*starts, *[None] * len(spec.stages)][: len(spec.stages)]
    parts = [series[stage * spec.steps : (stage + 1) * spec.steps] for stage in range(len(starts))]
    courses = [
        course(part, start) if is_loss else course([-value for value in part], scale=1.0)
        for part, start in zip(parts, starts, strict=True)
    ]
    where = [f" of task {stage}" if len(starts) > 1 else "" for stage in range(1, len(starts) + 1)]
    text = "; ".join(f"{column}{w} {each.text}" for w, each in zip(where, courses, strict=True) if each.text)
    worst = max(courses, key=lambda each: each.climb_errors)
    measures = {"train_climb": worst.climb, "train_climb_errors": worst.climb_errors, "unstable": float(bool(text))}
    return measures, {"unstable": text} if text else {}


def from_record(
    spec: RunSpec, record: RunRecord, rows: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, str]]:
    """The same of a run that was recorded before this was measured."""
    losses = record.sequence.get("matrices", {}).get("loss", [])
    before = [row[i] for i, row in enumerate(losses[:-1]) if i < len(row)]
    before = before or [record.measures.get("base_valid_loss")]
    return instability(spec, rows, before)


def judged(states: Sequence[RunState]) -> list[RunState]:
    """With `unstable` also in the records of those that are so together with the other seeds of their setting.

    Standard errors of k seeds make those of their sum, divided by √k (Stouffer's method).
    """
    done = [state.record for state in states if state.record and state.status == Status.DONE]
    measured = [record for record in done if {"train_climb", "train_climb_errors"} <= record.measures.keys()]
    settings: dict[bytes, list[RunRecord]] = {}
    for record in measured if any(map(_may_be, measured)) else ():
        settings.setdefault(canonical_json({**record.spec, "seed": None}), []).append(record)
    found = {}
    for group in settings.values():
        errors = sum(record.measures["train_climb_errors"] for record in group) / math.sqrt(len(group))
        for record in filter(_may_be, group if errors > CLIMB_ERRORS and len(group) > 1 else ()):
            found[record.run_id] = f"{record.measures['train_climb']:.0%} worse than at its start, as in other seeds"
    return [
        with_more(state, {"unstable": 1.0}, {"unstable": found[state.run_id]}) if state.run_id in found else state
        for state in states
    ]


def _may_be(record: RunRecord) -> bool:
    return not record.measures.get("unstable") and record.measures["train_climb"] > SHARE


def with_more(state: RunState, measures: dict[str, float], provenance: dict[str, str]) -> RunState:
    """A state with more in its record."""
    record = state.record
    assert record is not None
    record = replace(record, measures=record.measures | measures, provenance=record.provenance | provenance)
    return replace(state, record=record)
