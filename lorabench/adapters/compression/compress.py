"""An adapter cut to the smallest ranks that keep a share of ΔW's energy, and what it can do before and after.

    results/compressions/<id>/record.json      one a body: the base, the adapter as it is, and each energy ...
                              adapter/         ... with the LoRA of that energy, in PEFT's format

<id> is the hash of all that a body depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.adapters.compression.compressible import Subject
from lorabench.adapters.compression.compressor import Compressor
from lorabench.config.decode import InputError
from lorabench.config.digests import file_digests
from lorabench.config.durable import write_json
from lorabench.config.json_file import read_json
from lorabench.processes.distributed import pick_device
from lorabench.spec.run_spec import canonical_json
from lorabench.store.store import Store

VERSION = 3
"""Part of every id: raise it when a compression or its evaluation changes."""
BASE, FULL, ENERGY = "base", "full", "energy"


@dataclass(frozen=True, kw_only=True)
class Body:
    """The base, the adapter as it is (`full`), or the adapter at an energy."""

    by: str
    energy: float | None = None

    @property
    def label(self) -> str:
        return self.by if self.energy is None else f"{self.by} {self.energy:g}"


def compress(
    store: Store, subject: Subject, energies: Sequence[float], device: str, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The record of each body, the adapters written; those that are there already are read."""
    wrong = [f"--energy {energy:g}: must be above 0 and at most 1" for energy in energies if not 0 < energy <= 1]
    if wrong:
        raise InputError(wrong)
    asked = [Body(by=ENERGY, energy=energy) for energy in dict.fromkeys(energies)]
    bodies = [*([Body(by=BASE)] if subject.record else []), Body(by=FULL), *asked]
    folders = {body: _folder(store, subject, body) for body in bodies}
    records = {body: _read(folders[body], _key(subject, body)) for body in bodies}
    missing = [body for body in bodies if records[body] is None]
    compressor = Compressor(subject, pick_device(device)) if missing else None
    made = compressor.write({b.energy: folders[b] / "adapter" for b in missing if b.energy}) if compressor else {}
    for position, body in enumerate(bodies, 1):
        if compressor and body in missing:
            note(f"[{position}/{len(bodies)}] {body.label}")
            record = {"compression_id": folders[body].name, "key": _key(subject, body)}
            record |= {"provenance": provenance(subject)}
            record |= made[body.energy] if body.energy else compressor.size() if body.by == FULL else {}
            record |= {"metrics": _metrics(compressor, body, folders[body]), "environment": compressor.environment}
            write_json(folders[body] / "record.json", record)
            records[body] = record
    return [record | {"body": body.label} for body, record in records.items() if record is not None]


def provenance(subject: Subject) -> dict[str, Any]:
    """Which adapter this is, and where its scale came from."""
    adapter = subject.adapter
    scale = {"format": adapter.format, "scale_source": adapter.scale_source}
    return {"adapter": subject.name} | scale | {"notes": subject.notes}


def _metrics(compressor: Compressor, body: Body, folder: Path) -> dict[str, float]:
    if compressor.spec is None:
        return {}
    if body.by == ENERGY:
        return compressor.metrics(compressor.with_adapter(folder / "adapter"))
    return compressor.metrics(compressor.base() if body.by == BASE else compressor.full())


def _key(subject: Subject, body: Body) -> dict[str, Any]:
    """All that a body's numbers depend on."""
    record = subject.record
    run = record and {"run_id": record.run_id, "data": record.environment.get("data"), "own": subject.own}
    adapter = None if body.by == BASE else subject.content
    return {"version": VERSION, "adapter": adapter, "run": run, "by": body.by, "energy": body.energy}


def _folder(store: Store, subject: Subject, body: Body) -> Path:
    digest = hashlib.sha256(canonical_json(_key(subject, body))).hexdigest()[:12]
    return store.root / "compressions" / f"{body.label.replace(' ', '-')}-{digest}"


def _read(folder: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The record that was kept, if it is whole, of this content, and its adapter is as it was written."""
    try:
        record = read_json(folder / "record.json")
    except InputError:
        return None
    if record is None or record.get("key") != key or not {"metrics", "environment"} <= record.keys():
        return None
    files = file_digests(folder / "adapter", folder) if (folder / "adapter").is_dir() else {}
    return record if record.get("files", {}) == files else None
