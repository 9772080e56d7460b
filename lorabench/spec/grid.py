"""The grid of a sweep file: every cell of its axes, once, as a run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from lorabench.config.decode import InputError, decode, show
from lorabench.config.quote import clip
from lorabench.data.dataset import builtin_data
from lorabench.models.base_model import builtin_models
from lorabench.spec.known import known_keys, unknown_keys
from lorabench.spec.run_spec import UNNAMED, RunSpec, flatten, is_tables, unflatten

LISTS = (".generate.metrics", ".pictures.prompts", ".pictures.unrelated")
"""How keys end whose value is a list."""


def expand(
    table: dict[str, Any], problems: list[str], stored: bool
) -> tuple[list[RunSpec], list[tuple[str, ...]], dict[str, str], dict[str, tuple[str, ...]]]:
    """All runs of all grid blocks, each once, the groups of keys that move together, the runs' labels and own keys."""
    base = table.get("base", {})
    for key in ("zip", "exclude", "label"):
        if isinstance(base, dict) and key in base:
            problems.append(f"base.{key}: belongs into a [[grid]] block")
            base = {name: value for name, value in base.items() if name != key}
    if not isinstance(base, dict):
        problems.append("base: must be a table, [base]")
        return [], [], {}, {}
    labels: dict[str, str] = {}
    given: dict[str, tuple[str, ...]] = {}
    specs: dict[str, RunSpec] = {}
    zips: dict[tuple[str, ...], None] = {}
    keys: dict[str, None] = {}
    rules = [("", rule) for rule in _excludes(table.get("exclude", []), "", problems)]
    grids = blocks(table, "grid", problems) or [{}]
    for number, block in enumerate(grids, 1):
        where = f"grid {number}: " if len(grids) > 1 else ""
        block = dict(block)
        groups = _zip_groups(block.pop("zip", []), where, problems)
        own = _excludes(block.pop("exclude", []), where, problems)
        label = block.pop("label", None)
        excluded = [*own, *(rule for origin, rule in rules if not origin)]
        rules += [(where or "grid: ", rule) for rule in own]
        zips |= dict.fromkeys(groups)
        for cell in _cells(flatten(_merge(base, block)), groups, where, problems):
            keys |= dict.fromkeys(cell)
            if any(_matches(cell, rule) for rule in excluded):
                continue
            problems += [] if stored else [f"{where}{problem}" for problem in _unnamed(cell)]
            spec = collect(problems, lambda cell=cell, where=where: decode(RunSpec, unflatten(cell), where))
            if spec:
                specs.setdefault(spec.id, spec)
                given.setdefault(spec.id, tuple(cell))
                if label is not None:
                    labels.setdefault(spec.id, _label(label, spec, where, problems))
    known = [*keys, *known_keys(list(specs.values()))]
    for where, rule in rules if specs else ():  # a misspelt key would exclude nothing, silently
        problems += unknown_keys(list(rule), list(dict.fromkeys(known)), f"{where}exclude")
    if not specs and not problems:
        problems.append("exclude: leaves no run")
    if labels and len(labels) < len(specs):
        problems.append("label: is missing in some [[grid]] blocks: give one to each, or to none")
    return list(specs.values()), list(zips), labels, given


def _unnamed(cell: dict[str, Any]) -> Iterator[str]:
    """A problem for the model, and for the data of each task, that a cell does not name: nothing is trained unasked."""
    if "model" not in cell:
        yield f"model: is missing: {_any_of('a Hub id', 'a local folder', *builtin_models())}"
    wanted = _any_of("a file", "a folder", "a Hub data set", *builtin_data())
    if any(key.startswith("task.") for key in cell) and "task.data" not in cell:
        yield f"task.data: is missing: {wanted}"
    tasks = cell.get("tasks", [])
    for number, task in enumerate(tasks if is_tables(tasks) else [], 1):
        if "data" not in task:
            yield f"tasks {number}: task.data: is missing: {wanted}"


def _any_of(*choices: str) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _label(template: Any, spec: RunSpec, where: str, problems: list[str]) -> str:
    """`"LoRA, rank {method.rank}"` with the run's own values."""
    flat = UNNAMED | spec.flat
    if not isinstance(template, str) or not template:
        problems.append(f"{where}label = {show(template)}: must be a text")
        return ""
    problems += unknown_keys(re.findall(r"{([^{}]*)}", template), list(flat), f"{where}label")
    return re.sub(r"{([^{}]*)}", lambda match: str(flat.get(match[1])), template)


def pooled(labels: dict[str, str], runs: list[RunSpec], free: set[str]) -> list[str]:
    """A problem for each label that stands for settings that differ in more than the `free` keys."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run.id in labels:
            found.setdefault(labels[run.id], []).append(run.flat)
    problems = []
    for label, flats in found.items():
        keys = [key for key in dict.fromkeys(key for flat in flats for key in flat) if key not in free]
        differing = [key for key in keys if len({repr(flat.get(key)) for flat in flats}) > 1]
        if differing:
            problems.append(f"label = {show(label)}: is given to runs that differ in {clip(', '.join(differing))}")
    return problems


def _merge(base: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """`block` over `base`. A block that names another method or task drops the base's fields of the first."""
    replaced = {"task": "tasks", "tasks": "task"}
    merged = {key: value for key, value in base.items() if key in block or replaced.get(key) not in block}
    for key, value in block.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            renamed = "name" in value and "name" in below and value["name"] != below["name"]
            merged[key] = value if renamed else below | value
        else:
            merged[key] = value
    return merged


def _cells(
    flat: dict[str, Any], groups: list[tuple[str, ...]], where: str, problems: list[str]
) -> Iterator[dict[str, Any]]:
    """Every cell of the grid: lists are axes (of tables, and the values of LISTS: one), the keys of a zip group move
    together."""
    axes: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
    for key, value in flat.items():
        if isinstance(value, list) and not value and not key.endswith(LISTS):
            problems.append(f"{where}{key} = []: an axis needs at least one value")
            return
    often = {key for key in flat if sum(key in group for group in groups) > 1}
    if often:
        problems.append(f"{where}zip: {clip(', '.join(sorted(often)))}: a key can move with one group only")
        return
    for group in groups:
        lists: list[Any] = [flat.get(key) for key in group]
        if not all(_is_axis(item) for item in lists):
            problems.append(f"{where}zip = {show(list(group))}: each of these keys must be a list in this grid")
            return
        if len({len(item) for item in lists}) > 1:
            lengths = ", ".join(f"{key} has {len(flat[key])}" for key in group)
            problems.append(f"{where}zip = {show(list(group))}: the lists must be of one length, but {lengths}")
            return
        axes[group] = list(zip(*lists, strict=True))
    zipped = {key for group in groups for key in group}
    for key, value in flat.items():
        if _is_axis(value) and key not in zipped and not key.endswith(LISTS):
            axes[(key,)] = [(item,) for item in value]
    for choice in itertools.product(*axes.values()):
        cell = dict(flat)
        for keys, values in zip(axes, choice, strict=True):
            cell |= dict(zip(keys, values, strict=True))
        yield cell


def _is_axis(value: Any) -> bool:
    return isinstance(value, list) and not is_tables(value)


def _zip_groups(value: Any, where: str, problems: list[str]) -> list[tuple[str, ...]]:
    """`zip = ["a", "b"]`, or several groups: `zip = [["a", "b"], ["c", "d"]]`."""
    flat = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    groups = [value] if flat else value
    ok = isinstance(groups, list) and all(
        isinstance(group, list) and len(group) > 1 and all(isinstance(key, str) for key in group) for group in groups
    )
    if not ok:
        problems.append(f"{where}zip = {show(value)}: must be a list of keys, or a list of such lists")
        return []
    return [tuple(group) for group in groups]


def _excludes(value: Any, where: str, problems: list[str]) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(rule, dict) and rule for rule in value):
        return [flatten(rule) for rule in value]
    problems.append(f"{where}exclude = {show(value)}: must be a list of tables with the keys of the cells to drop")
    return []


def _matches(cell: dict[str, Any], rule: dict[str, Any]) -> bool:
    """Whether a cell has every value of a rule; a list in a rule means any of its values."""
    return all(key in cell and cell[key] in (value if _is_axis(value) else [value]) for key, value in rule.items())


def collect(problems: list[str], make: Any) -> Any:
    try:
        return make()
    except InputError as error:
        problems += error.problems
        return None


def blocks(table: dict[str, Any], key: str, problems: list[str]) -> list[dict[str, Any]]:
    blocks = table.get(key, [])
    if isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks):
        return blocks
    problems.append(f"{key}: must be written [[{key}]], a list of tables")
    return []
