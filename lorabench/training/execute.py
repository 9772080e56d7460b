"""One run as a worker sees it: claimed, carried out, and recorded; whatever happens, with a true status."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
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
from lorabench.training.run import Attempt, run
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
    known = {"job": options.job, "waiting": options.waiting}
    progress = {key: value for key, value in known.items() if value is not None}
    hold = store.claim(spec, progress) if place.rank == 0 else Followed()
    word = broadcast(place, meeting, lambda: str(Status.MISSING if isinstance(hold, Hold) else hold))
    if not isinstance(hold, Hold) or word != Status.MISSING:
        return Status(word)
    with hold, _log(log_file, options.log_to_file):
        _look_at_new_garbage_alone()
        return _attempt(spec, store, options, hold, meeting)


def _attempt(spec: RunSpec, store: Store, options: Options, hold: Hold, meeting: Any) -> Status:
    """Carry the run out, and write its record with what became of it."""
    place = options.place
    record = store.begin(spec, hold)
    deadline = time.monotonic() + options.timeout_seconds if options.timeout_seconds else None
    stop = Stop(deadline=deadline, marker=store.cancel_marker(spec.id))
    try:
        with stop_on_signals(stop):
            device = use_device(options.device, place)
            with joined(place, meeting, device) as stop.world:
                run(
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
                    )
                )
        record.status = Status.DONE
    except Lost:
        raise  # the run is another worker's now: leave its record alone
    except Exception as error:
        record.status, record.error = _what_became(error, options)
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
