"""A sweep's runs as one data frame, and which of them its tables and figures compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorabench.report.steps import StepLog, steps_frame
from lorabench.spec.claim import matches
from lorabench.spec.known import known_measures
from lorabench.spec.measures import MEASURES, find, is_shared_in_a_pack
from lorabench.spec.run_spec import UNNAMED, RunSpec, canonical_json, complete, flatten, is_tables, task_names
from lorabench.spec.sweep import Sweep
from lorabench.store.interventions import Scaled, read_interventions
from lorabench.store.paths import Points, read_paths
from lorabench.store.record import FAILURES, GENERATIONS_FILE, PICTURES_FILE, STEPS_FILE, RunRecord, Status
from lorabench.store.store import RunState, Store
from lorabench.training.stability import from_record, judged, with_more
from lorabench.updates.update import DORA_PART

Analyze = Callable[[Store, Sweep, list[str]], dict[str, pd.DataFrame]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Results:
    """What a sweep has given so far. `runs` stands in the sweep's order and has one row a run, done or not.

    Its columns are the flattened keys of the specs (None where a run has no such key), `status`, `error`,
    `attempts`, `finished`, and each measure that any run has (NaN where it is missing); `NAME:na` is true where a
    measure, or `update` for every metric of ΔW, is not applicable.
    """

    sweep: Sweep
    runs: pd.DataFrame
    analyses: dict[str, pd.DataFrame] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Run id -> its record's `environment`."""
    provenance: dict[str, dict[str, str]] = field(default_factory=dict)
    """Run id -> how its measures were made."""
    sequences: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Run id -> its record's `sequence`, where it has one."""
    unread: dict[str, str] = field(default_factory=dict)
    """Run id -> why its ΔW could not be read: such a run is in no analysis."""
    written: dict[str, Path] = field(default_factory=dict)
    """Run id -> the file of its answers, where its model has written."""
    drawn: dict[str, Path] = field(default_factory=dict)
    """Run id -> its pictures, where its model has drawn."""
    paths: dict[str, Points] = field(default_factory=dict)
    """Run id -> what it was evaluated at along W0 + λ ΔW, where it was."""
    interventions: dict[str, Scaled] = field(default_factory=dict)
    """Run id -> its evaluations with intruder dimensions scaled, where it has any."""
    logs: dict[str, StepLog] = field(default_factory=dict)
    """Run id -> where the log of its steps is, of those that have ended."""
    broken: dict[str, str] = field(default_factory=dict)
    """Analysis -> what it raised: what it would have found is missing, in part or as a whole."""
    root: Path | None = None
    """The results folder that the runs lie in, where they lie in one."""
    whole: Results | None = None
    """The results that these are a part of: settings look as there."""

    def of(self, wanted: Mapping[str, Any]) -> Results:
        """Those of the runs that are named by (flattened) keys, as in a claim's `where`; all where none is."""
        if not wanted:
            return self
        flats = {run.id: run.flat | {"label": self.sweep.labels.get(run.id)} for run in self.sweep.runs}
        return self.part(run_id for run_id in self.runs.index if matches(flats[run_id], flatten(dict(wanted))))

    def part(self, run_ids: Iterable[str]) -> Results:
        """These runs alone, with the measures that any of them has."""
        kept = set(run_ids)
        runs = kept_rows(self.runs, [run_id in kept for run_id in self.runs.index])
        runs = runs.drop(columns=[name for name in runs if find(str(name)) and runs[name].isna().all()])
        frames = {name: _of_runs(frame, kept) for name, frame in self.analyses.items()}
        return dataclasses.replace(self, runs=runs, analyses=frames, whole=self.whole or self)

    @cached_property
    def by_task(self) -> dict[str, Results]:
        """The runs that are measured on the same data, by what that is called; all as one where it is the same."""
        found: dict[tuple[str, str], list[str]] = {}
        for run in self.sweep.runs:
            last = run.stages[-1]
            found.setdefault((last.name, str(getattr(last, "data", ""))), []).append(run.id)
        if len(found) == 1:
            return {"": self}
        differ = [len({key[i] for key in found}) > 1 for i in (0, 1)]
        names = {key: ", ".join(part for part, tells in zip(key, differ, strict=True) if tells) for key in found}
        return {names[key]: self.part(run_ids) for key, run_ids in found.items()}

    @cached_property
    def keys(self) -> list[str]:
        """The swept keys: those with two values among the runs that have them, and what else tells like runs apart."""
        if self.whole:
            return [key for key in self.whole.keys if self.runs[key].map(repr).nunique() > 1]
        several = [key for key in self.sweep.axes if self.runs[key].dropna().map(repr).nunique() > 1]
        return complete(several, [run.flat for run in self.sweep.runs], ("seed", *self.over))

    @cached_property
    def over(self) -> list[str]:
        """The keys that the selection chooses: `select.over` and what is zipped with it."""
        if not self.sweep.select or self.sweep.select.over not in self.sweep.axes:
            return []
        over = self.sweep.select.over
        return [over, *(key for group in self.sweep.zips if over in group for key in group if key != over)]

    @cached_property
    def settings(self) -> list[str]:
        """The keys that tell the compared settings apart: `method.name` and the swept ones, less lr and seed.

        `label` alone where the sweep names its settings.
        """
        if self.sweep.labels:
            return ["label"]
        return list(dict.fromkeys(["method.name", *(k for k in self.keys if k not in ("seed", *self.over))]))

    @cached_property
    def setting_keys(self) -> list[str]:
        """The keys that tell the runs apart: those of the compared settings, what is selected, and the seed."""
        keys = dict.fromkeys([*self.settings, *self.over, "seed"])
        return [key for key in keys if key in self.runs]

    @cached_property
    def steps(self) -> pd.DataFrame:
        """The logs of all runs that have ended, a row a run and step: `run_id`, `setting_keys`, `step`, `loss`,
        `grad_norm`, `step_lr` and what else the logs have, such as the metrics of periodic evaluations."""
        return steps_frame(self.runs, self.setting_keys, self.logs)

    @cached_property
    def quality(self) -> str:
        """The measure that tables and figures hold settings against unless told otherwise, without its split."""
        by = self.sweep.select.by if self.sweep.select else ""
        if by.startswith(("valid_", "test_")) and by in self.runs:
            return by.partition("_")[2]
        return "accuracy" if "valid_accuracy" in self.runs else "loss"

    @cached_property
    def test_sets(self) -> list[str]:
        """`test_NAME` of each further test set of which some run has a measure."""
        sets = dict.fromkeys(split for run in self.sweep.runs for task in run.stages for split in task.others)
        measured = [split for split in sets if any(name.startswith(f"{split}_") for name in self.runs)]
        return [split for split in measured if split.startswith("test_")]

    @cached_property
    def selection(self) -> Selection:
        """What `selected` gives."""
        return _select(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The runs that are compared, and the choice made for each setting.

    `choices` has one row a setting: all its keys, each key of `over` with the chosen value, `num_values` tried,
    `edge` (`largest`, `smallest` or None: where the best numeric value lies at the edge of those tried), and
    `complete` (whether each seed of the chosen value is done).
    """

    runs: pd.DataFrame
    choices: pd.DataFrame

    @property
    def run_ids(self) -> list[str]:
        return list(self.runs.index)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `choices`."""
        return self.choices.to_dict("records")

    @cached_property
    def done(self) -> pd.DataFrame:
        """Those of the runs that are done: what a figure can draw."""
        return self.runs[self.runs["status"] == Status.DONE]


def load_results(
    store: Store, sweep: Sweep, analyze: Analyze | None = None, states: list[RunState] | None = None
) -> Results:
    """Read every run of `sweep`, or take its `states`; `analyze(store, sweep, run_ids)` makes the analyses."""
    states = list(store.states(list(sweep.runs))) if states is None else states
    logs = {
        state.run_id: StepLog(file=store.folder(state.run_id) / STEPS_FILE, digest=state.record.steps_sha256)
        for state in states
        if state.record and state.status in (Status.DONE, Status.CANCELLED, *FAILURES)
    }
    states = judged([_measured(state, spec, logs) for state, spec in zip(states, sweep.runs, strict=True)])
    runs = _costs_alone(_frame(states, [spec.flat for spec in sweep.runs]), sweep, states)
    if sweep.labels:
        runs.insert(0, "label", [sweep.labels[run_id] for run_id in runs.index])
    records = {state.run_id: state.record for state in states if state.record}
    results = Results(
        sweep=sweep,
        runs=runs,
        environments={run_id: record.environment for run_id, record in records.items()},
        provenance={run_id: record.provenance for run_id, record in records.items()},
        sequences={run_id: record.sequence for run_id, record in records.items() if record.sequence},
        written={
            run_id: store.folder(run_id) / GENERATIONS_FILE
            for run_id, record in records.items()
            if record.generations_sha256
        },
        drawn={
            run_id: store.folder(run_id) / PICTURES_FILE for run_id, record in records.items() if record.pictures_sha256
        },
        paths=read_paths(store.root, records),
        interventions=read_interventions(store.root, records),
        logs=logs,
        root=store.root,
    )
    if analyze is None:
        return results
    return with_analyses(results, analyze(store, sweep, selected(results).run_ids))


def _costs_alone(runs: pd.DataFrame, sweep: Sweep, states: list[RunState]) -> pd.DataFrame:
    """Without what a packed run costs, its share of a pack's, where another seed of its setting was computed alone."""
    shared = [name for name in runs if is_shared_in_a_pack(str(name))]
    packed = {state.run_id for state in states if state.record and state.record.environment.get("packed")}
    done = {state.run_id for state in states if state.status == Status.DONE}
    settings: dict[bytes, list[str]] = {}
    for spec in sweep.runs if packed else ():
        settings.setdefault(canonical_json({**spec.to_json(), "seed": None}), []).append(spec.id)
    for run_ids in settings.values():
        if any(run_id in done - packed for run_id in run_ids):
            runs.loc[[run_id for run_id in run_ids if run_id in packed], shared] = np.nan
    return runs


def _measured(state: RunState, spec: RunSpec, logs: dict[str, StepLog]) -> RunState:
    """With how stable its training was, of a run whose record is older than that measure."""
    record = state.record
    if record is None or state.status != Status.DONE or "train_climb" in record.measures or spec.id not in logs:
        return state
    return with_more(state, *from_record(spec, record, logs[spec.id].read()))


def with_analyses(results: Results, analyses: dict[str, pd.DataFrame]) -> Results:
    """The results with their analyses; each layer metric becomes a column of `runs`, its mean over `shared` layers.

    `spectrum.rank_90` is the mean, `spectrum.rank_90:null` that of the null model of the same shapes. Of a metric with
    a value for each side of a layer it is the mean over both.
    """
    columns: dict[str, pd.Series] = {}
    for analysis, frame in analyses.items():
        columns |= _run_means(frame, analysis) if {"run_id", "metric"} <= {*frame} else {}
    names = [name for measure in known_measures() for name in (measure, f"{measure}:null")]
    columns = {name: columns[name] for name in names if name in columns}
    joined = results.runs.drop(columns=list(columns), errors="ignore")
    joined = joined.join(pd.DataFrame(columns, dtype=float)) if columns else joined
    return dataclasses.replace(results, runs=joined.copy(), analyses=analyses)


def _run_means(frame: pd.DataFrame, analysis: str) -> dict[str, pd.Series]:
    """Each known metric's mean of each run, and its null's; left out where no layer has one."""
    known, places, runs = known_measures(), _Places.of(frame), frame["run_id"]
    sources = {source: frame[source].astype(float) for source in ("value", "null") if source in frame}
    found: dict[str, pd.Series] = {}
    for metric, rows in frame.groupby("metric", observed=True).indices.items():
        if f"{analysis}.{metric}" not in known:
            continue
        rows = rows[places.take(rows).shared]
        for source, values in sources.items():
            means = values.iloc[rows].groupby(runs.iloc[rows], observed=True).mean()
            if means.notna().any():
                name = f"{analysis}.{metric}" + (":null" if source == "null" else "")
                found[name] = means.set_axis(means.index.astype(object))
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Places:
    """Where the rows of an analysis belong: numbers of their layers and runs, and what is told of their layers."""

    layers: np.ndarray
    runs: np.ndarray
    is_part: np.ndarray
    """Of a ΔW's part, `MODULE[sBA]`."""
    is_inside: np.ndarray
    """The model's blocks."""

    @classmethod
    def of(cls, frame: pd.DataFrame) -> _Places:
        layers, names = pd.factorize(frame["layer"])
        part = np.array([name.endswith(f"[{DORA_PART}]") for name in names], bool)
        inside = frame["depth"].notna().to_numpy() if "depth" in frame else np.ones(len(frame), bool)
        return cls(layers=layers, runs=pd.factorize(frame["run_id"])[0], is_part=part[layers], is_inside=inside)

    def take(self, rows: np.ndarray) -> _Places:
        return _Places(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    @property
    def whole(self) -> np.ndarray:
        """Whether a row is of a ΔW itself; all rows where there is no such."""
        return _unless_none(~self.is_part, np.ones(len(self.layers), bool))

    @property
    def body(self) -> np.ndarray:
        return _unless_none(self.whole & self.is_inside, self.whole)

    @property
    def everywhere(self) -> np.ndarray:
        """Whether a row is of the body, and of a layer that each run of the body has."""
        body = self.body
        if not body.any():
            return body
        pairs = np.unique(np.stack([self.layers[body], self.runs[body]]), axis=1)
        counts = np.bincount(pairs[0], minlength=self.layers.max() + 1)
        return body & (counts == len(np.unique(pairs[1])))[self.layers]

    @property
    def shared(self) -> np.ndarray:
        return _unless_none(self.everywhere, self.body)


def _unless_none(rows: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    return rows if rows.any() else otherwise


def shared(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the layers that every run has, so that runs with other targets compare; all where there is none.

    Of the layers inside the model's blocks, where there are any: runs that trained nothing but a head are left out.
    Nor does a part of a ΔW (DoRA's s B A) count beside that ΔW.
    """
    return frame[_Places.of(frame).shared]


def has_shared(results: Results, name: str) -> bool:
    """Whether a layer metric's mean is over layers that all runs have; else it is over each run's own."""
    analysis, _, metric = name.partition(".")
    frame = results.analyses.get(analysis, pd.DataFrame())
    return frame.empty or bool(_Places.of(frame[frame["metric"] == metric]).everywhere.any())


def whole_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of ΔW itself: without those of its parts, `MODULE[sBA]`, but where there are no others."""
    parts = [layer for layer in frame["layer"].unique() if layer.endswith(f"[{DORA_PART}]")]
    whole = frame[~frame["layer"].isin(parts)] if parts else frame
    return frame if whole.empty else whole


def _of_runs(frame: pd.DataFrame, run_ids: set[str]) -> pd.DataFrame:
    """The rows of an analysis that are of these runs; of pairs, where both are."""
    kept = np.ones(len(frame), bool)
    for column in ("run_id", "run_a", "run_b"):
        if column in frame:
            kept &= frame[column].isin(run_ids).to_numpy()
    return frame[kept]


def kept_rows(frame: pd.DataFrame, keep: Iterable[bool]) -> pd.DataFrame:
    """The rows that are to be kept; `frame[[…]]` would choose columns where there are no rows."""
    return frame[np.fromiter(keep, dtype=bool, count=len(frame))]


def selected(results: Results) -> Selection:
    """The runs that are compared; made once for all tables and figures.

    For every setting (all axes but `select.over` and `seed`) the runs at the best value of `over`.

    Best is the mean of `select.by` over the seeds that are done; a value with each seed done beats one with failed
    or missing seeds; of equal values the smaller wins. Without `[select]` every run is used.
    """
    return results.selection


def _select(results: Results) -> Selection:
    runs, over, select = results.runs, results.over, results.sweep.select
    if select is None or not over:
        return Selection(runs=runs, choices=pd.DataFrame())
    keys = [key for key in results.sweep.axes if key not in ("seed", *over)]
    kept, rows = [], []
    for setting, group in grouped(runs, keys):
        tried = [(values, chunk) for values, chunk in grouped(group, over)]
        scored = [(_score(chunk, select.by), ordinal(values[0]), values, chunk) for values, chunk in tried]
        score, _, values, chunk = min(scored, key=lambda item: item[:2])
        kept += list(chunk.index)
        edge = _edge(values[0], [values[0] for score, _, values, _ in scored if score[0] < 2])
        row = dict(zip(keys, setting, strict=True)) | dict(zip(over, values, strict=True))
        rows.append(row | {"num_values": len(tried), "edge": edge, "complete": score[0] == 0})
    chosen = set(kept)
    choices = pd.DataFrame(rows, columns=[*keys, *over, "num_values", "edge", "complete"], dtype=object)
    return Selection(runs=kept_rows(runs, [run_id in chosen for run_id in runs.index]), choices=choices)


def grouped(frame: pd.DataFrame, keys: Sequence[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Groups by the values of `keys`, in order of appearance; a missing key is a value, None, like any other."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for position, values in enumerate(zip(*(frame[key] for key in keys), strict=True) if keys else [()] * len(frame)):
        groups.setdefault(tuple(values), []).append(position)
    return [(values, frame.iloc[positions]) for values, positions in groups.items()]


def ordered(values: Iterable[Any]) -> list[Any]:
    """Distinct values: numbers ascending, then the rest in order of appearance, None last."""
    distinct = list(dict.fromkeys(values))
    rank = {value: position for position, value in enumerate(distinct)}
    return sorted(distinct, key=lambda v: (v is None, not is_number(v), v if is_number(v) else rank[v]))


def ordinal(value: Any) -> tuple[int, float, str]:
    """A sort key for values of mixed types: numbers first, None and NaN last."""
    value = None if value != value else value
    return (0, float(value), "") if is_number(value) else (2 if value is None else 1, 0.0, str(value))


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _frame(states: list[RunState], specs: list[dict[str, Any]]) -> pd.DataFrame:
    keys = list(dict.fromkeys(key for spec in specs for key in spec))
    found = {name for state in states if state.record for name in state.record.measures}
    measures = [name for name in MEASURES if name in found] + sorted(found - set(MEASURES))
    named = _named_tables(specs)
    rows = []
    for state, spec in zip(states, specs, strict=True):
        record = state.record
        row = {key: _hashable(spec.get(key, UNNAMED.get(key)), named) for key in keys} | {
            "status": str(state.status),
            "error": state.error,
        }
        row |= {"attempts": record and record.attempts, "finished": record and record.finished}
        rows.append(row | (dict(record.measures) if record else {}))
    absent = [_not_applicable(state.record) for state in states]
    for row, names in zip(rows, absent, strict=True):
        row |= dict.fromkeys(names, True)
    index = pd.Index([state.run_id for state in states], name="run_id", dtype=object)
    own = ["status", "error", "attempts", "finished"]
    columns = list(dict.fromkeys([*keys, *own, *measures, *sorted({name for names in absent for name in names})]))
    frame = pd.DataFrame(
        {column: pd.Series([row.get(column) for row in rows], dtype=object) for column in columns}
    ).set_index(index)
    return frame.astype(dict.fromkeys(measures, float)).copy()  # in one piece: hundreds of columns were put together


def _not_applicable(record: RunRecord | None) -> set[str]:
    """`merge_error:na` for each thing of which the record says that it is not applicable; `update` means every ΔW."""
    notes = record.provenance.items() if record else ()
    return {f"{name}:na" for name, text in notes if text.startswith("not applicable")}


def _named_tables(specs: list[dict[str, Any]]) -> dict[str, str]:
    """What the tables in lists (the tasks of a sequence) are called, a name for each, by their repr."""
    lists = [value for spec in specs for value in spec.values() if is_tables(value)]
    distinct = {repr(table): table for tables in lists for table in tables}
    return dict(zip(distinct, task_names(list(distinct.values())), strict=True))


def _hashable(value: Any, named: dict[str, str]) -> Any:
    if is_tables(value):
        return " > ".join(named[repr(table)] for table in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} = {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _score(runs: pd.DataFrame, by: str) -> tuple[int, float]:
    """What is smallest for the best value: first whether seeds are lacking, then the mean of `by`."""
    values = runs.loc[runs["status"] == Status.DONE, by].dropna() if by in runs else pd.Series(dtype=float)
    if values.empty:
        return 2, 0.0
    sign = -1.0 if known_measures()[by].higher_is_better else 1.0
    return int(len(values) < len(runs)), sign * float(values.mean())


def _edge(value: Any, tried: list[Any]) -> str | None:
    if len(tried) < 2 or not all(is_number(item) for item in tried):
        return None
    return "largest" if value == max(tried) else "smallest" if value == min(tried) else None
