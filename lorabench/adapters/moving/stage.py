"""What a sweep's [[transfer]] asks for: adapters of its runs that are done, moved, evaluated and kept.

Each is made once and taken up again, by the content of all that it depends on. Where the store has a run of the same
settings on the new base, that is the adapter trained there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorabench.adapters.compression.compressible import Subject, open_subject
from lorabench.adapters.moving.kept_moves import move_key, moves_folder
from lorabench.adapters.moving.move import ByData, move_adapter
from lorabench.adapters.moving.transfer import Transfer
from lorabench.config.decode import InputError
from lorabench.config.digests import file_digests
from lorabench.config.durable import write_json
from lorabench.config.json_file import read_json
from lorabench.report.results import Results, selected
from lorabench.spec.move import Move
from lorabench.spec.run_spec import RunSpec
from lorabench.store.record import Status
from lorabench.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Moves:
    """The records of what is moved, each with `move`, the number of its [[transfer]], and why some is not."""

    records: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)


def move_runs(store: Store, results: Results, device: str, note: Callable[[str], None]) -> Moves:
    """Of the runs that are compared and done."""
    found = Moves()
    chosen = set(selected(results).done.index)
    specs = {spec.id: spec for spec in results.sweep.runs}
    for number, move in enumerate(results.sweep.moves, 1):
        for run_id in [each for each in results.of(move.where).runs.index if each in chosen]:
            what = f"transfer {number}: {run_id}"
            tell: Callable[[str], None] = partial(_told, note, what)
            try:
                record = moved_run(store, specs[run_id], move, device, tell)
                found.records.append(record | {"move": number})
            except InputError as error:
                found.errors[what] = "; ".join(error.problems)
    return found


def _told(note: Callable[[str], None], what: str, text: str) -> None:
    note(f"{what}: {text}")


def moved_run(store: Store, spec: RunSpec, move: Move, device: str, note: Callable[[str], None]) -> dict[str, Any]:
    """The record of one, read where it is whole and of this content. InputError where it cannot be moved."""
    subject = open_subject(store, spec.id)
    transfer = Transfer(subject, move.to, None, move.by, move.rank)
    folder, trained = moves_folder(store, transfer, move.distil), _trained(store, spec, move.to)
    key = move_key(transfer, move.distil) | {"trained": trained and trained.content}
    if known := _read(folder, key):
        return known
    note(f"to {move.to} by {move.by}")
    if (folder / "adapter").exists():
        shutil.rmtree(folder / "adapter")
    by_data = ByData(how=move.distil, folder=folder) if transfer.by_data else None
    found = move_adapter(transfer, folder / "adapter", trained, device, note, by_data)
    record: dict[str, Any] = {"transfer_id": folder.name, "key": key, "found": found | {"output": "adapter"}}
    record |= {"files": file_digests(folder / "adapter", folder), "trained": trained and trained.name}
    write_json(folder / "record.json", record)
    return record


def _trained(store: Store, spec: RunSpec, to: str) -> Subject | None:
    """The run of the same settings on the new base, where it is done and its ΔW was kept."""
    twin = replace(spec, model=to, revision=None)
    record = store.read(twin.id)
    if record is None or record.status != Status.DONE or twin.keep != "updates":
        return None
    return open_subject(store, twin.id)


def _read(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        record = read_json(folder / "record.json")
    except InputError:
        return None
    if record is None or record.get("key") != key or not {"found", "files", "trained"} <= record.keys():
        return None
    is_whole = (folder / "adapter").is_dir() and file_digests(folder / "adapter", folder) == record["files"]
    return record if is_whole else None


def of_move(records: Iterable[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    return [record for record in records if record["move"] == number]
