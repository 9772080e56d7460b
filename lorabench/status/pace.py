"""What runs are doing, and how long they will take: each at its own pace, and beside its steps as those before it."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean
from typing import Any

from lorabench.cluster.run_states import Standing
from lorabench.spec.run_spec import canonical_json
from lorabench.store.claim import Claim
from lorabench.store.record import Status
from lorabench.terminal.text import duration, progress_text


@dataclass(frozen=True, kw_only=True)
class Usual:
    """Seconds that runs which are done have taken, by what is computed alike: as a whole, and beside their steps."""

    by_kind: dict[bytes, list[tuple[float, float]]]

    @classmethod
    def of(cls, standings: Sequence[Standing]) -> Usual:
        by_kind: dict[bytes, list[tuple[float, float]]] = {}
        if any(standing.status == Status.RUNNING for standing in standings):  # else nobody asks
            for standing in (standing for standing in standings if standing.status == Status.DONE):
                measures = standing.state.record.measures if standing.state.record else {}
                whole, train = measures.get("total_seconds", math.nan), measures.get("train_seconds", math.nan)
                if math.isfinite(whole):
                    times = whole, max(0.0, whole - train) if math.isfinite(train) else 0.0
                    by_kind.setdefault(_kind(standing.state.spec), []).append(times)
        return cls(by_kind=by_kind)

    def like(self, spec: dict[str, Any]) -> tuple[float, float] | None:
        """Means over the runs of its kind, else over all; None where none is done."""
        found = self.by_kind.get(_kind(spec)) or [each for kind in self.by_kind.values() for each in kind]
        return (fmean(whole for whole, _ in found), fmean(beside for _, beside in found)) if found else None


def _kind(spec: dict[str, Any]) -> bytes:
    same = {key: spec.get(key) for key in ("model", "quantization", "task", "tasks", "seq_len", "batch_size", "steps")}
    return canonical_json(same | {"method": spec.get("method", {}).get("name"), "serving": spec.get("serving")})


def seconds_left(standing: Standing, usual: Usual) -> float | None:
    """Of a run that goes on: steps at its pace so far, and evaluation, loading and serving as long as they take others.

    Where no other is done, evaluation is taken to last as long as that of the base did. None where nothing is known.
    """
    claim, record = standing.state.claim, standing.state.record
    if claim is None or standing.status != Status.RUNNING:
        return None
    pace, step, steps = (claim.progress.get(key) for key in ("step_seconds_median", "step", "steps"))
    pace = pace and pace * _together(claim)
    like = usual.like(standing.state.spec)
    elapsed = _seconds_since(record.started) if record else None
    if not pace or step is None or not steps:
        return max(0.0, like[0] - elapsed) if like and elapsed is not None else None
    left = float(pace * (steps - step))
    if like and elapsed is not None:
        spent = elapsed - pace * (step - ((record.resumed_from_step if record else None) or 0))
        return left + max(0.0, like[1] - max(0.0, spent))
    return left + claim.progress.get("evaluate_seconds", 0.0)


def _together(claim: Claim) -> int:
    """How many runs share the time of each: what one has measured as its own is that part of it."""
    return claim.progress.get("packed") or 1


def _seconds_since(text: str) -> float | None:
    """Since a time as records have it; None of anything else."""
    with contextlib.suppress(ValueError):
        return time.time() - datetime.fromisoformat(text).timestamp()
    return None


def all_seconds_left(standings: Sequence[Standing], usual: Usual) -> float | None:
    """Of all that runs and waits, if as many go on to run at a time; None where nothing runs, or none is done.

    What waits is in a cluster's queue, missing from the sweep that was asked for, or still to be begun by a launcher.
    """
    running = [standing for standing in standings if standing.status == Status.RUNNING]
    whole = usual.like({})
    if not running or whole is None:
        return None
    counts = Counter(standing.status for standing in standings)
    launched = [(s.state.claim, s.state.claim.progress) for s in running if s.state.claim and s.queue is None]
    waiting: dict[str, int] = {}
    for claim, progress in launched:  # the last that was begun knows best
        waiting[claim.host] = min(progress.get("waiting", 0), waiting.get(claim.host, 10**9))
    to_begin = counts[Status.PENDING] + max(counts[Status.MISSING], sum(waiting.values()))
    lefts = [seconds_left(standing, usual) for standing in running]
    own = sum(whole[0] / 2 if left is None else left for left in lefts)  # half way, on average
    together = fmean(_together(standing.state.claim) if standing.state.claim else 1 for standing in running)
    return (whole[0] * together * to_begin + own) / len(running)


def where_it_is(standing: Standing) -> str:
    """`step 20/200, training, loss 2.31, 1 min 15 s left`; empty of a run that nothing works on."""
    claim = standing.state.claim
    if claim is None or not claim.is_alive():
        return ""
    left = seconds_left(standing, Usual.of([]))
    parts = [f"step {claim.progress.get('step', 0)}/{claim.progress.get('steps', '?')}", progress_text(claim.progress)]
    return ", ".join([*parts, *([f"{duration(left)} left"] if left is not None else [])]).replace("  ", ", ")
