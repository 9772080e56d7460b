"""Runs that several SLURM tasks compute together, one task a rank.

Each task has a supervisor, the process that SLURM has started, which computes nothing. Rank 0's is a launcher like any
other; what it starts, stops and accounts for are a run's process here and, through the others, one on each of them. All
are forked anew for every run. The supervisors leave word for one another in a store that rank 0's keeps for the whole
job; the processes of a run meet in it too, under a prefix of their own, so that no run needs a port.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorabench.launch.exit_status import Ending
from lorabench.launch.pool import STOP_SIGNALS, Outcome, Pool, launch
from lorabench.launch.worker import RankProcess, Settings, Target, execute_run, start_server
from lorabench.processes.distributed import MEET_SECONDS, Place
from lorabench.processes.forks import EXIT_CODE_UNKNOWN, ServerDied
from lorabench.processes.machine import count_oom_kills
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep
from lorabench.store.store import Store

TICK_SECONDS = 0.1
BEAT_SECONDS = 2.0
GONE_SECONDS = 90.0
"""A supervisor that has not been heard of for so long is taken for dead."""
PORTS = 4
"""MASTER_PORT, and the next ones where that is taken."""
TRY = datetime.timedelta(seconds=5)


def launch_together(
    sweep: Sweep, store: Store, pool: Pool, place: Place, target: Target = execute_run
) -> Outcome | None:
    """`launch`, called in every task of a job; the outcome on rank 0, None on the others, which follow it.

    `place` is `Place.from_environment()`, with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT as submitit's TorchDistributedEnvironment exports them (CUDA_VISIBLE_DEVICES as SLURM sets it: a rank
    takes the GPU of its place). Runs are computed one at a time. A signal to rank 0 stops all; the other ranks
    leave it to that one. Ends early, with runs left, where a supervisor is gone: on rank 0 after what is in hand is
    accounted for.
    """
    if place.size == 1:
        return launch(sweep, store, pool, target)
    if place.rank:
        with _unmoved():
            _Follower(sweep, store, pool, place, target).go()
        return None
    with Team(place) as team:
        return launch(sweep, store, replace(pool, workers=1, team=team), target)


class Team:
    """The other ranks' supervisors, as rank 0's sees them."""

    def __init__(self, place: Place):
        self.place = place
        self.store, self.port = _open_store()
        self.runs = 0

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.set(f"run {self.runs}", "")
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not self.store.check([f"left {r}" for r in range(1, self.place.size)]):
            time.sleep(TICK_SECONDS)  # they read it here; whoever does not sees that the store is gone

    def places(self) -> list[Place]:
        """Of the processes of the next run."""
        self.runs += 1
        meeting = f"tcp:{os.environ['MASTER_ADDR']}:{self.port}:meeting {self.runs}"
        return [replace(self.place, meeting=meeting)]

    def start(self, spec: RunSpec, place: Place) -> list[RemoteRank]:
        """Have every other rank start its process of a run."""
        order = {"spec": spec.to_json(), "meeting": place.meeting, "number": self.runs}
        self.store.set(f"run {self.runs - 1}", json.dumps(order))
        return [RemoteRank(self.store, self.runs, rank) for rank in range(1, self.place.size)]


class RemoteRank:
    """A run's process that another supervisor has started; as `RankProcess` where that is on this machine."""

    def __init__(self, store: Any, number: int, rank: int):
        self.store, self.number, self.rank = store, number, rank
        self._ending: Ending | None = None
        self._beat, self._heard = b"", time.monotonic()

    @property
    def exitcode(self) -> int | None:
        self.is_alive()
        return self._ending.code if self._ending else None

    @property
    def is_gone(self) -> bool:
        """Whether it ended because its supervisor does not answer any more."""
        return self._ending is not None and self._ending.code is None

    def is_alive(self) -> bool:
        if self._ending is None and self.store.check([f"ended {self.number} {self.rank}"]):
            self._ending = Ending.from_json(json.loads(self.store.get(f"ended {self.number} {self.rank}")))
        elif self._ending is None and self._is_silent():
            self._ending = Ending(code=None, rank=self.rank)
        return self._ending is None

    def _is_silent(self) -> bool:
        key, patience = f"beat {self.rank}", GONE_SECONDS if self._beat else MEET_SECONDS
        beat = self.store.get(key) if self.store.check([key]) else b""
        if beat != self._beat:
            self._beat, self._heard = beat, time.monotonic()
        return time.monotonic() - self._heard > patience

    def terminate(self, cause: int) -> None:
        self.store.set(f"told {self.number} {self.rank}", f"terminate {cause}")

    def kill(self) -> None:
        self.store.set(f"told {self.number} {self.rank}", "kill")

    def stop(self) -> None:
        """Kill it, for another rank has ended."""
        if self.is_alive():
            self.store.set(f"told {self.number} {self.rank}", "stop")

    def ending(self, out_of_memory: bool, server_log: Path) -> Ending:
        assert self._ending is not None
        return self._ending


class _Follower:
    """The supervisor of a rank that is not the first."""

    def __init__(self, sweep: Sweep, store: Store, pool: Pool, place: Place, target: Target):
        self.specs = sweep.runs
        self.runs, self.pool, self.place, self.target = store, pool, place, target
        self.log = pool.server_log or store.root / "runs" / ".server.log"
        self.log = self.log.with_name(f"{self.log.name}.{place.rank}")
        self.oom_kills = count_oom_kills()
        self.ended = threading.Event()

    def go(self) -> None:
        """Until rank 0 has no more runs, or is gone."""
        import torch.distributed as dist

        self.store, _ = _open_store(self.place.rank)
        beating = threading.Thread(target=self._beat, daemon=True, name="beat")
        beating.start()
        self.server = start_server(self.log, self.pool.preload, self.specs)
        try:
            for number in itertools.count():
                order = self._next(f"run {number}")
                if not order:
                    self.store.set(f"left {self.place.rank}", "")
                    return
                self._compute(json.loads(order))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            print(f"rank {self.place.rank}: rank 0 is gone: {str(error).splitlines()[0]}")
        finally:
            self.ended.set()
            beating.join(TRY.total_seconds())

    def _next(self, key: str) -> bytes:
        while not self.store.check([key]):
            time.sleep(TICK_SECONDS)
        return self.store.get(key)

    def _compute(self, order: dict[str, Any]) -> None:
        """One run's process; it ends with this one, however that ends."""
        spec, settings = RunSpec.from_json(order["spec"]), self._settings(order["meeting"])
        key = f"{order['number']} {self.place.rank}"
        try:
            rank = RankProcess.start(self.server, self.target, [spec], self.runs, settings, None)
        except ServerDied:
            lost = Ending(code=EXIT_CODE_UNKNOWN, rank=self.place.rank, orphaned=True)
            self.store.set(f"ended {key}", json.dumps(lost.to_json()))
            return
        obeyed = b""
        try:
            while rank.is_alive():
                told = self.store.get(f"told {key}") if self.store.check([f"told {key}"]) else b""
                if told != obeyed:
                    obeyed = told
                    _obey(rank, told.decode())
                time.sleep(TICK_SECONDS)
        finally:
            rank.kill()
        while rank.is_alive():  # killed just now
            time.sleep(TICK_SECONDS)
        ending = rank.ending(rank.was_killed and count_oom_kills() > self.oom_kills, self.log)
        self.oom_kills = count_oom_kills()
        self.store.set(f"ended {key}", json.dumps(ending.to_json()))

    def _settings(self, meeting: str) -> Settings:
        return replace(self.pool.settings, place=replace(self.place, meeting=meeting))

    def _beat(self) -> None:
        """Tell rank 0 that this supervisor lives, whatever else it waits for: by a connection of its own."""
        with contextlib.suppress(RuntimeError):  # rank 0 is gone
            store, _ = _open_store(self.place.rank)
            store.set(f"beat {self.place.rank}", "0")
            for beat in itertools.count(1):
                if self.ended.wait(BEAT_SECONDS):
                    return
                store.set(f"beat {self.place.rank}", str(beat))


def _open_store(rank: int = 0) -> tuple[Any, int]:
    """Rank 0's store at MASTER_ADDR, and its port: MASTER_PORT, or one of the next where that is taken.

    Raises RuntimeError where none is free, or rank 0 is not to be found in MEET_SECONDS.
    """
    import torch.distributed as dist

    host, first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    ports = range(first, first + PORTS)
    token = " ".join(os.environ.get(key, "") for key in ("SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))
    if rank == 0:
        for port in ports:
            with contextlib.suppress(RuntimeError):
                store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=TRY)
                store.set("token", token)
                return store, port
        raise RuntimeError(f"ports {ports[0]} to {ports[-1]} of {socket.gethostname()} are taken")
    deadline = time.monotonic() + MEET_SECONDS
    while time.monotonic() < deadline:
        for port in ports:
            if found := _connected(host, port, token):
                return found, port
    raise RuntimeError(f"rank 0 is not to be found at {host}, ports {ports[0]} to {ports[-1]}")


def _connected(host: str, port: int, token: str) -> Any:
    """The store that listens there, if it is this job's; None where nobody does, or somebody else."""
    import torch.distributed as dist

    found = []

    def connect() -> None:
        with contextlib.suppress(RuntimeError):
            store = dist.TCPStore(host, port, timeout=TRY)
            if store.get("token").decode() == token:
                found.append(store)

    thread = threading.Thread(target=connect, daemon=True)  # torch waits without end for a stranger's answer
    thread.start()
    thread.join(2 * TRY.total_seconds())
    return found[0] if found else None


def _obey(rank: RankProcess, told: str) -> None:
    """What a `RemoteRank` has left word of."""
    word, _, cause = told.partition(" ")
    match word:
        case "terminate":
            rank.terminate(int(cause))
        case "kill":
            rank.kill()
        case "stop":
            rank.stop()


@contextlib.contextmanager
def _unmoved() -> Iterator[None]:
    """A signal to the job reaches every task; what is to be done, rank 0 says."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
