"""What `lorabench merge` shows: each body on each task, and beside it how much the merged adapters interfere.

Merging costs an adapter what it could do alone: the change on its own task. How much the updates overlap and how
often their signs conflict stands next to it (`lorabench.analyses.interference`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lorabench.adapters.merging.adapters import Adapter
from lorabench.adapters.merging.bodies import ADAPTER, Body
from lorabench.adapters.merging.compose import own_columns
from lorabench.analysis.analyze import compare
from lorabench.report.aggregate import interval, number, places, plain
from lorabench.report.labels import listed
from lorabench.report.page import Part
from lorabench.store.store import Store
from lorabench.terminal.text import TextTable

ANALYSIS = "interference"
PAPERS = {"ties": "delta_ties", "dare_linear": "delta_dare"}
"""PEFT's merge, factor by factor -> that of ΔW itself, which the paper of its name defines."""


def interference(store: Store, adapters: Sequence[Adapter], note: Callable[[str], None]) -> list[dict[str, Any]]:
    """For every two adapters, each metric's mean and standard deviation over the layers that are merged, and chance.

    `chance` and `chance_std` are the mean and standard deviation of one layer by chance, both averaged over the layers.
    Kept layer by layer in RESULTS/pairs/, where `lorabench analyze` finds it too.
    """
    pairs = list(itertools.combinations([adapter.record for adapter in adapters], 2))
    frame = compare(store, ANALYSIS, pairs, note)
    frame = frame[frame["layer"].isin(adapters[0].layers)]
    found = []
    for a, b in pairs:
        mine = frame[(frame["run_a"] == a.run_id) & (frame["run_b"] == b.run_id)]
        metrics = {
            str(metric): {
                "mean": float(rows["value"].mean()),
                "std": float(rows["value"].std()) if len(rows) > 1 else None,
                "chance": float(rows["null"].mean()),
                "chance_std": float(rows["null_std"].mean()),
                "num_layers": len(rows),
            }
            for metric, rows in mine.groupby("metric", sort=False, observed=True)
        }
        found.append({"run_a": a.run_id, "run_b": b.run_id, "metrics": metrics})
    return found


def with_changes(
    records: Sequence[dict[str, Any]], wanted: Sequence[Body], adapters: Sequence[Adapter]
) -> list[dict[str, Any]]:
    """The records, those of merges with `change`: by run, each metric less what its adapter alone has on its task."""
    own = {a.record.run_id: column for a, column in zip(adapters, own_columns(adapters), strict=True)}
    alone = {
        body.run_id: record["metrics"][own[body.run_id]]
        for record, body in zip(records, wanted, strict=True)
        if body.by == ADAPTER and body.run_id
    }
    return [
        record | {"change": {run_id: _less(record["metrics"][own[run_id]], alone[run_id]) for run_id in own}}
        if body.weights
        else record
        for record, body in zip(records, wanted, strict=True)
    ]


def _less(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in after.items() if name in before}


def metric_shown(records: Sequence[dict[str, Any]]) -> str:
    """`valid_accuracy` where every task has it, else `valid_loss`."""
    cells = [cell for record in records for cell in record["metrics"]]
    return "valid_accuracy" if all("valid_accuracy" in cell for cell in cells) else "valid_loss"


def merge_table(records: Sequence[dict[str, Any]], wanted: Sequence[Body]) -> TextTable:
    """Bodies by tasks; DARE's seeds as mean ± 95% interval."""
    name, factor, unit = _shown(records)
    heads = records[0]["tasks"]
    rows = []
    for label, group in _by_label(records, wanted):
        values = [[factor * record["metrics"][i][name] for record in group] for i in range(len(heads))]
        rows.append({"body": label} | {head: _cell(column) for head, column in zip(heads, values, strict=True)})
    return TextTable(title=f"{name} ({unit}), by body and task", heads=["body", *heads], rows=rows)


def peft_note(wanted: Sequence[Body]) -> Iterator[str]:
    """Of which merges PEFT's is another than its paper's; nothing where none is wanted."""
    for by, paper in PAPERS.items():
        if any(body.by == by for body in wanted):
            yield f"{by} merges A and B apart, as PEFT does; what its paper defines, on the updates, is {paper}"


def _shown(records: Sequence[dict[str, Any]]) -> tuple[str, int, str]:
    name = metric_shown(records)
    return (name, 100, "%") if name == "valid_accuracy" else (name, 1, "nats")


def _by_label(records: Sequence[dict[str, Any]], wanted: Sequence[Body]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    pairs = zip(records, wanted, strict=True)
    for label, group in itertools.groupby(pairs, key=lambda pair: pair[1].label):
        yield label, [record for record, _ in group]


def _cell(values: list[float]) -> str:
    mean, half = interval(values)
    if not half:
        return plain(mean)
    return f"{number(mean, places(half))} ± {number(half, places(half))}"


def _signed(values: list[float]) -> str:
    text = _cell(values)
    return text if text.startswith("−") or not any(values) else f"+{text}"


def change_table(records: Sequence[dict[str, Any]], wanted: Sequence[Body]) -> TextTable:
    """Merges by runs: what each adapter loses (or gains) on its own task by being merged. Of `with_changes`."""
    name, factor, unit = _shown(records)
    rows = []
    for label, group in _by_label(records, wanted):
        if "change" in group[0]:
            changes = {
                run_id: [factor * each["change"][run_id][name] for each in group] for run_id in group[0]["change"]
            }
            rows.append({"body": label} | {run_id: _signed(values) for run_id, values in changes.items()})
    heads = list(rows[0])[1:] if rows else []
    title = f"change of {name} ({unit}) on each run's own task, against its adapter alone"
    return TextTable(title=title, heads=["body", *heads], rows=rows)


def interference_table(found: Sequence[dict[str, Any]]) -> TextTable:
    """A row for each pair and metric: mean and standard deviation over the layers, and what chance gives."""
    rows = [
        {
            "run_a": pair["run_a"],
            "run_b": pair["run_b"],
            "metric": metric,
            "mean": number(numbers["mean"], 3),
            "std": None if numbers["std"] is None else number(numbers["std"], 3),
            "chance": number(numbers["chance"], 3),
            "chance_std": number(numbers["chance_std"], 3),
        }
        for pair in found
        for metric, numbers in pair["metrics"].items()
    ]
    title = "interference of every two adapters, mean and standard deviation over the layers"
    return TextTable(title=title, heads=["run_a", "run_b", "metric", "mean", "std", "chance", "chance_std"], rows=rows)


def merge_part(run_ids: Sequence[str], tables: Sequence[TextTable]) -> Part:
    """A page's section of these runs' merges."""
    text = (
        "The base, each adapter alone and each merge, on the validation split of every run's own task. Merges of A and "
        "B apart are PEFT's, and not what the papers of their names define: these are delta_ties and delta_dare."
    )
    return Part(title=f"Merges of {listed(run_ids)}", text=text, tables=[*tables])
