"""A run's own process: the fork server that it comes from, and the first function that it executes.

Processes are forked from a server that has imported torch, transformers and PEFT but has done nothing with them,
so a run starts in milliseconds and shares nothing with the run before it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lorabench.launch.exit_status import Ending, crash_line
from lorabench.launch.packs import Asked
from lorabench.processes import forks
from lorabench.processes.distributed import Place, RankFailed, Sharding, log_name
from lorabench.processes.forks import Forked, Server, redirect, when_parent_ends
from lorabench.spec.run_spec import RunSpec
from lorabench.store.store import Store

PRELOAD = ("lorabench.launch.preload", "lorabench.launch.warm")
"""Imports of the fork server; none may start a thread or a CUDA context, which would not survive the fork."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is told about where it runs; nothing here changes its numbers."""

    device: str = "auto"
    checkpoint_seconds: float = 60
    timeout_seconds: float | None = None
    job: str | None = None
    """The cluster's id of the job that the run is computed in."""
    waiting: int | None = None
    """Runs that are still to be begun after this one."""
    place: Place = field(default_factory=Place)
    """Among the processes that compute the run together."""
    sharding: Sharding = "auto"
    live: str | None = None
    """The tool that shows its curves while it trains."""


Target = Callable[[RunSpec, Store, Settings], Any]


def execute_together(specs: Sequence[RunSpec], store: Store, settings: Settings) -> None:
    """Of runs in one pack, in a process of theirs."""
    from lorabench.training.execute import Options, execute_pack

    execute_pack(specs, store, Options(**vars(settings)))


def execute_run(spec: RunSpec, store: Store, settings: Settings) -> Any:
    """The default target, in the run's own process: the only place here that touches torch."""
    from lorabench.training.execute import Options, execute

    return execute(spec, store, Options(**vars(settings)))


WARM_VARIABLE = "LORABENCH_WARM"
"""Holds the specs that the fork server warms up for, as JSON."""
ALONE_VARIABLE = "LORABENCH_ALONE"
"""Tells `lorabench.launch.preload` that no process of these is one of several that compute a run together."""


def warm_specs(specs: Sequence[RunSpec]) -> str:
    """One spec for each model, task and method of a sweep, at most eight, as JSON."""
    distinct = {
        (spec.model, spec.revision, spec.stages, spec.seq_len, spec.objective.writes, spec.method.name): spec
        for spec in specs
    }
    return json.dumps([spec.to_json() for spec in list(distinct.values())[:8]])


def start_server(
    log: Path, preload: tuple[str, ...] = PRELOAD, specs: Sequence[RunSpec] = (), *, alone: bool = False
) -> Server:
    """The fork server, warmed up for these specs; see `lorabench.processes.forks`."""
    environment = {WARM_VARIABLE: warm_specs(specs)} | ({ALONE_VARIABLE: "1"} if alone else {})
    return forks.start_server(log, preload, environment, "alone" if alone else "")


@dataclass(kw_only=True)
class RankProcess:
    """A process of a run, one of several or the only one, as the one that has started it sees it."""

    process: Forked
    rank: int
    log: Path
    answer: Connection | None
    """On which a rank reports why it failed."""
    stopped: bool = False

    @classmethod
    def start(
        cls,
        server: Server,
        target: Target,
        specs: Sequence[RunSpec],
        store: Store,
        settings: Settings,
        gpu: str | None,
    ) -> RankProcess:
        """Of a run, or of the runs in a pack, whose first has the log. Raises ServerDied."""
        rank, log = settings.place.rank, store.folder(specs[0].id) / log_name(settings.place.rank)
        here, there = server.context.Pipe(duplex=False) if settings.place.size > 1 else (None, None)
        arguments = (target, specs, str(store.root.absolute()), settings, gpu, there)
        process = Forked(server.start(child_main, arguments, tries=1))
        if there is not None:
            there.close()
        return cls(process=process, rank=rank, log=log, answer=here)

    @property
    def exitcode(self) -> int | None:
        return self.process.exitcode

    @property
    def was_killed(self) -> bool:
        """By SIGKILL, as far as is known, and not by who had started it."""
        return not self.stopped and (self.exitcode == -signal.SIGKILL or self.process.is_orphan)

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def terminate(self, cause: int) -> None:
        """Ask it to stop. `cause`, the signal that its launcher was given, is blocked there, and is what it tells."""
        for number in dict.fromkeys((cause, signal.SIGTERM)):
            self.process.send(number)

    def kill(self) -> None:
        self.process.send(signal.SIGKILL)

    def stop(self) -> None:
        """Kill it, for another rank has ended."""
        if self.is_alive():
            self.stopped = True
            self.kill()

    def ending(self, out_of_memory: bool, server_log: Path) -> Ending:
        """How it ended. Once: it is closed."""
        failure = None
        if self.answer is not None:
            with contextlib.suppress(EOFError, OSError):  # OSError: it was killed while it told
                failure = self.answer.recv()
            self.answer.close()
        lines = filter(None, map(crash_line, (self.log, server_log)))
        return Ending(
            code=self.process.exitcode,
            rank=self.rank,
            stopped=self.stopped,
            orphaned=self.process.is_orphan,
            out_of_memory=out_of_memory,
            failure=failure,
            last_line=next(lines, ""),
        )


def child_main(
    target: Target, specs: Sequence[RunSpec], root: str, settings: Settings, gpu: str | None, answer: Connection | None
) -> None:
    """The first function of a run's process, or of a pack's. A rank that fails sends what it failed of to `answer`."""
    gc.freeze()  # what the server has imported is no garbage, and is not to be looked through again and again
    store = Store(Path(root))
    redirect(store.folder(specs[0].id) / log_name(settings.place.rank), 1, 2)
    faulthandler.enable(all_threads=False)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_stop_with_parent, daemon=True, name="watch parent").start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        if len(specs) > 1:
            execute_together(specs, store, settings)
        else:
            target(specs[0], store, settings)
    except RankFailed as failed:
        if answer is None:
            raise
        answer.send((failed.status, str(failed), failed.by_peer))
        sys.stdout.flush()
        os._exit(1)  # at a regular exit, what waits for an answer of the other ranks would be waited for
    sys.stdout.flush()


@dataclass(frozen=True, kw_only=True)
class Check:
    """What there is to find out of runs before any is begun."""

    specs: Sequence[RunSpec]
    done: Sequence[tuple[str, dict[str, str]]]
    """What the runs that are done had for data, as `lorabench.data.fingerprints.named` gives it."""
    refuse: bool = True
    """Whether to look for what is wrong of them, and not for packs alone."""
    asked: Asked | None = None
    """How they are to be packed (None: not at all)."""


def check_main(check: Check, answer: Connection, log: Path) -> None:
    """Sends why some of the specs cannot be run, what else there is to say, and with whom each can be computed, as
    `lorabench.launch.plan.rides` has it; in a process of its own."""
    from lorabench.data.fingerprints import changed
    from lorabench.launch.plan import notes, refusals, rides
    from lorabench.training.data_check import data_now

    redirect(log, 1, 2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        specs, said = check.specs, []
        if check.refuse:
            if problems := refusals(specs):
                answer.send((problems, [], {}))
                return
            said = [*notes(specs), *changed([*check.done, *((spec.id, data_now(spec)) for spec in specs)])]
        known, reasons = rides(specs, check.asked) if check.asked else ({}, [])
        answer.send(([], [*said, *reasons], known))
    except Exception:  # whatever is wrong, the runs meet it and say so in their records
        traceback.print_exc()
        answer.send(([], [], {}))


def _stop_with_parent() -> None:
    """Ask the run to write its checkpoint and stop as soon as the launcher is gone, however it went."""

    def stop() -> None:
        for number in (signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)

    when_parent_ends(stop)
