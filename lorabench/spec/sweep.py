"""Sweep files: TOML -> the runs of a grid and what to draw from them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from lorabench.config import plugins
from lorabench.config.decode import InputError, Pattern, decode, decode_plugin, parse_toml, read_toml, show
from lorabench.config.quote import clip, show_path
from lorabench.data.dataset import builtin_data
from lorabench.models.base_model import builtin_models
from lorabench.spec.analysis import COLUMNS, LAYERS, PAIRS
from lorabench.spec.claim import CHOSEN, NULL, Claim, matches
from lorabench.spec.figure import Figure
from lorabench.spec.generate import ENDS, METRICS
from lorabench.spec.measures import MEASURES, OWN, Measure, find, is_shared_in_a_pack, of_sets
from lorabench.spec.move import Move
from lorabench.spec.paper import Paper, read_paper
from lorabench.spec.run_spec import UNNAMED, RunSpec, canonical_json, flatten, is_tables, unflatten

SECTIONS = ["name", "base", "grid", "exclude", "select", "table", "figure", "claim", "transfer", "paper"]

LIST = ".generate.metrics"
"""How a key ends whose value is a list."""
RESERVED = ("runs", "pairs", "queue", ".", "..")
"""Folders of results/ that are no sweep's."""

TEST = "test_"
"""What the measures of the test split begin with."""

FILE_NAME = Pattern(r"[\w+-][\w .,+-]{0,99}", "a file name: letters, digits, and any of _-+., and spaces")


@dataclass(frozen=True, kw_only=True)
class Select:
    """Every table and figure compares runs at their own best value of `over`."""

    over: str = "lr"
    """The key that is chosen, for each method and setting by itself."""
    by: str = "valid_loss"
    """The measure that decides, averaged over seeds; smaller is better unless the measure says otherwise. None of the
    test split's: what is chosen on it would be reported of it."""
    cost: Literal["alone", "shared"] | None = None
    """Whether one seed of each setting is computed by itself, for what it costs, where the others are packed (None:
    where a table, a figure or a claim of the sweep shows that)."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the mean and 95% interval over seeds of `value`, by `rows` and, if given, `columns`."""

    rows: list[str]
    value: str | list[str]
    columns: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    """The runs that it shows, named by keys of the sweep as in a claim (empty: all)."""
    name: Annotated[str, FILE_NAME] | None = None
    """File name of the table (None: made of value and columns)."""
    caption: str | None = None

    def __post_init__(self) -> None:
        problems = [f"{key} = []: needs at least one" for key in ("rows", "value") if not getattr(self, key)]
        if self.columns in self.rows:
            problems.append(f"columns = {show(self.columns)}: is among rows already")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def values(self) -> list[str]:
        return [self.value] if isinstance(self.value, str) else self.value

    @property
    def title(self) -> str:
        return self.name or "-".join([*self.values[:2], *([self.columns] if self.columns else [])]).replace(".", "_")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A list of runs plus what is drawn from them."""

    name: str
    text: str
    """The file as it was read."""
    runs: tuple[RunSpec, ...]
    zips: tuple[tuple[str, ...], ...] = ()
    """Keys that move together and count as one axis."""
    labels: dict[str, str] = field(default_factory=dict)
    """Run id -> what tables and figures call its setting; empty where the sweep names none."""
    given: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Run id -> the flattened keys that the file gives it: all others have their defaults."""
    select: Select | None = None
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    claims: tuple[Claim, ...] = ()
    moves: tuple[Move, ...] = ()
    """Of [[transfer]]: what is moved to another base once its runs are done."""
    paper: Paper | None = None
    """The publication that it repeats a part of."""

    @cached_property
    def axes(self) -> list[str]:
        """The keys in which the runs differ, in the order of the specs."""
        flats = [run.flat for run in self.runs]
        keys = dict.fromkeys(key for flat in flats for key in flat)
        return [key for key in keys if len({repr(flat.get(key)) for flat in flats}) > 1]

    @cached_property
    def alone(self) -> frozenset[str]:
        """The runs that are never packed: where costs are shown, the first seed of each setting."""
        asked = [name for table in self.tables for name in table.values]
        asked += [name for figure in self.figures for name in figure.measures]
        asked += [name for claim in self.claims if not claim.counted_on for name in claim.measures.values()]
        cost = self.select.cost if self.select else None
        if cost == "shared" or (cost is None and not any(map(is_shared_in_a_pack, asked))):
            return frozenset()
        first: dict[bytes, RunSpec] = {}
        for run in sorted(self.runs, key=lambda run: run.seed):
            first.setdefault(canonical_json({**run.to_json(), "seed": None}), run)
        return frozenset(run.id for run in first.values())


def read_sweep(
    path: Path, default_name: str | None = None, stored: bool = False, edit: Callable[[str], str] | None = None
) -> Sweep:
    """The sweep in a TOML file, named by it, else `default_name`, else as the file is; `edit` may change its text.

    One that is `stored` has been run: where it is of an older version and lacks the model or the data of a run, these
    are what they were then. Raises InputError with all of its problems at once.
    """
    try:
        table, text = read_toml(path)
    except FileNotFoundError:
        raise InputError(f"{show_path(path)}: no such sweep file") from None
    try:
        if edit and (edited := edit(text)) != text:
            table, text = parse_toml(edited), edited
        return parse_sweep(table, text, default_name=default_name or path.stem, stored=stored)
    except InputError as error:
        raise InputError(error.problems, str(path)) from None


def parse_sweep(table: dict[str, Any], text: str = "", default_name: str = "sweep", stored: bool = False) -> Sweep:
    problems = [
        f"{clip(key)} = {show(table[key])}: {plugins.unknown('section', key, SECTIONS)}"
        for key in table
        if key not in SECTIONS
    ]
    name = table.get("name", default_name)
    if not isinstance(name, str) or name in RESERVED or not re.fullmatch(FILE_NAME.regex, name):
        problems.append(f"name = {show(name)}: must be {FILE_NAME.choices}; not {', '.join(RESERVED)}")
    runs, zips, labels, given = _expand(table, problems, stored)
    known, measures = [*_known_keys(runs), *(["label"] if labels else [])], known_measures(runs)
    select = _collect(problems, lambda: decode(Select, table["select"], "select.")) if "select" in table else None
    tables = [
        _collect(problems, lambda t=t, i=i: _checked(decode(Table, t, f"table {i}: "), known, measures, f"table {i}: "))
        for i, t in enumerate(_blocks(table, "table", problems), 1)
    ]
    figures = [
        _collect(problems, lambda f=f, i=i: decode_plugin(Figure, f, f"figure {i}: figure"))
        for i, f in enumerate(_blocks(table, "figure", problems), 1)
    ]
    claims = [
        _collect(problems, lambda c=c, i=i: decode(Claim, c, f"claim {i}: "))
        for i, c in enumerate(_blocks(table, "claim", problems), 1)
    ]
    chosen = {CHOSEN: Measure("", None, "what [select] chooses", "counts")} if select and select.over == CHOSEN else {}
    moves = [
        _collect(problems, lambda m=m, i=i: decode(Move, m, f"transfer {i}: "))
        for i, m in enumerate(_blocks(table, "transfer", problems), 1)
    ]
    for number, claim in enumerate(claims if runs else (), 1):
        problems += _untestable(claim, runs, labels, {**measures, **chosen}, f"claim {number}: ") if claim else []
        problems += [f"claim {number}: {text}" for text in (claim.senseless() if claim and not stored else ())]
    if select and runs:
        problems += _unknown_keys([select.over], [key for key in known if key not in ("seed", "label")], "select.over")
        problems += _unfit_to_select(select.by, measures, stored)
    over = {key for group in zips if select and select.over in group for key in group}
    problems += _pooled(labels, runs, over | {"seed", select.over if select else "seed"})
    for number, figure in enumerate(figures, 1):
        problems += unknown_measures(figure.measures if figure else [], measures, f"figure {number}: figure")
    for kind, shown in {"table": tables, "figure": figures, "transfer": moves}.items():
        for number, each in enumerate(shown if runs else (), 1):
            problems += unknown_runs(each.where, runs, labels, "where", f"{kind} {number}: ") if each else []
            problems += _unknown_values(each.where, runs, labels, f"{kind} {number}: ") if each and not stored else []
    paper = _collect(problems, lambda: read_paper(table["paper"])) if "paper" in table else None
    problems += _unreported(paper, claims) if paper or "paper" not in table else []
    problems += paper.unknown(_shown(tables, figures)) if paper else ()
    if problems:
        raise InputError(_once(problems))
    return Sweep(
        name=name, text=text, runs=tuple(runs), zips=tuple(zips), labels=labels, given=given, select=select,
        tables=tuple(tables), figures=tuple(figures), claims=tuple(claims), moves=tuple(moves), paper=paper,
    )  # fmt: skip


def _unfit_to_select(by: str, measures: Mapping[str, Measure], stored: bool) -> list[str]:
    """Why a measure cannot choose. What a stored sweep was allowed when it was run it still is."""
    choices = {name: measure for name, measure in measures.items() if find(name)}
    if not stored and find(by) and by.startswith(TEST):
        metric = next((name for name in sorted(OWN, key=len, reverse=True) if by.endswith(f"_{name}")), "loss")
        says = "would choose on the test set what is then reported of it"
        return [f'select.by = {show(by)}: {says}; use "valid_{metric}"']
    if not stored:
        heads, ends = (TEST, "base_"), (*ENDS[1:], "num_generated", "_before")
        choices = {name: choices[name] for name in choices if not (name.startswith(heads) or name.endswith(ends))}
    return unknown_measures([by], choices, "select.by")


def _untestable(
    claim: Claim, runs: list[RunSpec], labels: dict[str, str], measures: Mapping[str, Measure], where: str
) -> list[str]:
    """Why no runs of the sweep could ever decide it."""
    problems = [
        problem
        for side, name in claim.measures.items()
        if side == "where" or name != claim.measure
        for problem in unknown_measures(
            [name],
            places_of() if claim.places[side] else measures,
            f"{where}{'' if side == 'where' else f'{side}.'}measure",
        )
    ]
    for side, at in claim.places.items():
        columns = places_of().get(claim.measures[side], ())
        key = f"{where}{'' if side == 'where' else f'{side}.'}at"
        problems += _unknown_keys([*at], [*columns], key) if columns else []
    return problems + [
        problem for key, wanted in claim.sides.items() for problem in unknown_runs(wanted, runs, labels, key, where)
    ]


def _unreported(paper: Paper | None, claims: Sequence[Claim | None]) -> list[str]:
    """A problem for each claim that names nothing which the paper reports."""
    items, what = [item.item for item in paper.reports] if paper else [], "item of paper.reports"
    return [
        f"claim {number}: reported = {show(claim.reported)}: {plugins.unknown(what, claim.reported, items)}"
        for number, claim in enumerate(claims, 1)
        if claim and claim.reported is not None and claim.reported not in items
    ]


def _shown(tables: Sequence[Table | None], figures: Sequence[Figure | None]) -> list[str]:
    """What the sweep's own tables and figures are called in its report."""
    names = [table.title for table in tables if table]
    own = [figure.name for figure in figures if figure]
    return names + [
        name if name not in own[:place] else f"{name}_{own[: place + 1].count(name)}" for place, name in enumerate(own)
    ]


def unknown_runs(
    wanted: Mapping[str, Any], runs: Sequence[RunSpec], labels: Mapping[str, str], key: str, where: str
) -> list[str]:
    """Why `wanted`, the value of a field `key`, names none of the runs."""
    flat = flatten(dict(wanted))
    known = [*_known_keys(list(runs)), *(["label"] if labels else [])]
    unknown = _unknown_keys(list(flat), known, f"{where}{key}")
    if unknown or any(matches(run.flat | {"label": labels.get(run.id)}, flat) for run in runs):
        return unknown
    return [f"{where}{key} = {show(unflatten(flat))}: is no run of this sweep"]


def _unknown_values(
    where: Mapping[str, Any], runs: Sequence[RunSpec], labels: Mapping[str, str], prefix: str
) -> list[str]:
    """Those of several values that are no run's, so that what they were to show would be missing without a word."""
    flats = [run.flat | {"label": labels.get(run.id)} for run in runs]
    flat = flatten(dict(where))
    if not any(matches(run, flat) for run in flats):
        return []  # told already
    listed = [(name, item) for name, items in flat.items() if isinstance(items, list) for item in items]
    strange = [(name, item) for name, item in listed if not any(matches(run, {name: item}) for run in flats)]
    return [f"{prefix}where.{name}: {show(item)} is no run's of this sweep" for name, item in strange]


def _once(problems: list[str]) -> list[str]:
    """Each problem once; what is wrong in several grid blocks is wrong in [base], and named without the block."""
    texts = [re.sub(r"^grid \d+: ", "", problem) for problem in dict.fromkeys(problems)]
    return list(
        dict.fromkeys(t if texts.count(t) > 1 else p for t, p in zip(texts, dict.fromkeys(problems), strict=True))
    )


def _collect(problems: list[str], make: Any) -> Any:
    try:
        return make()
    except InputError as error:
        problems += error.problems
        return None


def _blocks(table: dict[str, Any], key: str, problems: list[str]) -> list[dict[str, Any]]:
    blocks = table.get(key, [])
    if isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks):
        return blocks
    problems.append(f"{key}: must be written [[{key}]], a list of tables")
    return []


def _expand(
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
    blocks = _blocks(table, "grid", problems) or [{}]
    for number, block in enumerate(blocks, 1):
        where = f"grid {number}: " if len(blocks) > 1 else ""
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
            spec = _collect(problems, lambda cell=cell, where=where: decode(RunSpec, unflatten(cell), where))
            if spec:
                specs.setdefault(spec.id, spec)
                given.setdefault(spec.id, tuple(cell))
                if label is not None:
                    labels.setdefault(spec.id, _label(label, spec, where, problems))
    known = [*keys, *_known_keys(list(specs.values()))]
    for where, rule in rules if specs else ():  # a misspelt key would exclude nothing, silently
        problems += _unknown_keys(list(rule), list(dict.fromkeys(known)), f"{where}exclude")
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
    problems += _unknown_keys(re.findall(r"{([^{}]*)}", template), list(flat), f"{where}label")
    return re.sub(r"{([^{}]*)}", lambda match: str(flat.get(match[1])), template)


def _pooled(labels: dict[str, str], runs: list[RunSpec], free: set[str]) -> list[str]:
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
    """Every cell of the grid: lists are axes (of tables, and the values of LIST: one), the keys of a zip group move
    together."""
    axes: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
    for key, value in flat.items():
        if isinstance(value, list) and not value:
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
        if _is_axis(value) and key not in zipped and not key.endswith(LIST):
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


def _known_keys(runs: list[RunSpec]) -> list[str]:
    return list(dict.fromkeys(key for keys in dict.fromkeys(tuple(run.flat) for run in runs) for key in keys))


def _unknown_keys(keys: list[str], known: list[str], where: str) -> list[str]:
    return [f"{where} = {show(key)}: {plugins.unknown('key', key, known)}" for key in keys if key not in known]


def known_measures(runs: Sequence[RunSpec] = ()) -> Mapping[str, Measure]:
    """What a table can show: the measures of records, and each layer metric's mean (`spectrum.rank_90`).

    Metrics with several values a layer (over k, or a threshold) are none: their mean would say nothing.

    Of the metrics, only those that the tasks of `runs` report, those of sequences and of serving only where some run
    has them; all of them where no runs are given.
    """
    analyses: list[Any] = [plugins.plugin_class("analyses", name) for name in plugins.names("analyses")]
    if not runs:
        return _all_measures(tuple(analyses))
    absent = set() if any(run.tasks for run in runs) else {"sequence"}
    absent |= set() if any(run.serving for run in runs) else {"serving"}
    reports = {name for run in runs for name in (*run.stages[-1].reports, *run.objective.reports)}
    written = {name for run in runs for name in _written(run)}
    others = {split: other.reported for run in runs for task in run.stages for split, other in task.others.items()}
    if "retain" in others:
        reports |= {"retain_loss_before", "retain_loss_after"}
    retains = any(split.startswith("retain") for split in others)
    reports |= {"forgetting"} if retains else set()
    measures = {
        name: measure
        for name, measure in MEASURES.items()
        if retains or measure.group != "drift" or "_retain" not in name
        if measure.group != "metrics" or name in written or re.sub("^(base_)?(valid|test|train)_", "", name) in reports
        if measure.group not in absent
    }
    measures |= of_sets(others)
    moving = any(run.snapshot_every for run in runs)
    return measures | _layer_measures([a for a in analyses if moving or not a.is_over_training()])


def _written(run: RunSpec) -> Iterator[str]:
    """The measures of what a run's model writes, and its base, on the splits that it writes to."""
    generate = run.stages[-1].generation
    for split in generate.measured_splits if generate else ():
        for name in generate.reports if generate else ():
            short = "valid" if split == "validation" else split
            yield from (f"{short}_{name}", f"base_{short}_{name}")


@cache
def _all_measures(analyses: tuple[Any, ...]) -> Mapping[str, Measure]:
    """Asked for with each cell of a table."""
    return MappingProxyType(MEASURES | _layer_measures(analyses))


@cache
def places_of() -> dict[str, tuple[str, ...]]:
    """Metric of ΔW, and what chance gives for it -> the columns that tell its values apart: what `at` may name."""
    found: dict[str, tuple[str, ...]] = {}
    for name in plugins.names("analyses"):
        analysis: Any = plugins.plugin_class("analyses", name)
        numbers = {*analysis.values, *(text for texts in analysis.values.values() for text in texts)}
        columns = [*LAYERS, *(PAIRS if analysis.is_of_pairs() else ()), *COLUMNS, *analysis.columns]
        columns = [key for key in columns if key not in {*numbers, "metric", "value", "null", "null_std"}]
        metrics = [*analysis.metrics, *analysis.values]
        found |= dict.fromkeys((f"{name}.{key}{end}" for key in metrics for end in ("", NULL)), tuple(columns))
    return found


def _layer_measures(analyses: Iterable[Any]) -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for analysis in analyses:
        name = plugins.plugin_name(analysis)
        units = dict.fromkeys(analysis.metrics, "") if analysis.needs == "layer" else analysis.per_layer
        found |= {f"{name}.{key}": Measure(units[key], None, analysis.metrics[key], name) for key in units}
    return found


def _why(value: str, known: Mapping[str, Any]) -> str:
    found = find(value)
    is_written = any(metric in value for metric in METRICS) and found is not None
    if found is not None and value.startswith(("forgetting", "retain_", "drift_retain", "kl_retain")):
        return "is measured by no run of this sweep: give task.retain, the data that show what is forgotten"
    if found is not None and found.group == "serving":
        return "is measured by no run of this sweep: all of them have serving = false"
    return UNMEASURED if is_written else plugins.unknown("measure", value, list(known))


UNMEASURED = "is measured by no run of this sweep, or cannot be used here (answers: see task.generate.splits)"


def unknown_measures(values: list[str], known: Mapping[str, Any], where: str) -> list[str]:
    return [f"{where} = {show(value)}: {_why(value, known)}" for value in values if value not in known]


def _checked(table: Table, known: list[str], measures: Mapping[str, Measure], where: str) -> Table:
    """The table, once its keys and measures are known to exist."""
    problems = unknown_measures(table.values, measures, f"{where}value")
    if known:
        problems += _unknown_keys(table.rows, known, f"{where}rows")
        problems += _unknown_keys([table.columns] if table.columns else [], known, f"{where}columns")
    if problems:
        raise InputError(problems)
    return table
