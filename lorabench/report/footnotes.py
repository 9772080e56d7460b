"""What stands under a table: what its cells rest on, what was chosen, and what to be careful about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from lorabench.config import plugins
from lorabench.data import fingerprints
from lorabench.report.aggregate import FEWEST, Cell
from lorabench.report.labels import key_label, listed, measure, measure_label, series_label
from lorabench.report.results import Results, Selection, grouped, has_shared
from lorabench.spec.measures import is_shared_in_a_pack
from lorabench.spec.run_spec import flatten
from lorabench.spec.sweep import Table
from lorabench.store.record import Status

THINNED = "Of more settings than there is room for, some of the ranks are left out, then those that do worst."
NAMED = 8
"""Settings that a note names; of more it says how many."""
STORED = ("storage_bytes", "resident_adapter_gib", "adapter_load_seconds", "adapter_swap_seconds")
"""Measures of an adapter's files, beside those of the group `storage`."""


def declared_notes(
    results: Results, selection: Selection, table: Table, cells: list[Cell], has_gaps: bool
) -> list[str]:
    keys = [*table.rows, *([table.columns] if table.columns else [])]
    counts = sorted({item.n for item in cells if item.n})
    behind = f"n = {counts[-1]} runs behind each cell that does not say otherwise." if counts else ""
    behind = behind if table.columns else "n: runs behind the means."
    notes = part_note(table.where)
    notes += [f"Mean ± 95% interval (Student t) over seeds. {behind}{single_seed([cells])}"]
    if any(item.null is not None for item in cells):
        notes.append(f"In brackets: the same metric of {_null_models(table.values)}.")
    notes += layer_notes(results, table.values)
    notes += applicability([cells])
    if has_gaps:
        notes.append("–: not part of the sweep.")
    if any(measure(value).group == "storage" or value in STORED for value in table.values):
        notes += storage_notes(results, selection)
    return [
        *notes,
        *selection_notes(results, selection),
        *mixture_notes(results, selection.runs, keys),
        *packed_notes(results, selection.runs, table.values),
        *data_notes(results),
    ]


def part_note(where: dict[str, Any]) -> list[str]:
    """Which of the runs are shown, where these are not all."""
    flat = flatten(where)
    values = [" or ".join(map(str, value)) if isinstance(value, list) else value for value in flat.values()]
    return [f"Of the runs with {series_label(list(flat), values, full=True)} alone."] if flat else []


def figure_notes(results: Results, figure: Any) -> str:
    """What belongs into the figure's caption in this sweep, and not in every one: seeds, choices, what is left out."""
    selection = results.selection
    groups = grouped(selection.done, results.settings)
    notes = part_note(figure.where)
    if figure.intervals:
        seeds = [chunk["seed"].nunique() for _, chunk in groups]
        if max(seeds, default=0) >= FEWEST:
            notes.append("Bars and bands: 95% Student-t intervals over seeds.")
        if min(seeds, default=FEWEST) < FEWEST:
            notes.append("Hollow: of one seed or two, which give no useful interval.")
    if any(choice["num_values"] > 1 for choice in selection.rows):
        notes.append(f"Settings at their own best {key_label(results.over[0])}.")
    along = getattr(figure, "along", None)  # whose values are one curve
    shown = grouped(selection.done, [key for key in results.settings if key != along]) if along else groups
    if figure.most is not None and len(shown) > figure.most:
        notes.append(THINNED)
    notes += packed_notes(results, selection.runs, figure.measures)
    notes += figure.notes(results)
    return " ".join(notes)


def packed_notes(results: Results, runs: pd.DataFrame, values: Iterable[str]) -> list[str]:
    """That what is shown of memory and time is a share of what several runs took together, and of which runs."""
    shared = [value for value in values if is_shared_in_a_pack(value) and value in runs]
    done = [run_id for run_id in runs.index if runs.at[run_id, "status"] == Status.DONE]
    packed = [run_id for run_id in done if results.environments.get(run_id, {}).get("packed")]
    if not shared or not packed:
        return []
    shares = runs.loc[packed, shared].dropna(how="all")
    if shares.empty:
        which = f"{len(done) - len(packed)} of {len(done)} runs"
        return [f"Of the {which} that were computed alone: {listed(map(measure_label, shared))}."]
    share = "share of what the runs of a pack took together"
    if len(shares) == len(done):
        return [f"Packed: {listed(map(measure_label, shared))} are each run's {share}."]
    settings = [
        series_label(results.settings, values) for values, _ in grouped(runs.loc[shares.index], results.settings)
    ]
    which = f"of {len(shares)} of {len(done)} runs"
    which += f" ({'; '.join(settings) if len(settings) <= NAMED else f'{len(settings)} settings'})"
    rest = "of the others what they took alone: the one is not to be compared with the other"
    return [f"Packed: {listed(map(measure_label, shared))} are {which} a {share}, {rest}."]


def data_notes(results: Results) -> list[str]:
    """Whether data were changed under their name between the runs that are done."""
    done = {run_id for run_id in results.runs.index if results.runs.at[run_id, "status"] == Status.DONE}
    return fingerprints.changed(
        (spec.id, fingerprints.named(spec.stages, results.environments.get(spec.id, {}).get("data") or {}))
        for spec in results.sweep.runs
        if spec.id in done
    )


def _null_models(values: list[str]) -> str:
    """What the nulls of these metrics are of, by what their analyses look at."""
    analyses: list[Any] = [plugins.plugin_class("analyses", v.partition(".")[0]) for v in values if "." in v]
    needs = {analysis.needs for analysis in analyses}
    models = {
        "layer": "random Gaussian updates of the same shapes, ranks and norms",
        "base": "random directions in place of ΔW's",
    }
    return listed(text for need, text in models.items() if need in needs) if needs & models.keys() else "chance"


def layer_notes(results: Results, values: list[str]) -> list[str]:
    """Over which layers the metrics of ΔW are means."""
    metrics = [value for value in values if "." in value]
    apart = [value for value in metrics if not has_shared(results, value)]
    notes = ["Metrics of ΔW are means over the layers that all runs have."] if len(apart) < len(metrics) else []
    if apart:
        which = "metrics of ΔW" if apart == metrics else listed(map(measure_label, apart))
        notes.append(f"No layer was changed in all runs: {which} are means over each run's own layers, which differ.")
    return notes


def storage_notes(results: Results, selection: Selection) -> list[str]:
    """Whose files hold something else than what was trained."""
    about = {spec.id: spec.method.about_storage for spec in results.sweep.runs}
    found: dict[str, list[str]] = {}
    for setting, runs in grouped(selection.runs, results.settings):
        text = about[runs.index[0]]
        if text:
            found.setdefault(text, []).append(series_label(results.settings, setting))
    return [f"The files of {listed(labels)} hold {text}." for text, labels in found.items()]


def applicability(cells: Iterable[Iterable[Cell]]) -> list[str]:
    """What n/a means, where a table has one."""
    missing = any(not item.applicable for line in cells for item in line)
    return ["n/a: the method cannot have it (a soft prompt has no ΔW and cannot be merged)."] if missing else []


def single_seed(cells: Iterable[Iterable[Cell]]) -> str:
    alone = any(item.num_seeds == 1 for line in cells for item in line)
    return " A single seed gives no interval." if alone else ""


def optimism_notes(results: Results, selection: Selection) -> list[str]:
    """That the measure by which something was chosen flatters what was chosen, and which one does not."""
    select = results.sweep.select
    if select is None or selection.choices.empty:
        return []
    over, by = key_label(results.over[0]), measure_label(select.by)
    apart = select.by.replace("valid_", "test_", 1)
    free = f"; the {measure_label(apart)} took no part in that" if apart != select.by and apart in results.runs else ""
    return [f"The {by} is the one by which the {over} was chosen, and so a little too good{free}."]


def selection_notes(results: Results, selection: Selection) -> list[str]:
    """What was chosen, how, and whether the best lies at the edge of what was tried."""
    if selection.choices.empty or results.sweep.select is None:
        return []
    over, by = key_label(results.over[0]), measure_label(results.sweep.select.by)
    notes = [f"Each setting at its own best {over}, chosen by the mean {by} over seeds."]
    edges = [choice for choice in selection.rows if choice["edge"]]
    if edges:
        two = " Only two were tried." if all(choice["num_values"] == 2 for choice in edges) else ""
        notes.append(
            f"Best at the edge of the axis in {len(edges)} of {len(selection.choices)} settings (summary: ↑ the "
            f"largest {over} tried, ↓ the smallest): a better one may lie beyond.{two}"
        )
    left_out = results.runs[~results.runs.index.isin(selection.runs.index) & (results.runs["status"] != Status.DONE)]
    if len(left_out):
        counts = ", ".join(f"{count} {status}" for status, count in sorted(left_out["status"].value_counts().items()))
        notes.append(f"Of the runs at another {over}, not done: {counts}.")
    return notes


def mixture_notes(results: Results, runs: pd.DataFrame, keys: list[str]) -> list[str]:
    """Which swept keys a cell averages over because the table does not show them."""
    others = [key for key in results.keys if key not in (*keys, "seed", *results.over)]
    mixed = [key for key in others if any(chunk[key].map(repr).nunique() > 1 for _, chunk in grouped(runs, keys))]
    if not mixed:
        return []
    return [f"Cells average over {listed(map(key_label, mixed))}, within each seed first."]
