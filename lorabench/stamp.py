"""Whether a sweep's tables and figures are up to date, told without loading torch or pandas."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lorabench.decode import InputError
from lorabench.plugins import unknown
from lorabench.record import Store, write_json
from lorabench.sweep import Sweep, read_sweep

STAMP_FILE = ".analyze.json"


def analysis_key(store: Store, sweep: Sweep) -> str:
    """Hash of all that the output depends on: the sweep's text, lorabench's own source, and each run's record."""
    digest = hashlib.sha256(sweep.text.encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    for spec in sweep.runs:
        file = store.folder(spec.id) / "record.json"
        try:
            found = file.stat()
            digest.update(f"\0{spec.id} {found.st_mtime_ns} {found.st_size}".encode())
        except FileNotFoundError:
            digest.update(f"\0{spec.id} -".encode())
    return digest.hexdigest()


def read_stamp(folder: Path, key: str) -> list[Path] | None:
    """The files that were written under this key; None if anything has changed since or is gone."""
    try:
        table = json.loads((folder / STAMP_FILE).read_text())
        files = [folder / name for name in table["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files if table.get("key") == key and all(file.is_file() for file in files) else None


def write_stamp(folder: Path, key: str, files: list[Path]) -> None:
    write_json(folder / STAMP_FILE, {"key": key, "files": [str(file.relative_to(folder)) for file in files]})


def find_sweeps(store: Store, name: str | None) -> list[Sweep]:
    """The sweep in the file `name`, or called so in the results; every sweep of the results if None."""
    found = {file.parent.name: file for file in sorted(store.root.glob("*/sweep.toml"))}
    if name is not None and Path(name).is_file():
        return [read_sweep(Path(name))]
    if name is not None:
        if name not in found:
            raise InputError(f"SWEEP = {name}: {unknown('sweep', name, list(found))}, or the path of a sweep file")
        return [read_sweep(found[name], name)]
    if not found:
        raise InputError(f"{store.root}: holds no sweep; `lorabench run SWEEP --results {store.root}` makes one")
    return [read_sweep(file, sweep) for sweep, file in found.items()]
