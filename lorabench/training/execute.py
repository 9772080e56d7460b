"""One run as a worker sees it: claimed, carried out, and recorded; whatever happens, with a true status."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorabench.config.decode import InputError
from lorabench.config.quote import message
from lorabench.processes.distributed import (
    Place,
    RankFailed,
    Sharding,
    broadcast,
    is_peer_loss,
    joined,
    log_name,
    rendezvous,
    use_device,
)
from lorabench.spec.run_spec import RunSpec
from lorabench.store.claim import Followed, Hold, Lost
from lorabench.store.export import open_live
from lorabench.store.record import Status, now
from lorabench.store.store import Store
from lorabench.training.base import Base, SharedBase
from lorabench.training.packed.meter import Clock, SharedMeter, Shares
from lorabench.training.packed.pack import Pack, Seat
from lorabench.training.run import Attempt, Company, run
from lorabench.training.step import Own, Pass, alone
from lorabench.training.stop import Diverged, Stop, Stopped, stop_on_signals


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how a run is executed: never what is computed."""

    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:1`."""
    checkpoint_seconds: float = 60.0
    timeout_seconds: float | None = None
    """End with status `timeout` after so long; the checkpoint stays."""
    job: str | None = None
    """The cluster's id of the job; it stands in the claim."""
    waiting: int | None = None
    """Runs that its launcher has still to begin; it stands in the claim."""
    log_to_file: bool = True
    """Send stdout and stderr to the run's log.txt."""
    place: Place = field(default_factory=Place)
    """Among the processes that compute the run together; each of them calls `execute`."""
    sharding: Sharding = "auto"
    live: str | None = None
    """The tool that shows the run's curves while it trains; see `lorabench.store.export`."""


def execute(spec: RunSpec, store: Store, options: Options) -> Status:
    """One run in this process, or this process's part of it. Its final status; `running` if another worker has it.

    Of several ranks the first one claims the run and writes its record. RankFailed on each of them where one has
    failed: whoever has started them knows of all, and says in the record what it was.
    """
    place, log, meeting = options.place, log_name(options.place.rank), rendezvous(options.place)
    log_file = store.folder(spec.id) / log
    hold = _claim(spec, store, options) if place.rank == 0 else Followed()
    word = broadcast(place, meeting, lambda: str(Status.MISSING if isinstance(hold, Hold) else hold))
    if not isinstance(hold, Hold) or word != Status.MISSING:
        return Status(word)
    stop = _stop(spec, store, options.timeout_seconds)
    with hold, _log(log_file, options.log_to_file), stop_on_signals(stop):
        _look_at_new_garbage_alone()
        return alone(_attempt(spec, store, options, hold, stop, meeting=meeting))


def execute_pack(specs: Sequence[RunSpec], store: Store, options: Options) -> list[Status]:
    """`execute` of several runs that can share their passes (`lorabench.launch.packs`), in one process together.

    Each is claimed, and ends with a record of its own. What is printed goes to the log of the first one.
    """
    found = [_claim(spec, store, options) for spec in specs]
    claimed = [(spec, hold) for spec, hold in zip(specs, found, strict=True) if isinstance(hold, Hold)]
    seconds = options.timeout_seconds * len(claimed) if options.timeout_seconds else None  # each has its share of it
    mine = [(spec, hold, _stop(spec, store, seconds)) for spec, hold in claimed]
    for spec, _ in claimed[1:] if options.log_to_file else ():
        _say(store, spec, f"in a pack with {claimed[0][0].id}, whose log has what is printed")
    log = store.folder((claimed[0][0] if claimed else specs[0]).id) / log_name(0)
    stopping = stop_on_signals(*(stop for _, _, stop in mine))
    with _log(log, bool(mine) and options.log_to_file), stopping, contextlib.ExitStack() as held:
        for _, hold, _ in mine:
            held.enter_context(hold)  # it beats from now on, while others are begun
        _look_at_new_garbage_alone()
        ended = iter(_carry_out(mine, store, options))
    return [next(ended) if isinstance(hold, Hold) else hold for hold in found]


def _carry_out(mine: Sequence[tuple[RunSpec, Hold, Stop]], store: Store, options: Options) -> list[Status]:
    """Compute the runs that this process has claimed; their final statuses."""
    if len(mine) < 2:
        return [alone(_held(_attempt(spec, store, options, hold, stop), hold)) for spec, hold, stop in mine]
    device = use_device(options.device, options.place)
    shares = Shares(device, len(mine))
    pack = Pack(shares, options.checkpoint_seconds, [stop for _, _, stop in mine])
    opened: list[SharedBase] = []

    def base(spec: RunSpec) -> Base:
        if not opened:
            opened.append(SharedBase.open(spec, device, shares.whole))
        return opened[0].of(spec)

    seats = []
    for spec, hold, stop in mine:
        clock = Clock()
        meter = SharedMeter(device, spec.total_steps, shares, clock)
        company = Company(size=len(mine), base=base, meter=meter, due=lambda: pack.is_due)
        seats.append(Seat(_held(_attempt(spec, store, options, hold, stop, company=company), hold), clock, device))
    return pack.carry_out(seats)


def _held(attempt: Generator[Pass | Own, Any, Status], hold: Hold) -> Generator[Pass | Own, Any, Status]:
    """The claim is let go when the run has ended, whatever the others do."""
    try:
        return (yield from attempt)
    except Lost:
        traceback.print_exc()
        return Status.RUNNING
    finally:
        hold.release()


def _claim(spec: RunSpec, store: Store, options: Options) -> Hold | Status:
    known = {"job": options.job, "waiting": options.waiting}
    return store.claim(spec, {key: value for key, value in known.items() if value is not None})


def _stop(spec: RunSpec, store: Store, seconds: float | None) -> Stop:
    return Stop(deadline=time.monotonic() + seconds if seconds else None, marker=store.cancel_marker(spec.id))


def _attempt(
    spec: RunSpec,
    store: Store,
    options: Options,
    hold: Hold,
    stop: Stop,
    *,
    meeting: Any = None,
    company: Company | None = None,
) -> Generator[Pass | Own, Any, Status]:
    """Carry the run out, and write its record with what became of it."""
    place = options.place
    record = store.begin(spec, hold)
    try:
        device = use_device(options.device, place)
        with joined(place, meeting, device) as stop.world:
            yield from run(
                Attempt(
                    spec=spec,
                    store=store,
                    hold=hold,
                    stop=stop,
                    record=record,
                    device=device,
                    place=place,
                    checkpoint_seconds=options.checkpoint_seconds,
                    live=open_live(options.live, store, spec.id) if place.rank == 0 else None,
                    sharding=options.sharding,
                    company=company,
                )
            )
        record.status = Status.DONE
    except Lost:
        raise  # the run is another worker's now: leave its record alone
    except Exception as error:
        record.status, record.error = _what_became(error, options)
        if company and record.status in (Status.OOM, Status.FAILED):
            _say(store, spec, traceback.format_exc())
        if place.size > 1 and not isinstance(error, (Stopped, Diverged)):
            raise RankFailed(record.status, record.error, is_peer_loss(error)) from error
    if place.rank:
        return record.status
    store.end(record, record.status, hold)
    if record.status == Status.DONE:
        shutil.rmtree(store.folder(spec.id) / "checkpoint", ignore_errors=True)
    return record.status


def _what_became(error: Exception, options: Options) -> tuple[Status, str]:
    """Status and error of a run that was ended by an exception; of a failure the traceback goes to the log."""
    if isinstance(error, Stopped):
        if str(error) == "timeout":
            return Status.TIMEOUT, f"stopped after {options.timeout_seconds:g} s; --retry timeout resumes it"
        return Status.CANCELLED, f"stopped by {error}; run again to resume"
    if isinstance(error, Diverged):
        return Status.DIVERGED, str(error)
    traceback.print_exc()
    return Status.OOM if _is_out_of_memory(error) else Status.FAILED, _one_line(error)


def _is_out_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "out of memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def _one_line(error: Exception) -> str:
    if isinstance(error, InputError):
        return message("; ".join(error.problems))
    lines = str(error).strip().splitlines()
    return message(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def _look_at_new_garbage_alone() -> None:
    """What is there before stays out of the collector's sight: half a million objects of the libraries' imports, a
    quarter of a second for each of the meter's collections. For good, as a process that executes a run does little
    else; and without asking whether they are already, which takes a tenth of a short run: they would be counted."""
    gc.collect()
    gc.freeze()


def _say(store: Store, spec: RunSpec, text: str) -> None:
    """In the log of a run that does not have the process's output."""
    with open(store.folder(spec.id) / log_name(0), "a", encoding="utf-8") as handle:
        handle.write(f"--- {now()} pid {os.getpid()}\n{text}\n")


@contextlib.contextmanager
def _log(file: Path, enabled: bool) -> Iterator[None]:
    """Append everything that is printed, by Python or by a library below it, to the run's log."""
    if not enabled:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(file, "a", buffering=1) as handle:
        handle.write(f"--- {now()} pid {os.getpid()}\n")
        handle.flush()
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, number in zip(saved, (1, 2), strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
