"""Whether training was unstable, told from the log of its steps.

Series are smoothed by their mean over a tenth of the steps, so that what counts has lasted so long. Training was
unstable where the smoothed loss

- climbed above that of the model at its start, which is taken for the mark of divergence in Wortsman et al. 2023, arXiv
  2309.14322, section 3 (the larger of its validation loss and of the first tenth, where batches happen to be hard); or
- ended above its own running minimum: a spike that did not recover (Chowdhery et al. 2022, arXiv 2204.02311, section
  5.1), which the model may have been better than at its start meanwhile,

by more than SHARE of the loss at its start, and by more than the noise: START_ERRORS and END_ERRORS standard errors of
the difference of two such means, of which the second has to allow for the choice of the minimum. The noise of a step is
told from the differences of successive ones, which no trend is in (von Neumann 1941). Of a share that is to rise, the
reward, the same holds upside down, SHARE being one of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lorabench.spec.run_spec import RunSpec
    from lorabench.store.record import RunRecord

WINDOWS = 10
"""The smoothed series is of means over the steps' number divided by this."""
FEWEST = 2 * WINDOWS
"""Steps of which it can be told."""
SHARE = 0.05
START_ERRORS, END_ERRORS = 2.0, 4.0


def instability(
    spec: RunSpec, rows: Sequence[Mapping[str, float]], starts: Sequence[float | None]
) -> tuple[dict[str, float], dict[str, str]]:
    """The measure `unstable` of a run and what it is about, in words; nothing where its steps do not tell.

    `rows` are those of its log, `starts` each task's validation loss before it was trained. Each task is looked at by
    itself: a jump where one begins tells nothing.
    """
    column, is_loss = spec.objective.watched
    series = [row[column] for row in rows if column in row]
    if spec.steps < FEWEST or len(series) < spec.total_steps:
        return {}, {}
    found = []
    for stage, start in enumerate(starts):
        values = series[stage * spec.steps : (stage + 1) * spec.steps]
        text = setback(values, start) if is_loss else setback([-value for value in values], scale=1.0)
        where = f" of task {stage + 1}" if len(starts) > 1 else ""
        found += [f"{column}{where} {text}"] if text else []
    return {"unstable": float(bool(found))}, {"unstable": "; ".join(found)} if found else {}


def from_record(
    spec: RunSpec, record: RunRecord, rows: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, str]]:
    """The same of a run that was recorded before this was measured."""
    losses = record.sequence.get("matrices", {}).get("loss", [])
    before = [losses[i][i] for i in range(len(losses) - 1)] or [record.measures.get("base_valid_loss")]
    return instability(spec, rows, before)


def setback(values: Sequence[float], start: float | None = None, scale: float | None = None) -> str:
    """How a series (n,) that is to fall has risen above its start or its end above its minimum; empty if it has not.

    `start` is its mean before the first step, where that was measured; `scale` what SHARE is taken of, else that.
    """
    series = np.asarray(values, float)
    width = math.ceil(len(series) / WINDOWS)
    means = np.convolve(series, np.full(width, 1 / width), "valid")
    noise = math.sqrt(np.mean(np.diff(series) ** 2) / 2)
    error = noise * math.sqrt(2 / width)
    first = max(means[0], means[0] if start is None else start)
    amount = SHARE * (abs(first) if scale is None else scale)
    highest, lowest = int(means.argmax()), int(means.argmin())
    errors = END_ERRORS if start is None else START_ERRORS
    if (above := means[highest] - first) > max(amount, errors * error):
        return f"{above:.2g} worse than at its start at step {highest + width} (mean over {width})"
    if (above := means[-1] - means[lowest]) > max(amount, END_ERRORS * error):
        return f"{above:.2g} worse at its end than at step {lowest + width} (means over {width})"
    return ""
