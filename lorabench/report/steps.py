"""The step logs of a sweep's runs as one long data frame."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lorabench.config.decode import InputError
from lorabench.store.steps import read_steps

FIRST = ("step", "loss", "grad_norm", "step_lr")
RENAMED = {"lr": "step_lr"}
"""Columns of a log that are called as a key of the spec is."""


@dataclass(frozen=True, kw_only=True)
class StepLog:
    """Where a run that has ended left the log of its steps."""

    file: Path
    digest: str | None
    """Its SHA-256, as far as the record tells it."""

    def read(self) -> list[dict[str, float]]:
        """Nothing of a log that is gone, or is not what it was when the run ended."""
        with contextlib.suppress(OSError, InputError):
            return read_steps(self.file, self.digest)
        return []


def steps_frame(runs: pd.DataFrame, keys: Sequence[str], logs: Mapping[str, StepLog]) -> pd.DataFrame:
    """A row a run and step: `run_id`, its run's `keys`, `step`, `loss`, `grad_norm`, `step_lr` and what else its log
    has, such as the metrics of a periodic evaluation; missing where a run or step has none."""
    read = [
        (place, rows) for place, run_id in enumerate(runs.index) if run_id in logs and (rows := logs[run_id].read())
    ]
    names = dict.fromkeys(name for _, rows in read for row in rows for name in row)
    places = np.repeat([place for place, _ in read], [len(rows) for _, rows in read]).astype(int)
    columns: dict[str, object] = {"run_id": pd.Categorical.from_codes(places, list(runs.index))}
    columns |= {key: _typed(runs[key], places) for key in keys}
    found = {
        RENAMED.get(name, name): np.array([row.get(name, np.nan) for _, rows in read for row in rows], float)
        for name in names
    }
    ordered = [*(name for name in FIRST if name in found), *(name for name in found if name not in FIRST)]
    frame = pd.DataFrame(columns | {name: found[name] for name in ordered})
    return frame.astype({"step": int}) if read else frame


def _typed(values: pd.Series, places: np.ndarray) -> object:
    """A key's value of each row: numbers where all are, else words."""
    numbers = values.infer_objects()
    if pd.api.types.is_numeric_dtype(numbers):
        return numbers.to_numpy()[places]
    words = values.map(str, na_action="ignore")
    return pd.Categorical(words, categories=list(dict.fromkeys(words.dropna()))).take(places)
