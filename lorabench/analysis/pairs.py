"""Which runs of a sweep are compared: those that differ in exactly one axis, and of very many a sample."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lorabench.spec.run_spec import brief, task_names
from lorabench.spec.sweep import Sweep

PAIR_AXES = ("method.rank", "seed", "lr", "quantization", "task", "method")
"""A key, or a table of the spec (`task`, `method`) of which any key may differ."""
MAX_PAIRS = 64
"""Of each axis, setting and two values (between seeds: of each setting): beyond, a mean gains nothing."""
MAX_MEMBERS = 128
"""Runs that are paired with one another: beyond, those of the smallest hash."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two runs and the one axis in which they differ; `value_a` comes before `value_b`.

    Values are the key's own, or a text for a table: the label of the run's setting, or the method's or task's name.
    `order` counts the pairs of an axis from 0: first one of each setting and two values, then the second, ...
    """

    run_a: str
    run_b: str
    axis: str
    value_a: Any
    value_b: Any
    order: int = 0


def find_pairs(
    sweep: Sweep, run_ids: Collection[str], axes: tuple[str, ...], selected: Collection[str] | None = None
) -> Iterator[Pair]:
    """The pairs among `run_ids` for each of `axes`; keys that are zipped with the axis move with it.

    With `selected`, only those runs are compared, and `select.over` is no difference between them (and no axis): each
    setting stands with its own selected value. Methods are compared at one rank, where both have one; and, where no
    setting has two learning rates, each at its own: one rate does not suit all of them.

    Of more than MAX_PAIRS pairs that say the same (one axis, one setting, two values; all but the seed alike) those
    with the smallest hash of their run ids are taken: a sample that depends on nothing else, and that another run
    changes little. Runs are grouped by what they share, so the cost is that of the pairs.
    """
    chosen = {*run_ids} if selected is None else {*run_ids} & {*selected}
    flats = {spec.id: spec.flat for spec in sweep.runs if spec.id in chosen}
    free = _together(sweep, sweep.select.over) if sweep.select and selected is not None else set()
    seen: set[tuple[str, str]] = set()
    for axis in axes:
        if axis not in free:
            moving = _together(sweep, axis) | free | (_own_rate(flats) if axis == "method" else set())
            found = _sample(_alike(flats, axis, moving, _differ(sweep, axis, flats)))
            yield from (pair for pair in found if (pair.run_a, pair.run_b) not in seen)
            seen |= {(pair.run_a, pair.run_b) for pair in found}


def _own_rate(flats: dict[str, dict[str, Any]]) -> set[str]:
    """`lr`, where each setting was run at one learning rate only; so that it says nothing beside the method."""
    rates: dict[str, set[float]] = {}
    for flat in flats.values():
        setting = json.dumps({key: flat[key] for key in flat if key not in ("lr", "seed")}, sort_keys=True)
        rates.setdefault(setting, set()).add(flat["lr"])
    return {"lr"} if all(len(values) == 1 for values in rates.values()) else set()


Differ = Callable[[str, str], tuple[Any, Any] | None]


def _alike(flats: dict[str, dict[str, Any]], axis: str, moving: set[str], differ: Differ) -> list[list[Pair]]:
    """Every pair along an axis; those in one list differ in nothing but their seeds."""
    groups: dict[str, list[tuple[Any, str]]] = {}
    for run_id, flat in flats.items():
        own = {key: value for key, value in flat.items() if key == axis or key.startswith(f"{axis}.")}
        if own or (axis == "task" and "tasks" in flat):
            shared = {key: flat[key] for key in flat if key not in moving and key not in own}
            if axis == "task":
                shared.pop("tasks", None)
            place = flat[axis] if axis in own else json.dumps([own.get(f"{axis}.name"), own], sort_keys=True)
            groups.setdefault(json.dumps(shared, sort_keys=True), []).append((place, run_id))
    found: dict[tuple[str, ...], list[Pair]] = {}
    for shared_text, members in groups.items():
        setting = json.dumps({key: value for key, value in json.loads(shared_text).items() if key != "seed"})
        members = sorted(members, key=lambda member: _hash(member[1]))[:MAX_MEMBERS]
        members.sort(key=lambda member: (isinstance(member[0], str), member))
        for (place_a, run_a), (place_b, run_b) in itertools.combinations(members, 2):
            values = differ(run_a, run_b)
            if values is not None:
                cell = (setting,) if axis == "seed" else (setting, repr(place_a), repr(place_b))
                pair = Pair(run_a=run_a, run_b=run_b, axis=axis, value_a=values[0], value_b=values[1])
                found.setdefault(cell, []).append(pair)
    return list(found.values())


def _sample(cells: list[list[Pair]]) -> list[Pair]:
    """At most MAX_PAIRS of each list, in the order in which they stand there, with their `order` over all lists."""
    passes: dict[tuple[str, str], int] = {}
    for cell in cells:
        kept = sorted(cell, key=lambda pair: _hash(pair.run_a, pair.run_b))[:MAX_PAIRS]
        passes |= {(pair.run_a, pair.run_b): number for number, pair in enumerate(kept)}
    ranked = sorted(passes, key=lambda runs: (passes[runs], _hash(*runs)))
    orders = {runs: order for order, runs in enumerate(ranked)}
    return [
        replace(pair, order=orders[pair.run_a, pair.run_b])
        for cell in cells
        for pair in cell
        if (pair.run_a, pair.run_b) in orders
    ]


def _differ(sweep: Sweep, axis: str, flats: dict[str, dict[str, Any]]) -> Differ:
    """The function that says what two runs are called on an axis; None where it is not what tells them apart."""

    def by_key(a: str, b: str) -> tuple[Any, Any] | None:
        first, second = flats[a][axis], flats[b][axis]
        return (first, second) if first != second else None

    def by_method(a: str, b: str) -> tuple[str, str] | None:
        first, second = (_below(flats[run], axis) for run in (a, b))
        ranks = {table["rank"] for table in (first, second) if "rank" in table}
        differing = [key for key in first if first[key] != second.get(key)]
        if len(ranks) > 1 or first == second:
            return None
        if sweep.labels and sweep.labels[a] != sweep.labels[b]:
            return sweep.labels[a], sweep.labels[b]
        if first["name"] != second["name"]:
            return first["name"], second["name"]
        texts = [", ".join(f"{key} {table.get(key)}" for key in differing) for table in (first, second)]
        return f"{first['name']} ({texts[0]})", f"{second['name']} ({texts[1]})"

    def by_task(a: str, b: str) -> tuple[str, str] | None:
        lists = [flats[run].get("tasks") or [_below(flats[run], axis)] for run in (a, b)]
        if lists[0] == lists[1]:
            return None
        if all(len(tables) == 1 for tables in lists):
            first, second = task_names([tables[0] for tables in lists])
            return first, second
        return brief(lists[0]), brief(lists[1])

    return {"method": by_method, "task": by_task}.get(axis, by_key)


def _below(flat: dict[str, Any], table: str) -> dict[str, Any]:
    return {key.removeprefix(f"{table}."): value for key, value in flat.items() if key.startswith(f"{table}.")}


def _hash(*run_ids: str) -> bytes:
    return hashlib.blake2b("--".join(run_ids).encode(), digest_size=8).digest()


def _together(sweep: Sweep, key: str) -> set[str]:
    """A key and those that are zipped with it; of a table, with any of its keys."""
    groups = (group for group in sweep.zips if any(k == key or k.startswith(f"{key}.") for k in group))
    return {key}.union(*groups)
