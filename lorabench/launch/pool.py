"""Local workers: a sweep's missing runs, each in a fresh process, as many at a time as asked.

What a run computes, and whether it may, is decided in its own process (`lorabench.training.execute`); here it is only
started, watched and, if it dies, accounted for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError
from lorabench.config.plugins import unknown
from lorabench.config.quote import clip, counted, show_path
from lorabench.data.fingerprints import named
from lorabench.launch.exit_status import Ending, common_cause, record_stamp, write_ending
from lorabench.launch.packs import Asked, in_packs, packs_text
from lorabench.launch.worker import (
    PRELOAD,
    Check,
    RankProcess,
    Settings,
    Target,
    check_main,
    execute_run,
    start_server,
)
from lorabench.processes.distributed import Place
from lorabench.processes.forks import Server, ServerDied
from lorabench.processes.machine import count_oom_kills
from lorabench.processes.share import interrupts
from lorabench.spec.run_spec import RunSpec, short, swept_keys
from lorabench.spec.sweep import Sweep
from lorabench.store.claim import current_claim
from lorabench.store.record import FAILURES, Status
from lorabench.store.store import RunState, Store
from lorabench.terminal.text import Display, count_statuses, text_table

if TYPE_CHECKING:
    from lorabench.launch.team import RemoteRank, Team

TICK_SECONDS = 0.2
PEER_GRACE_SECONDS = 10.0
"""Of the other ranks of a run, once one has ended."""
GRACE_SECONDS = 60.0
"""A run that is so long past its time limit does not reach its own check any more, and is killed."""
STARTS_WITHOUT_RECORD = 3
SERVER_DEATHS = 5
"""Fork servers in a row that may die before they have started a process of a run."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REPEATABLE = (*FAILURES, Status.CORRUPT)
"""What `--retry` can name."""


def repeatable(text: str | Iterable[str]) -> frozenset[Status]:
    """What `--retry` names: statuses with commas between them, or one by one. InputError with the choices."""
    given = text.split(",") if isinstance(text, str) else text
    names = [name.strip() for name in given if name.strip()]
    choices = [str(status) for status in REPEATABLE]
    valid = [*choices, "all"]
    wrong = [f"--retry {clip(name)}: {unknown('status', name, valid)}" for name in names if name not in valid]
    if wrong:
        raise InputError(wrong)
    return frozenset(status for status in REPEATABLE if str(status) in names or "all" in names)


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Where and how many. Worker i sees only the GPU `gpus[i % len(gpus)]`; without any, what there is.

    With several processes a run, worker i has as many GPUs, those after the ones of worker i - 1.
    """

    workers: int = 1
    processes: int = 1
    """Of each run, which compute it together."""
    team: Team | None = None
    """Instead: other supervisors, which start a process of each run too."""
    gpus: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    retry: frozenset[Status] = frozenset()
    again: frozenset[str] = frozenset()
    """Runs that are repeated whatever they have ended as."""
    preload: tuple[str, ...] = PRELOAD
    pack: int | None = None
    """Runs of one base at most that share their passes (None: as many as pay; 1: none)."""
    alone: frozenset[str] = frozenset()
    """Runs that are in no pack."""
    check: bool = True
    """Refuse, before anything runs, methods that do not fit their model."""
    patience_seconds: float | None = None
    """How long a run that was told to stop may take over its checkpoint before it is killed (None: any time)."""
    server_log: Path | None = None
    """Where the fork server's output goes (None: `.server.log` beside the runs)."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How each run of the sweep stands, in the sweep's order, and the signal that stopped the launch."""

    states: list[RunState]
    signal: int | None = None
    stopped: tuple[str, ...] = ()
    """Runs that were being computed when the signal came."""
    problem: str | None = None
    """Why not every run could be begun."""

    @property
    def exit_code(self) -> int:
        if self.signal:
            return 128 + self.signal
        return 0 if all(state.status == Status.DONE for state in self.states) else 1


def launch(
    sweep: Sweep,
    store: Store,
    pool: Pool,
    target: Target = execute_run,
    begin: Callable[[], object] = lambda: None,
) -> Outcome:
    """Run what is missing of the sweep; returns when every run is settled or a signal has stopped them.

    `begin` is called once nothing can be refused any more. Raises InputError, before anything runs, if the results
    folder cannot be written or a method does not fit.
    """
    check_writable(store.root)
    with Display(sweep.name, labels(sweep)) as display:
        return _Launch(sweep, store, pool, target, display, begin).go()


def labels(sweep: Sweep) -> dict[str, str]:
    """What sets each run apart: run id -> `method.rank=4 seed=1`."""
    flats = {spec.id: spec.flat for spec in sweep.runs}
    keys = swept_keys(list(flats.values()))
    return {id: " ".join(f"{key}={short(flat[key])}" for key in keys if key in flat) for id, flat in flats.items()}


def check_writable(root: Path) -> None:
    """InputError if files cannot be made below `root`."""
    probe = root / "runs" / f".writable.{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise InputError(f"--results {show_path(root)}: cannot be written: {error.strerror}") from None


@dataclass(kw_only=True)
class _Child:
    specs: list[RunSpec]
    """The run, or those of a pack."""
    slot: int
    ranks: list[RankProcess | RemoteRank]
    started: float
    records_before: dict[str, int | None]
    """Time stamps of the records that earlier attempts left, by run."""
    overdue: bool = False
    broken: float | None = None
    """When it was first seen that a rank has ended before the others could do without it."""

    def terminate(self, cause: int) -> None:
        for rank in self.ranks:
            rank.terminate(cause)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()

    @property
    def alive(self) -> list[RankProcess | RemoteRank]:
        return [rank for rank in self.ranks if rank.is_alive()]

    def end_stragglers(self) -> None:
        """Ranks that have lost one end by themselves; one that does not, in an operation of its GPU say, is killed."""
        ended = [rank for rank in self.ranks if not rank.is_alive()]
        if not any(rank.exitcode != 0 or rank.rank == 0 for rank in ended):
            return
        self.broken = self.broken or time.monotonic()
        if time.monotonic() - self.broken > PEER_GRACE_SECONDS:
            for rank in self.ranks:
                rank.stop()


class _Launch:
    """The state of one `launch`: a run is pending, in a child, elsewhere (another worker's) or settled."""

    def __init__(
        self, sweep: Sweep, store: Store, pool: Pool, target: Target, display: Display, begin: Callable[[], object]
    ):
        self.sweep, self.store, self.pool, self.target, self.display = sweep, store, pool, target, display
        self.begin = begin
        self.pending: list[RunSpec] = []
        self.children: list[_Child] = []
        self.elsewhere: list[RunSpec] = []
        self.settled: dict[str, RunState] = {}
        self.retrying: set[str] = set()
        self.starts: dict[str, int] = {}
        self.packs: dict[str, int] = {}
        """The number of a run's pack."""
        self.oom_kills = count_oom_kills()
        self.meetings = tempfile.TemporaryDirectory(prefix="lorabench-")
        self.server_log = pool.server_log or store.root / "runs" / ".server.log"
        self.server: Server | None = None
        self.server_deaths = 0
        self.killed_servers = 0
        self.problem: str | None = None
        self.signals: list[int] = []
        self.obeyed = 0
        self.stopped: tuple[str, ...] = ()
        self.stopping_since = 0.0

    def go(self) -> Outcome:
        self._sort()
        if self.pending and (self.pool.check or self._may_pack()) and self.target is execute_run:
            self._check()
        self.begin()
        with self._handlers():
            while self.pending or self.children or self.elsewhere:
                self._obey_signals()
                self._fill()
                self._wait()
                self._reap()
                self._look_elsewhere()
                self._kill_overdue()
                self._show()
        states = [self.settled.get(spec.id) or self.store.state(spec.id, spec) for spec in self.sweep.runs]
        number = self.signals[0] if self.signals else None
        return Outcome(states=states, signal=number, stopped=self.stopped, problem=self.problem)

    def _sort(self) -> None:
        """Split the sweep into what is settled already and what is to do."""
        for state, spec in zip(self.store.states(list(self.sweep.runs)), self.sweep.runs, strict=True):
            if Status.CORRUPT in self.pool.retry or spec.id in self.pool.again:
                state = self.store.verified(state)
            if state.status == Status.DONE:
                self._settle(state, "already")
            elif state.status == Status.RUNNING:
                self.elsewhere.append(spec)
            elif state.status in REPEATABLE and state.status not in self.pool.retry and spec.id not in self.pool.again:
                self._settle(state)
            else:
                if state.status in REPEATABLE:
                    self.retrying.add(spec.id)
                if state.status == Status.CORRUPT:
                    shelf = self.store.set_aside(spec.id)
                    self.display.say(f"{spec.id}: corrupt ({state.error}); moved to {shelf}")
                self.pending.append(spec)
        done = sum(state.status == Status.DONE for state in self.settled.values())
        parts = [f"{done} done already"] * bool(done)
        parts += [f"{len(self.pending)} to run on {counted(self.pool.workers, 'worker')}"] * bool(self.pending)
        parts += [f"{len(self.elsewhere)} running elsewhere"] * bool(self.elsewhere)
        runs = counted(len(self.sweep.runs), "run")
        self.display.say(f"{self.sweep.name}: {runs}: {', '.join(parts) or 'nothing to do'}")

    def _may_pack(self) -> bool:
        return self.pool.pack != 1 and len(self.pending) > 1 and self.pool.processes == 1 and self.pool.team is None

    def _check(self) -> None:
        """InputError, before anything runs, if some method does not fit its model. What can be packed is known then."""
        asked = Asked(
            size=self.pool.pack,
            device=self.pool.settings.device,
            workers=self._workers_a_gpu(),
            alone=self.pool.alone,
        )
        check = Check(
            specs=self.pending,
            done=self._data_of_done(),
            refuse=self.pool.check,
            asked=asked if self._may_pack() else None,
        )
        server = self._running_server()
        here, there = server.context.Pipe(duplex=False)
        # Whatever is wrong, the runs meet it and say so.
        with interrupts(at_once=False) as came, contextlib.suppress(ServerDied, EOFError, OSError):
            process = server.start(check_main, (check, there, self.server_log), daemon=True)
            there.close()
            try:
                while not (came or here.poll(TICK_SECONDS)):
                    continue
                if came:
                    raise KeyboardInterrupt
                problems, notes, rides = here.recv()
            finally:
                process.terminate()
                process.join()
            if problems:
                raise InputError(problems, self.sweep.name)
            packs = in_packs(self.pending, rides, self.pool.workers)
            self.packs = {run_id: number for number, pack in enumerate(packs) for run_id in pack}
            for note in [*notes, *([f"packed: {packs_text(packs)}"] if packs else [])]:
                self.display.say(note)

    def _workers_a_gpu(self) -> int:
        """How many share a device."""
        return max(1, self.pool.workers // max(1, len(self.pool.gpus)))

    def _data_of_done(self) -> list[tuple[str, dict[str, str]]]:
        states = [(spec, self.settled.get(spec.id)) for spec in self.sweep.runs]
        return [
            (spec.id, named(spec.stages, state.record.environment.get("data") or {}))
            for spec, state in states
            if state and state.record and state.status == Status.DONE
        ]

    def _running_server(self) -> Server:
        if self.server is None:
            alone = self.pool.processes == 1 and self.pool.team is None
            self.server = start_server(self.server_log, self.pool.preload, self.sweep.runs, alone=alone)
        return self.server

    def _fill(self) -> None:
        """Start pending runs in the free slots."""
        busy = {child.slot for child in self.children}
        free = [slot for slot in range(self.pool.workers) if slot not in busy]
        while self.pending and free:
            number = self.packs.get(self.pending[0].id)
            pack = [spec for spec in self.pending if number is not None and self.packs.get(spec.id) == number]
            pack = pack or self.pending[:1]
            self.pending = [spec for spec in self.pending if not any(spec is taken for taken in pack)]
            if to_begin := [spec for spec in pack if self._is_to_begin(spec)]:
                self._start(to_begin, free.pop(0))

    def _is_to_begin(self, spec: RunSpec) -> bool:
        """Whether it still is, and its folder can be written; else it is settled, or another worker's."""
        state = self.store.state(spec.id, spec)
        if state.status == Status.RUNNING:
            self.elsewhere.append(spec)
        elif self.store.cancel_marker(spec.id).exists():
            self._settle(replace(state, status=Status.CANCELLED, error="not begun: cancelled"))
        elif state.status == Status.DONE or (state.status in REPEATABLE and spec.id not in self.retrying):
            self._settle(state)  # another worker was faster
        else:
            try:
                self.store.write_spec(spec)
                return True
            except OSError as error:
                text = f"its folder cannot be written: {error.strerror}"
                self._settle(write_ending(self.store, spec, Status.FAILED, text))
        return False

    def _start(self, specs: list[RunSpec], slot: int) -> None:
        """A process of a run, or of those of a pack; several processes of a run are ranks."""
        server = self._running_server()
        before = {spec.id: record_stamp(self.store, spec) for spec in specs}
        for spec in specs:
            self.starts[spec.id] = self.starts.get(spec.id, 0) + 1
        places = self._places(specs[0])
        ranks: list[RankProcess | RemoteRank] = []
        try:
            for place in places:
                settings = replace(self.pool.settings, place=place, waiting=len(self.pending))
                ranks.append(RankProcess.start(server, self.target, specs, self.store, settings, self._gpus(slot)))
        except ServerDied as died:
            self._begin_later(specs, ranks, str(died))
            return
        self.server_deaths = 0
        if self.pool.team:
            ranks += self.pool.team.start(specs[0], places[0])
        child = _Child(specs=specs, slot=slot, ranks=ranks, started=time.monotonic(), records_before=before)
        self.children.append(child)

    def _begin_later(self, specs: list[RunSpec], ranks: Sequence[RankProcess | RemoteRank], why: str) -> None:
        """With another fork server; unless that dies each time."""
        for rank in ranks:
            rank.kill()
        self.server_deaths += 1
        if self.server_deaths < SERVER_DEATHS:
            self.pending[:0] = specs
        else:
            self.problem = why
            self.pending.clear()
            self.display.say(f"no run can be begun: {why}")

    def _places(self, spec: RunSpec) -> list[Place]:
        """Of the processes of a run that are started here."""
        if self.pool.team:
            return self.pool.team.places()
        size, meeting = self.pool.processes, f"file:{self.meetings.name}/{spec.id}.{self.starts[spec.id]}"
        return [Place(rank=i, size=size, local_rank=i, local_size=size, meeting=meeting) for i in range(size)]

    def _gpus(self, slot: int) -> str | None:
        """What a worker sees, as CUDA_VISIBLE_DEVICES has it; None: what there is."""
        gpus, count = self.pool.gpus, self.pool.processes
        if self.pool.team:
            return None  # as on the other ranks: the place on its machine says which is a process's own
        return ",".join(gpus[(slot * count + i) % len(gpus)] for i in range(count)) if gpus else None

    def _wait(self) -> None:
        if self.children:
            here = [rank.process for child in self.children for rank in child.ranks if isinstance(rank, RankProcess)]
            alive = [forked.process.sentinel for forked in here if forked.process.is_alive()]
            connection.wait(alive, timeout=TICK_SECONDS) if alive else time.sleep(TICK_SECONDS)
        elif not self.pending and self.elsewhere:
            time.sleep(TICK_SECONDS)

    def _reap(self) -> None:
        if self.server and self.server.count_killed() > self.killed_servers:
            self._count_server_kills(count_oom_kills())
        for child in list(self.children):
            child.end_stragglers()
            if not child.alive:
                self.children.remove(child)
                self._account(child)

    def _account(self, child: _Child) -> None:
        """Settle the runs of a process that has ended, or find out why they left no result."""
        endings = [rank.ending(self._out_of_memory(rank), self.server_log) for rank in child.ranks]
        if any(ending.code is None for ending in endings):
            self.pending.clear()  # a rank's machine is gone, and no run can do without it
        for spec in child.specs:
            self._account_run(spec, child, endings)

    def _account_run(self, spec: RunSpec, child: _Child, endings: list[Ending]) -> None:
        state = self.store.state(spec.id, spec)
        written = record_stamp(self.store, spec) != child.records_before[spec.id]
        if state.status == Status.RUNNING:
            self.elsewhere.append(spec)
        elif state.status == Status.DONE or (written and state.status in (*REPEATABLE, Status.CANCELLED)):
            self._settle(state)
        elif child.overdue:
            error = f"killed {GRACE_SECONDS:.0f} s after its time limit: it did not answer"
            self._settle(write_ending(self.store, spec, Status.TIMEOUT, error))
        elif self.signals and self._may_begin_again(endings):
            self._settle(state)
        elif self.signals and any(ending.code == -signal.SIGTERM for ending in endings):  # before it could listen
            error = f"stopped by {signal.Signals(self.signals[0]).name}; run again to resume"
            self._settle(write_ending(self.store, spec, Status.CANCELLED, error))
        elif self.starts[spec.id] < STARTS_WITHOUT_RECORD and self._may_begin_again(endings):
            self.pending.append(spec)
        elif len(child.specs) > 1 and common_cause(endings)[0] in (Status.OOM, Status.FAILED):
            self.packs.pop(spec.id, None)  # which of them it was, or that they were too many, shows alone
            self.pending.append(spec)
        else:
            self._settle(write_ending(self.store, spec, *common_cause(endings)))

    def _may_begin_again(self, endings: list[Ending]) -> bool:
        """Whether another worker had the run and gave it up, or nobody knows how it ended."""
        lost = any(ending.orphaned and not ending.out_of_memory for ending in endings)
        return lost or all(ending.code == 0 for ending in endings)

    def _out_of_memory(self, rank: RankProcess | RemoteRank) -> bool:
        """Whether the kernel has counted one kill more on this machine than was accounted for."""
        if not (isinstance(rank, RankProcess) and rank.was_killed):
            return False
        counted = count_oom_kills()
        self._count_server_kills(counted)
        if self.oom_kills >= counted:
            return False
        self.oom_kills += 1
        return True

    def _count_server_kills(self, counted: int) -> None:
        """A fork server that the kernel has killed for want of memory is counted as one kill, which is no run's."""
        killed = self.server.count_killed() if self.server else 0
        self.oom_kills += max(0, min(killed - self.killed_servers, counted - self.oom_kills))
        self.killed_servers = killed

    def _look_elsewhere(self) -> None:
        """Take up what other workers have given up; settle what they have ended.

        A job holds what others might use, so it waits for its own earlier start only, which a crash may have left.
        """
        job = self.pool.settings.job
        for spec in list(self.elsewhere):
            state = self.store.state(spec.id, spec)
            if state.status == Status.RUNNING:
                if job and state.claim and state.claim.progress.get("job") != job:
                    self.elsewhere.remove(spec)
                    self.display.say(f"{spec.id}: another worker has it ({state.claim.host})")
                continue
            self.elsewhere.remove(spec)
            if state.status == Status.DONE or state.status in REPEATABLE:
                self._settle(state)
            else:
                self.pending.append(spec)

    def _kill_overdue(self) -> None:
        limit = self.pool.settings.timeout_seconds
        for child in self.children:
            if limit is not None and time.monotonic() - child.started > limit * len(child.specs) + GRACE_SECONDS:
                child.overdue = True
                child.kill()

    def _obey_signals(self) -> None:
        """The first signal: no new runs, and the running ones write a checkpoint; the second: kill them.

        With a limit to its patience, it is that which kills them: a cluster may send a signal several times.
        """
        patience = self.pool.patience_seconds
        if len(self.signals) > self.obeyed:
            self.pending.clear()
            self.elsewhere.clear()
            if not self.obeyed:
                self.stopping_since = time.monotonic()
                self.stopped = tuple(spec.id for child in self.children for spec in child.specs)
            self.obeyed = len(self.signals)
            for child in self.children:
                child.kill() if self.obeyed > 1 and patience is None else child.terminate(self.signals[0])
            if self.obeyed == 1 and self.children:
                hint = "again: kill them" if patience is None else f"at most {patience:.0f} s"
                runs = f"{len(self.stopped)} runs write" if len(self.stopped) > 1 else "1 run writes"
                self.display.say(f"stopping: {runs} a checkpoint ({hint})")
        elif self.obeyed and patience is not None and time.monotonic() > self.stopping_since + patience:
            for child in self.children:
                child.kill()

    @contextlib.contextmanager
    def _handlers(self) -> Iterator[None]:
        def note(number: int, _: Any) -> None:
            self.signals.append(number)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for child in self.children:  # only where the launcher itself has failed
                child.terminate(signal.SIGHUP)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _show(self) -> None:
        progress = {}
        for spec in [*(spec for child in self.children for spec in child.specs), *self.elsewhere]:
            claim = current_claim(self.store.folder(spec.id))
            progress[spec.id] = claim.progress if claim else {}
        self.display.running(progress)

    def _settle(self, state: RunState, note: str = "") -> None:
        self.settled[state.run_id] = state
        self.display.ended(state, note)


def summary(sweep: Sweep, outcome: Outcome) -> str:
    """The counts by status, then a line for each run that did not end well."""
    names = labels(sweep)
    bad = [state for state in outcome.states if state.status not in (Status.DONE, Status.MISSING)]
    rows = [
        {"run_id": state.run_id, "status": state.status, "swept": names[state.run_id], "error": state.error}
        for state in bad
    ]
    lines = [f"{sweep.name}: {count_statuses(outcome.states)}"]
    lines += [text_table(rows, ["run_id", "status", "swept", "error"])] if rows else []
    repeat = [state for state in bad if state.status in REPEATABLE]
    lines += [f"repeat with --retry {','.join(sorted({str(state.status) for state in repeat}))}"] if repeat else []
    return "\n".join(lines)
