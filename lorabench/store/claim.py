"""Who works on a run: claims that two workers can never both hold, also on NFS.

A claim is a numbered file, `claims/0001.json`, created exclusively (O_EXCL, which NFS honours). The highest number
is the owner. A dead owner's cell is taken by creating the next number, which again only one can do; no claim is ever
deleted, so there is no moment without an owner, and the numbers count the attempts. They go on where a damaged run was
set aside and is made anew.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import socket
import threading
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.durable import make_folder, sync
from lorabench.config.json_file import again, fit, read
from lorabench.processes.machine import process_start

BEAT_SECONDS = 2.0
STALE_SECONDS = 90.0
"""An owner on another machine that has not been heard of for so long is taken for dead."""
LEAD_SECONDS = 60.0
"""How long a comparison of our clock with a file server's holds."""
STEP_SECONDS = 1.0
"""Between two looks our clock and the monotonic one differ by less, unless ours was set meanwhile."""
LOOK_AGAIN_SECONDS = 3 * BEAT_SECONDS
"""How long a claim that seems dead by its age alone must have stood still before another takes its run."""
_LEADS: dict[int, _Lead] = {}
"""By device, of the latest comparison."""
_STILL: dict[Path, tuple[int, float]] = {}
"""Claim file -> its date, as first seen, in ns by the clock that dates it; and when that was, monotonic."""
MAX_BYTES = 2**20
"""Of a claim's file."""
SHELF = ".corrupt"
"""Beside the runs' folders; in it are those that were set aside, `RUN.1`, `RUN.2`, …"""
PROGRESS: dict[str, Any] = {
    "phase": str,
    "step": int,
    "steps": int,
    "loss": float,
    "tokens_per_second": float,
    "images_per_second": float,
    "step_seconds_median": float,
    "evaluate_seconds": float,
    "waiting": int,
    "done": int,
    "of": int,
    "job": str,
    "packed": int,
}
"""What a claim may tell of its run, and the type of each."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a claim file says. `progress` is `{"phase", "step", "steps", "tokens_per_second"}` as far as known."""

    number: int
    host: str
    machine: str
    """Boot id and pid namespace: where it is ours too, the pid can be looked up."""
    pid: int
    process_start: str | None
    time: float
    """Unix time of the last heartbeat; of another machine's by our clock, from the age of its file."""
    released: bool = False
    progress: dict[str, Any] = field(default_factory=dict)

    def is_alive(self) -> bool:
        if self.released:
            return False
        if self.machine == _machine():
            return process_start(self.pid) == self.process_start is not None
        return time.time() - self.time < STALE_SECONDS


@dataclass(frozen=True, kw_only=True)
class _Lead:
    """By how much our clock is ahead of the one that dates the files of a device."""

    seconds: float
    measured: float
    """Monotonic time."""
    offset: float
    """Of our clock from the monotonic one, then."""

    def holds(self, date: float) -> bool:
        """Not for long; nor where our clock was set since, or the machine has slept; least where a file looks old."""
        now = time.monotonic()
        looks_old = time.time() - date - self.seconds >= STALE_SECONDS
        seconds = BEAT_SECONDS if looks_old else LEAD_SECONDS
        return now < self.measured + seconds and abs(time.time() - now - self.offset) < STEP_SECONDS


class Lost(Exception):
    """Another worker has taken this run over: this one was taken for dead and must write nothing more."""


class Hold:
    """A claim that this process holds; a thread keeps its heartbeat. Use as a context manager."""

    def __init__(self, folder: Path, claim: Claim):
        self._file = folder / "claims" / f"{claim.number:04d}.json"
        self._claim = claim
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self.number = claim.number
        self.progress: dict[str, Any] = dict(claim.progress)

    def __enter__(self) -> Hold:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the claim go; at the end of the context nothing is left to do then."""
        if not self._done.is_set():
            self._done.set()
            self._thread.join()
            with contextlib.suppress(OSError):
                self._write(released=True)

    def check(self) -> None:
        """Raises Lost if another worker has taken over."""
        if (self._file.parent / f"{self.number + 1:04d}.json").exists():
            raise Lost(f"{self._file.parent.parent.name}: another worker has taken this run over")

    def _beat(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk must not end the run: the next beat tries again
                self._write(released=False)

    def _write(self, released: bool) -> None:
        table = vars(self._claim) | {"time": time.time(), "released": released, "progress": dict(self.progress)}
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps(table))
        os.replace(temporary, self._file)


class Followed(Hold):
    """What the other ranks of a run go by: the first one holds the claim for all of them."""

    def __init__(self) -> None:
        self.number = 0
        self.progress = {}

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(self) -> None:
        pass


def current_claim(folder: Path) -> Claim | None:
    """The newest claim on the run in `folder`, dead or alive; of one that cannot be read only its age is known."""
    try:
        numbers = again(lambda: _numbers(folder))
    except OSError:  # another's folder: each heartbeat changes it
        return _unread(0, folder / "claims", otherwise=0.0)
    return _read(folder, numbers[-1]) if numbers else None


def take(folder: Path, progress: dict[str, Any] | None = None) -> Hold | None:
    """Claim the run in `folder`; None if a live worker holds it or another was faster.

    Of a worker on another machine only the age of its heartbeat is known, and the clock that dates it may just have
    been set. So its claim is taken over only where no heartbeat comes for some seconds more.
    """
    newest = current_claim(folder)
    if newest and (newest.is_alive() or _beats(folder, newest)):
        return None
    claim = Claim(
        number=last_number(folder, newest) + 1,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        process_start=process_start(os.getpid()),
        time=time.time(),
        progress=progress or {},
    )
    make_folder(folder / "claims")
    file = folder / "claims" / f"{claim.number:04d}.json"
    try:
        with open(file, "x") as handle:
            handle.write(json.dumps(vars(claim)))
            handle.flush()
            os.fsync(handle.fileno())
        sync(file.parent)
    except FileExistsError:
        return None
    except OSError:  # a full disk: an empty claim would look like a worker that has just begun
        with contextlib.suppress(OSError):
            file.unlink()
        raise
    return Hold(folder, claim)


def last_number(folder: Path, newest: Claim | None) -> int:
    """Of the `newest` claim on the run, or of those that were set aside with it before; 0 where there was none."""
    if newest:
        return newest.number
    aside = (folder.parent / SHELF).glob(f"{glob.escape(folder.name)}.*")
    return max((number for old in aside for number in _numbers(old)), default=0)


def _numbers(folder: Path) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(
            int(name[:-5]) for name in os.listdir(folder / "claims") if re.fullmatch(r"[0-9]{4,9}\.json", name)
        )
    return []


def _read(folder: Path, number: int) -> Claim | None:
    """None where the run's folder was taken away meanwhile."""
    file = folder / "claims" / f"{number:04d}.json"
    try:
        claim = read(Claim, file, MAX_BYTES)
        if claim is None:
            return None
        claim = replace(claim, number=number, progress=_typed(claim.progress))
        if claim.released or claim.machine == _machine():
            return claim
        return replace(claim, time=_heard(file, otherwise=claim.time))
    except InputError:
        # Created but not yet written, damaged, or not for us to read: alive as long as the file is fresh.
        return _unread(number, file, otherwise=time.time())


def _typed(progress: dict[str, Any]) -> dict[str, Any]:
    """Without what is of another type than readers take it for: it tells nothing."""
    kept = {}
    for key, value in progress.items():
        with contextlib.suppress(InputError):
            kept[key] = fit(PROGRESS.get(key, Any), value, key)
    return kept


def _unread(number: int, file: Path, otherwise: float) -> Claim:
    """A claim of which only the age is known, or not even that."""
    heard = _heard(file, otherwise)
    return Claim(number=number, host="?", machine="?", pid=0, process_start=None, time=heard)


def _heard(file: Path, otherwise: float) -> float:
    """When a file was last written, by our own clock, whatever those of its writer and of the file server say."""
    try:
        found = file.stat()
    except OSError:
        return otherwise
    if found.st_mtime_ns != _STILL.get(file, (0, 0.0))[0]:
        _STILL[file] = found.st_mtime_ns, time.monotonic()
    lead = _LEADS.get(found.st_dev)
    if lead is None or not lead.holds(found.st_mtime):
        lead = _LEADS[found.st_dev] = _compare(file if file.is_dir() else file.parent)
    return found.st_mtime + lead.seconds


def _beats(folder: Path, claim: Claim) -> bool:
    """Whether a claim that seems dead is written to while we look; it may be that we need not look any more."""
    file = folder / "claims" / f"{claim.number:04d}.json"
    if claim.released or claim.machine == _machine() or file not in _STILL:
        return False
    date, since = _STILL[file]
    time.sleep(max(0.0, since + LOOK_AGAIN_SECONDS - time.monotonic()))
    _compare(file.parent)  # by which a file server's client looks anew, too
    with contextlib.suppress(OSError):
        return file.stat().st_mtime_ns != date
    return False


def _compare(folder: Path) -> _Lead:
    """Our clock with the one that dates the files in `folder`; no lead where we can make none there."""
    seconds = _lead(folder)
    now = time.monotonic()
    return _Lead(seconds=seconds, measured=now, offset=time.time() - now)


def _lead(folder: Path) -> float:
    probe = folder / f".clock.{socket.gethostname()}.{os.getpid()}"
    try:
        probe.write_text("x")
        lead = time.time() - probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return 0.0
    return lead


@cache
def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}" if boot.exists() else socket.gethostname()
