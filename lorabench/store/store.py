"""The store that all sweeps share, and how each of its runs stands.

    results/runs/<run_id>/  spec.json  record.json  steps.jsonl  updates/  snapshots/  log.txt  claims/  checkpoint/

Of a run on several processes, log.1.txt, log.2.txt, … are those of the further ones.
Everything is written whole or not at all (temporary file, fsync, rename), so a reader never sees half a record.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.digests import READ_SUFFIXES, check_files, check_listing, check_whole
from lorabench.config.durable import write_json
from lorabench.config.json_file import Unreadable, fit, read_json
from lorabench.config.quote import clip
from lorabench.spec.run_spec import RunSpec, spec_id
from lorabench.store import claim as claims
from lorabench.store.claim import SHELF, Claim, Followed, Hold, current_claim
from lorabench.store.record import RunRecord, Status, now

KEPT = ("merges", "compressions", "interventions", "usefulness", "paths")
"""Folders beside `runs` of what was asked of finished adapters, each result in `<id>/record.json`."""
CANCEL_MARKER = "cancel"
_ID = re.compile("-[0-9a-f]{12}$")
"""How a run's id ends."""
WAY_OUT = "`run SWEEP --retry corrupt` makes the run again"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run as a reader sees it now: the record joined with its worker's claim."""

    run_id: str
    status: Status
    spec: dict[str, Any]
    record: RunRecord | None = None
    claim: Claim | None = None
    error: str | None = None
    unread: bool = False
    """Whether what the run holds could not be read: nothing is known of it, and nothing may be written over."""


class Store:
    """The runs below one results folder."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def folder(self, run_id: str) -> Path:
        return self.root / "runs" / run_id

    def named(self, text: str) -> str:
        """The id of the run whose folder here this is the path of, as a shell completes it; else the text as it is."""
        path = Path(os.path.expanduser(text))
        is_path = os.sep in text and os.path.realpath(path.parent) == os.path.realpath(self.root / "runs")
        return path.name if is_path else text

    def cancel_marker(self, run_id: str) -> Path:
        """A file that `lorabench cancel` makes: a worker neither begins the run nor takes it past its next step.

        Whoever asks for the run again, with `run` or `submit`, takes it away.
        """
        return self.folder(run_id) / CANCEL_MARKER

    def uncancel(self, run_id: str) -> None:
        """Take the marker away, if there is one."""
        if os.path.lexists(self.cancel_marker(run_id)):
            with contextlib.suppress(FileNotFoundError):
                self.cancel_marker(run_id).unlink()

    def run_ids(self) -> list[str]:
        """Every run that has a folder, or something else in its place, sorted."""
        runs = self.root / "runs"
        if not runs.is_dir():
            return []
        found = [entry for entry in os.scandir(runs) if entry.name[0] != "."]
        return sorted(entry.name for entry in found if os.path.isdir(entry) or _ID.search(entry.name))

    def write_spec(self, spec: RunSpec) -> None:
        file = self.folder(spec.id) / "spec.json"
        if not file.exists():
            write_json(file, spec.to_json())

    def claim(self, spec: RunSpec, progress: dict[str, Any] | None = None) -> Hold | Status:
        """This process's claim on the run, or how that stands where there is nothing to do: done, or running elsewhere.

        InputError where what the run holds cannot be read: it may be whole, and nothing is written over it.
        """
        self.write_spec(spec)
        if self.state(spec.id).status == Status.DONE:
            return Status.DONE
        hold = claims.take(self.folder(spec.id), {"step": 0, "steps": spec.total_steps} | (progress or {}))
        if hold is None:
            return Status.RUNNING
        state = self.state(spec.id)
        if state.status != Status.DONE and not state.unread:
            return hold
        with hold:  # finished between the look and the claim
            if state.unread:
                raise InputError(state.error or "")
            return Status.DONE

    def begin(self, spec: RunSpec, hold: Hold) -> RunRecord:
        """The record of a run that begins now, written where this process has the claim itself."""
        record = RunRecord.begun(spec, attempts=hold.number)
        if not isinstance(hold, Followed):
            self.write(record)
        return record

    def end(self, record: RunRecord, status: Status, hold: Hold, **notes: str) -> None:
        """Write the record as that of a run that ends now, with more in its provenance; Lost where another worker has
        taken the run over."""
        hold.check()
        self.write(replace(record, status=status, finished=now(), provenance=record.provenance | notes))

    def write(self, record: RunRecord) -> None:
        write_json(self.folder(record.run_id) / "record.json", record.to_json())

    def read(self, run_id: str) -> RunRecord | None:
        """The record; None if there is none yet. InputError if it is cut short or not this run's."""
        file = self.folder(run_id) / "record.json"
        table = read_json(file)
        if table is None:
            return None
        try:
            record = RunRecord.from_json(table)
        except InputError as error:
            raise InputError(error.problems, str(file)) from None
        if record.run_id != run_id:
            raise InputError(f"{file}: run_id = {clip(record.run_id)}: is the record of another run")
        return record

    def read_spec(self, run_id: str) -> RunSpec:
        """The spec. InputError if it is missing, invalid, or its hash is not the run's id."""
        file = self.folder(run_id) / "spec.json"
        table = self._spec_table(run_id)
        if table is None:
            raise InputError(f"{file}: no such file")
        try:
            return RunSpec.from_json(table)
        except InputError as error:
            raise InputError(error.problems, str(file)) from None

    def _spec_table(self, run_id: str) -> dict[str, Any] | None:
        """The spec as it is on disk, its hash checked but not decoded: quick, and older versions' specs pass."""
        file = self.folder(run_id) / "spec.json"
        table = read_json(file)
        if table is None:
            return None
        _check_spec(table, run_id, str(file))
        return table

    def state(self, run_id: str, spec: RunSpec | None = None) -> RunState:
        """How the run stands now; never raises for a damaged run, which is `corrupt` with its reason.

        One that merely cannot be read may be whole: it has `failed` for this look.
        """
        table: dict[str, Any] = {}
        folder = self.folder(run_id)
        for place in (folder, folder / "claims"):
            if _is_no_folder(place):
                error = f"{place}: is no folder"
                return RunState(run_id=run_id, status=Status.CORRUPT, spec=spec.to_json() if spec else {}, error=error)
        claim = current_claim(folder)
        alive = claim is not None and claim.is_alive()
        try:
            table = self._spec_table(run_id) or (spec.to_json() if spec else {})
            record = self.read(run_id)
            if record and (not table or record.spec != table):
                _check_spec(record.spec, run_id, f"{self.folder(run_id) / 'record.json'}: its spec is not the run's")
        except InputError as error:
            unread = isinstance(error, Unreadable)
            dead = Status.FAILED if unread else Status.CORRUPT
            return RunState(
                run_id=run_id,
                status=Status.RUNNING if alive else dead,  # a live worker writes its record anew
                spec=table or (spec.to_json() if spec else {}),
                claim=claim,
                error=str(error).splitlines()[0],
                unread=unread,
            )
        if record is None:
            status = Status.RUNNING if alive else Status.INTERRUPTED if claim else Status.MISSING
            return RunState(run_id=run_id, status=status, spec=table, claim=claim)
        status = record.status
        if alive and status != Status.DONE:
            status = Status.RUNNING
        elif status == Status.RUNNING:
            status = Status.INTERRUPTED
        return RunState(
            run_id=run_id, status=status, spec=record.spec, record=record, claim=claim, error=record.error
        )  # fmt: skip

    def done(self, run_id: str, what: str) -> RunRecord:
        """The record of a run that is done. InputError, which begins with `what`, for any other."""
        state = self.state(run_id)
        if state.status == Status.CORRUPT:
            raise InputError(f"{what} = {run_id}: {state.error}; {WAY_OUT}")
        if state.status != Status.DONE or state.record is None:
            raise InputError(f"{what} = {run_id}: is {state.status}, not done")
        return state.record

    def verified(self, state: RunState) -> RunState:
        """The same, but `corrupt` where what the run has left is not what its record tells of. Reads all files."""
        if state.record is None or state.status == Status.RUNNING:
            return state
        try:
            if self._spec_table(state.run_id) is None:
                raise InputError("spec.json: is gone")
            check_whole(self.folder(state.run_id), state.record.digests)
        except InputError as error:
            unread = isinstance(error, Unreadable)
            status = Status.FAILED if unread else Status.CORRUPT
            return replace(state, status=status, error=error.problems[0], unread=unread)
        return state

    def set_aside(self, run_id: str) -> Path:
        """Move a damaged run's folder to `runs/.corrupt/`: the run can be made again, and nothing is lost."""
        shelf = self.root / "runs" / SHELF
        shelf.mkdir(exist_ok=True)
        number = next(n for n in itertools.count(1) if not (shelf / f"{run_id}.{n}").exists())
        return self.folder(run_id).rename(shelf / f"{run_id}.{number}")

    def states(self, specs: list[RunSpec] | None = None) -> Iterator[RunState]:
        """The states of these runs, or of every run in the store."""
        if specs is None:
            yield from (self.state(run_id) for run_id in self.run_ids())
        else:
            yield from (self.state(spec.id, spec) for spec in specs)


def _is_no_folder(path: Path) -> bool:
    """Whether something else stands in its place."""
    try:
        return not stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return path.is_symlink()
    except OSError as error:
        return error.errno in (errno.ELOOP, errno.ENOTDIR)


def _check_spec(table: dict[str, Any], run_id: str, where: str) -> None:
    """InputError if a table is not the spec that gives this id. Not decoded: quick, and older versions' specs pass."""
    try:
        fit(dict[str, Any], table.get("method"), "method")
        for key, hint in _SPEC.items():
            fit(hint, table.get(key), key)
        actual = spec_id(table)
    except (InputError, KeyError, TypeError, ValueError):
        raise InputError(f"{where}: is not the spec of a run") from None
    if actual != run_id:
        raise InputError(f"{where}: its content hashes to {clip(actual)}, but the folder is {run_id}: it was edited")


_SPEC: dict[str, Any] = {
    **dict.fromkeys(("steps", "seed"), int | None),
    "lr": float | None,
    "model": str | None,
    "task": dict[str, Any] | None,
    "tasks": list[dict[str, Any]] | None,
}
"""What is read of a spec that is not decoded."""


def check_updates(folder: Path, record: RunRecord, run: str, part: str = "updates") -> None:
    """InputError, which begins with `run`, where what the run has learned is not what it was when it ended.

    Of `part`, what was learned or one snapshot, the files that readers look into.
    """
    files = {path: digest for path, digest in record.files.items() if path.startswith(f"{part}/")}
    try:
        if not files:
            raise InputError("it has none")
        check_listing(folder, files)
        check_files(folder, {path: digest for path, digest in files.items() if path.endswith(READ_SUFFIXES)})
    except Unreadable as error:  # it may be whole
        raise InputError(f"{run}: {error}") from None
    except InputError as error:
        raise InputError(f"{run}: its files are not those that its record describes: {error}; {WAY_OUT}") from None


def check_run(source: str | Path) -> None:
    """InputError where a path is what a run of some store has learned, and not what it was when the run ended.

    Of a run that has not, and so has no digests, nothing is known.
    """
    path = Path(os.path.realpath(os.path.expanduser(source)))  # Path.resolve raises where a link leads to itself
    folder = next((each for each in (path, *path.parents[:3]) if _is_run(each)), None)
    if folder is None:
        return
    state = Store(folder.parents[1]).state(folder.name)
    if state.status == Status.CORRUPT:
        raise InputError(f"{source}: {state.error}; {WAY_OUT}")
    top, *inner = path.relative_to(folder).parts or ("updates",)
    part = {"updates": "updates", "snapshots": "/".join(("snapshots", *inner[:1]))}.get(top)
    if part is None or state.status != Status.DONE or state.record is None:
        return
    if (folder / part).exists() or any(name.startswith(f"{part}/") for name in state.record.files):
        check_updates(folder, state.record, str(source), part)


def _is_run(folder: Path) -> bool:
    return folder.parent.name == "runs" and any((folder / name).is_file() for name in ("spec.json", "record.json"))
