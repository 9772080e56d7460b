"""Whether a sweep's tables and figures are up to date, told without loading torch or pandas, or expanding the sweep."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lorabench.config import json_file
from lorabench.config.decode import InputError
from lorabench.config.durable import write_json
from lorabench.config.plugins import unknown
from lorabench.config.quote import clip, show_path
from lorabench.spec.sweep import Sweep, read_sweep
from lorabench.store.store import KEPT, Store
from lorabench.training.environment import source_digest

STAMP_FILE = ".analyze.json"


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What was written of a sweep, and of what."""

    key: str
    files: list[str]
    runs: list[str]


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A sweep that is not read yet: thousands of runs take seconds to expand."""

    file: Path
    default_name: str | None = None

    def read(self) -> Sweep:
        """To look at what it has run. Raises InputError with all problems of the file."""
        return read_sweep(self.file, self.default_name, stored=True)

    def up_to_date(self, store: Store) -> list[Path] | None:
        """The files that were written of this sweep; None if anything has changed since or is gone."""
        try:
            text = self.file.read_text("utf-8")
            name = tomllib.loads(text).get("name", self.default_name or self.file.stem)
            folder = json_file.below(store.root, str(name))
            stamp = json_file.read(Stamp, folder / STAMP_FILE)
            if stamp is None or stamp.key != analysis_key(store, text, stamp.runs):
                return None
            files = [json_file.below(folder, name) for name in stamp.files]
        except (OSError, ValueError, InputError):
            return None
        return files if all(file.is_file() for file in files) else None


def analysis_key(store: Store, text: str, run_ids: Iterable[str]) -> str:
    """Hash of all that the output depends on: the sweep's text, lorabench's own source, each run's record, and what was
    asked of finished adapters.

    InputError where an id is no name of a run's folder.
    """
    digest = hashlib.sha256(f"{source_digest()} {text}".encode())
    names = []
    for run_id in run_ids:
        json_file.check_name(run_id)
        names.append(f"runs/{run_id}/record.json")
    names += [
        str(file.relative_to(store.root)) for kind in KEPT for file in sorted(store.root.glob(f"{kind}/*/record.json"))
    ]
    for name in names:
        try:
            found = (store.root / name).stat()
            digest.update(f"\0{name} {found.st_mtime_ns} {found.st_size}".encode())
        except OSError:
            digest.update(f"\0{name} -".encode())
    return digest.hexdigest()


def write_stamp(store: Store, sweep: Sweep, key: str, files: list[Path]) -> None:
    """Say that these files were written of the sweep as it was when it had this key."""
    folder = store.root / sweep.name
    names = [str(file.relative_to(folder)) for file in files]
    stamp = Stamp(key=key, files=names, runs=[spec.id for spec in sweep.runs])
    write_json(folder / STAMP_FILE, asdict(stamp))


def remove_stamp(store: Store, sweep: Sweep) -> None:
    (store.root / sweep.name / STAMP_FILE).unlink(missing_ok=True)


def find_sweeps(store: Store, name: str | None) -> list[SweepFile]:
    """The sweep in the file `name`, or called so in the results; every sweep of the results if None."""
    found = {file.parent.name: file for file in sorted(store.root.glob("*/sweep.toml"))}
    if name is not None and os.path.isfile(name):
        return [SweepFile(file=Path(name))]
    if name is not None:
        if name not in found:
            raise InputError(
                f"SWEEP = {clip(name)}: {unknown('sweep', name, list(found))}, or the path of a sweep file"
            )
        return [SweepFile(file=found[name], default_name=name)]
    if not found:
        root = show_path(store.root)
        raise InputError(f"{root}: holds no sweep; `lorabench run SWEEP --results {root}` makes one")
    return [SweepFile(file=file, default_name=sweep) for sweep, file in found.items()]
