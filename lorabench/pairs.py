"""Which runs of a sweep are compared: those that differ in exactly one axis."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lorabench.spec import flatten
from lorabench.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two runs and the one axis in which they differ; `value_a` < `value_b`."""

    run_a: str
    run_b: str
    axis: str
    value_a: Any
    value_b: Any


def find_pairs(
    sweep: Sweep, run_ids: Collection[str], axes: tuple[str, ...], selected: Collection[str] | None = None
) -> Iterator[Pair]:
    """Every pair among `run_ids` for each of `axes`; keys that are zipped with the axis move with it.

    With `selected`, only those runs are compared, and `select.over` is no difference between them: each setting
    stands with its own selected value. Runs are grouped by what they share, so the cost is that of the pairs.
    """
    chosen = {*run_ids} if selected is None else {*run_ids} & {*selected}
    flats = {spec.id: flatten(spec.to_json()) for spec in sweep.runs if spec.id in chosen}
    free = _together(sweep, sweep.select.over) if sweep.select and selected is not None else set()
    for axis in axes:
        moving = _together(sweep, axis) | free
        groups: dict[str, list[tuple[Any, str]]] = {}
        for run_id, flat in flats.items():
            if axis in flat:
                shared = {key: value for key, value in flat.items() if key not in moving}
                groups.setdefault(json.dumps(shared, sort_keys=True), []).append((flat[axis], run_id))
        for members in groups.values():
            members.sort(key=lambda member: (isinstance(member[0], str), member))
            for (value_a, run_a), (value_b, run_b) in itertools.combinations(members, 2):
                if value_a != value_b:
                    yield Pair(run_a=run_a, run_b=run_b, axis=axis, value_a=value_a, value_b=value_b)


def _together(sweep: Sweep, key: str) -> set[str]:
    return {key}.union(*(group for group in sweep.zips if key in group))
