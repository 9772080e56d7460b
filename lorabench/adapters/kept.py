"""What merging, compressing and intervening have kept of a sweep's runs, as sections of its report.

Read from RESULTS/merges, compressions, interventions and usefulness; what is damaged or of another version is left out.
RESULTS/paths are the report's own: `lorabench.report.paths`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.json_file import read_json
from lorabench.report.page import Part
from lorabench.store.store import KEPT, Store

Record = dict[str, Any]


def kept_parts(store: Store, run_ids: Iterable[str]) -> list[Part]:
    """Merges whose runs are all of these, the runs' own compressions, interventions by what counts as an intruder, and
    how useful single directions are."""
    ids = set(run_ids)
    makers = {
        "merges": _merges,
        "compressions": _compressions,
        "interventions": _interventions,
        "usefulness": _usefulness,
    }
    found = {name: [each for each in _records(store, name) if _runs_of(each) <= ids] for name in KEPT if name in makers}
    return [part for name, records in found.items() if records for part in makers[name](records)]


def _records(store: Store, name: str) -> Iterator[Record]:
    for file in sorted((store.root / name).glob("*/record.json")):
        try:
            record = read_json(file)
        except InputError:
            continue
        if record and isinstance(record.get("key"), dict) and _runs_of(record):
            yield record


def _runs_of(record: Record) -> set[str]:
    """The runs whose adapters were merged, compressed or scaled; none of an adapter from elsewhere."""
    key = record["key"]
    if "runs" in key:
        return {run["run_id"] for run in key["runs"]}
    if "run_id" in key:
        return {key["run_id"]}
    return {key["run"]["run_id"]} if key.get("run") and key["run"].get("own") else set()


def _merges(records: list[Record]) -> Iterator[Part]:
    from lorabench.adapters.merging.bodies import ADAPTER, BASE, Body
    from lorabench.adapters.merging.compose import VERSION
    from lorabench.adapters.merging.interference import merge_part, merge_table

    groups: dict[tuple[str, ...], list[tuple[Body, Record]]] = {}
    for record in records:
        if record["key"]["version"] == VERSION:
            body = record["key"]["body"]
            made = Body(**body | {"weights": tuple(body["weights"]) or None})
            groups.setdefault(tuple(run["run_id"] for run in record["key"]["runs"]), []).append((made, record))
    for run_ids, pairs in groups.items():
        places = {BASE: 0, ADAPTER: 1}
        pairs.sort(key=lambda pair: (places.get(pair[0].by, 2), pair[0].label, pair[0].seed or 0))
        table = merge_table([record for _, record in pairs], [body for body, _ in pairs])
        yield merge_part(run_ids, [table])


def _compressions(records: list[Record]) -> Iterator[Part]:
    from lorabench.adapters.compression.compress import BASE, VERSION, Body
    from lorabench.adapters.compression.compression_text import compression_part

    groups: dict[str, list[tuple[Body, Record]]] = {}
    for record in records:
        key = record["key"]
        if key["version"] == VERSION:
            body = Body(by=key["by"], energy=key["energy"])
            groups.setdefault(key["run"]["run_id"], []).append((body, record | {"body": body.label}))
    for run_id, pairs in groups.items():
        pairs.sort(key=lambda pair: (pair[0].by != BASE, -(pair[0].energy or 2)))
        yield compression_part(run_id, [record for _, record in pairs])


def _interventions(records: list[Record]) -> Iterator[Part]:
    from lorabench.adapters.intervention.intervene import Intervention
    from lorabench.adapters.intervention.intervene_report import intervention_part, make_rows
    from lorabench.store.interventions import VERSION

    groups: dict[tuple[float, int], list[Record]] = {}
    for record in records:
        if record["key"]["version"] == VERSION:
            groups.setdefault((record["key"]["epsilon"], record["key"]["top"]), []).append(record)
    for (epsilon, top), group in groups.items():
        scales = {point["lambda"] for record in group for point in record["points"]} - {None}
        every = [scale for scale in sorted(scales) if all(_has(record, scale) for record in group)]
        wanted = Intervention(lambdas=tuple(every), epsilon=epsilon, top=top)
        whole = [record for record in group if _has(record, 1.0)]
        if whole:
            yield intervention_part(whole, make_rows(whole, wanted))


def _usefulness(records: list[Record]) -> Iterator[Part]:
    from lorabench.adapters.intervention.usefulness import VERSION
    from lorabench.adapters.intervention.usefulness_report import usefulness_part

    for record in records:
        if record["key"]["version"] == VERSION and len(record["points"]) == record["num_points"]:
            yield usefulness_part(record)


def _has(record: Record, scale: float) -> bool:
    """Whether the run was evaluated at this λ in every way that it has directions for."""
    from lorabench.adapters.intervention.intervene import Intervention

    there = {(point["scaled"], point["lambda"]) for point in record["points"]}
    wanted = Intervention(lambdas=(scale,)).points(record)
    return all((point["scaled"], point["lambda"]) in there for point in wanted)
