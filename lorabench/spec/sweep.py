"""Sweep files: TOML -> the runs of a grid and what to draw from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from lorabench.config import plugins
from lorabench.config.decode import InputError, Pattern, decode, decode_plugin, parse_toml, read_toml, show
from lorabench.config.quote import clip, show_path
from lorabench.spec.claim import CHOSEN, Claim
from lorabench.spec.figure import Figure
from lorabench.spec.generate import ENDS
from lorabench.spec.grid import blocks, collect, expand, pooled
from lorabench.spec.known import (
    known_keys,
    known_measures,
    unknown_keys,
    unknown_measures,
    unknown_runs,
    unknown_values,
)
from lorabench.spec.measures import OWN, Measure, find, is_shared_in_a_pack
from lorabench.spec.move import Move
from lorabench.spec.paper import Paper, read_paper
from lorabench.spec.reported import unreported, untestable
from lorabench.spec.run_spec import RunSpec, canonical_json

SECTIONS = ["name", "base", "grid", "exclude", "select", "table", "figure", "claim", "transfer", "paper"]

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
    runs, zips, labels, given = expand(table, problems, stored)
    known, measures = [*known_keys(runs), *(["label"] if labels else [])], known_measures(runs)
    select = collect(problems, lambda: decode(Select, table["select"], "select.")) if "select" in table else None
    tables = [
        collect(problems, lambda t=t, i=i: _checked(decode(Table, t, f"table {i}: "), known, measures, f"table {i}: "))
        for i, t in enumerate(blocks(table, "table", problems), 1)
    ]
    figures = [
        collect(problems, lambda f=f, i=i: decode_plugin(Figure, f, f"figure {i}: figure"))
        for i, f in enumerate(blocks(table, "figure", problems), 1)
    ]
    claims = [
        collect(problems, lambda c=c, i=i: decode(Claim, c, f"claim {i}: "))
        for i, c in enumerate(blocks(table, "claim", problems), 1)
    ]
    chosen = {CHOSEN: Measure("", None, "what [select] chooses", "counts")} if select and select.over == CHOSEN else {}
    moves = [
        collect(problems, lambda m=m, i=i: decode(Move, m, f"transfer {i}: "))
        for i, m in enumerate(blocks(table, "transfer", problems), 1)
    ]
    for number, claim in enumerate(claims if runs else (), 1):
        problems += untestable(claim, runs, labels, {**measures, **chosen}, f"claim {number}: ") if claim else []
        problems += [f"claim {number}: {text}" for text in (claim.senseless() if claim and not stored else ())]
    if select and runs:
        problems += unknown_keys([select.over], [key for key in known if key not in ("seed", "label")], "select.over")
        problems += _unfit_to_select(select.by, measures, stored)
    over = {key for group in zips if select and select.over in group for key in group}
    problems += pooled(labels, runs, over | {"seed", select.over if select else "seed"})
    for number, figure in enumerate(figures, 1):
        problems += unknown_measures(figure.measures if figure else [], measures, f"figure {number}: figure")
    for kind, shown in {"table": tables, "figure": figures, "transfer": moves}.items():
        for number, each in enumerate(shown if runs else (), 1):
            problems += unknown_runs(each.where, runs, labels, "where", f"{kind} {number}: ") if each else []
            problems += unknown_values(each.where, runs, labels, f"{kind} {number}: ") if each and not stored else []
    paper = collect(problems, lambda: read_paper(table["paper"])) if "paper" in table else None
    problems += unreported(paper, claims) if paper or "paper" not in table else []
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


def _shown(tables: Sequence[Table | None], figures: Sequence[Figure | None]) -> list[str]:
    """What the sweep's own tables and figures are called in its report."""
    names = [table.title for table in tables if table]
    own = [figure.name for figure in figures if figure]
    return names + [
        name if name not in own[:place] else f"{name}_{own[: place + 1].count(name)}" for place, name in enumerate(own)
    ]


def _once(problems: list[str]) -> list[str]:
    """Each problem once; what is wrong in several grid blocks is wrong in [base], and named without the block."""
    texts = [re.sub(r"^grid \d+: ", "", problem) for problem in dict.fromkeys(problems)]
    return list(
        dict.fromkeys(t if texts.count(t) > 1 else p for t, p in zip(texts, dict.fromkeys(problems), strict=True))
    )


def _checked(table: Table, known: list[str], measures: Mapping[str, Measure], where: str) -> Table:
    """The table, once its keys and measures are known to exist."""
    problems = unknown_measures(table.values, measures, f"{where}value")
    if known:
        problems += unknown_keys(table.rows, known, f"{where}rows")
        problems += unknown_keys([table.columns] if table.columns else [], known, f"{where}columns")
    if problems:
        raise InputError(problems)
    return table
