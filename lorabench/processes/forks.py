"""The fork server: processes that start in milliseconds, with torch imported, and stop when they are told to."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import forkserver, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from lorabench.processes.machine import PATIENT_THREADS, process_start

SERVER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # NumPy's BLAS starts its threads when imported
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # and so does pandas' pyarrow
    **PATIENT_THREADS,
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # `is_available` without a CUDA context
}
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
TERMINAL = (1, 2)
"""Descriptors of stdout and stderr."""
TRIES = 3
"""Servers in a row that may die before they have started a process."""
EXIT_CODE_UNKNOWN = 255
"""What multiprocessing says of a process whose server has died: also while that process goes on."""
DEATH_SECONDS = 1.0
"""From the moment at which a server that dies closes its files until it is seen to be dead."""


class ServerDied(Exception):
    """The fork server died, again and again, before it had started a process."""


_KINDS: dict[int, str] = {}
"""Of the servers of this process, by their process ids."""
_LET_GO: dict[int, int] = {}
"""Servers of this process that are there for what they have started alone: process id -> what keeps one going."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A fork server; where one has died, another is started, like the first. See `start_server`."""

    log: Path
    preload: Sequence[str]
    environment: dict[str, str]
    kind: str = ""
    """What its processes may not be used for: one of another kind is of no use, one of none always is."""
    context: ForkServerContext = field(default_factory=lambda: multiprocessing.get_context("forkserver"))
    _killed: set[int] = field(default_factory=set)
    _killed_before: int | None = field(default_factory=lambda: _killed_server())

    def count_killed(self) -> int:
        """How many servers SIGKILL has ended, as the kernel does for want of memory, since this was made."""
        pid = _killed_server()
        if pid is not None and pid != self._killed_before:
            self._killed.add(pid)
        return len(self._killed)

    def ensure_running(self) -> None:
        """Start it, unless it runs."""
        pid = _server_pid()
        if pid is not None and _exit_code(pid) is None:
            if _KINDS.get(pid, "") in ("", self.kind):
                return
            _let_go()  # there can be one only
        self.count_killed()  # as long as it can be told what the last one died of
        self.context.set_forkserver_preload([*self.preload])
        with self._inherited():
            forkserver.ensure_running()
            _KINDS[_server_pid() or 0] = self.kind

    def start(
        self, target: Callable[..., Any], arguments: tuple[Any, ...], *, daemon: bool = False, tries: int = TRIES
    ) -> ForkServerProcess:
        """A process that it starts. Raises ServerDied where none of so many servers did.

        A process that was started all the same, by one that died before it could say so, is asked to stop.
        """
        for _ in range(tries):
            self.ensure_running()
            server = _server_pid()
            process = self.context.Process(target=target, args=arguments, daemon=daemon)
            hidden = contextlib.nullcontext() if target.__module__ == "__main__" else _main_not_told()
            with contextlib.suppress(EOFError, ConnectionError), self._inherited(), hidden:
                process.start()
                _KINDS.setdefault(_server_pid() or 0, self.kind)
                if server is not None and server != _server_pid():
                    self._killed.add(server)  # it died just now, and multiprocessing has started the next
                return process
        raise ServerDied(f"the fork server dies before it has started a process; see {self.log}")

    @contextlib.contextmanager
    def _inherited(self) -> Iterator[None]:
        """What a server is started with: by `ensure_running`, or by multiprocessing where it died just now."""
        added = {k: value for k, value in (SERVER_ENVIRONMENT | self.environment).items() if k not in os.environ}
        os.environ.update(added)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        terminal = [os.dup(descriptor) for descriptor in TERMINAL]
        try:
            redirect(self.log, *TERMINAL)
            resource_tracker.ensure_running()  # else the server starts it, and it unblocks SIGINT and SIGTERM
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            yield
        finally:
            for descriptor, kept in zip(TERMINAL, terminal, strict=True):
                os.dup2(kept, descriptor)
                os.close(kept)
            for key in added:
                del os.environ[key]
            signal.pthread_sigmask(signal.SIG_SETMASK, before)  # a signal that has waited may raise here


@contextlib.contextmanager
def _main_not_told() -> Iterator[None]:
    """Let a process not learn which script started it all.

    multiprocessing has each process import that script, for what it defines and the process may need: one that calls
    `lorabench.run` without `if __name__ == "__main__"` would begin again in every run.
    """
    main = vars(sys.modules["__main__"])
    before: dict[str, Any] = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        del main["__spec__"]
        main.update(before)


def start_server(log: Path, preload: Sequence[str], environment: dict[str, str], kind: str = "") -> Server:
    """A fork server, started with the signals that mean "stop" blocked.

    A terminal's Ctrl-C, and SLURM's SIGTERM and SIGUSR2, reach every process there is, but only the one that started
    the server decides what to do. Its processes inherit the block, and lift it for SIGTERM, by which they are asked to
    stop.
    None of `preload`'s imports may start a thread or a CUDA context, which would not survive the fork; what is printed
    meanwhile goes to `log`.
    """
    server = Server(log=log, preload=preload, environment=environment, kind=kind)
    server.ensure_running()
    return server


class Forked:
    """A process that a fork server has started, which may live longer than its server does."""

    def __init__(self, process: ForkServerProcess):
        self.process = process
        self._server, self._started = _server_pid(), process_start(process.pid or 0)

    @property
    def exitcode(self) -> int | None:
        """None while it is alive; of an orphan not to be believed."""
        return None if self.is_alive() else self.process.exitcode

    @cached_property
    def _has_lost_its_server(self) -> bool:
        """Of one that is said to have ended with EXIT_CODE_UNKNOWN, which may really be its exit code."""
        deadline = time.monotonic() + DEATH_SECONDS
        while process_start(self._server or 0) is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    @property
    def is_orphan(self) -> bool:
        """Whether its server has died before it: its exit code will not be known."""
        return self.process.exitcode == EXIT_CODE_UNKNOWN and self._has_lost_its_server

    def is_alive(self) -> bool:
        return self.process.exitcode is None or (self.is_orphan and self._is_there())

    def join(self, seconds: float | None = None) -> None:
        """Wait until it has ended, at most so long."""
        deadline = time.monotonic() + (math.inf if seconds is None else seconds)
        self.process.join(seconds)
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)

    def send(self, number: int) -> None:
        """A signal; nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self.is_alive() and self.process.pid is not None:
                os.kill(self.process.pid, number)

    def _is_there(self) -> bool:
        return process_start(self.process.pid or 0) == self._started is not None


def _server_pid() -> int | None:
    """Of the server that was started last."""
    return vars(forkserver)["_forkserver"]._forkserver_pid  # which has no public name


def _let_go() -> None:
    """Leave the server that was started last to what it has started, and so be ready for another.

    It stays as long as this process, for it alone can tell how they end, and does not where it is asked to stop.
    multiprocessing's own way of stopping a server waits for all of them.
    """
    server = vars(forkserver)["_forkserver"]
    with server._lock:
        _LET_GO[server._forkserver_pid] = server._forkserver_alive_fd
        server._forkserver_alive_fd = server._forkserver_address = server._forkserver_pid = None


def _killed_server() -> int | None:
    """The process id of the server that was started last, if SIGKILL has ended it."""
    pid = _server_pid()
    return pid if pid is not None and _exit_code(pid) == -signal.SIGKILL else None


def _exit_code(pid: int) -> int | None:
    """Of a child process, which stays to be waited for by multiprocessing; None while it goes on."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # it has been waited for
        return EXIT_CODE_UNKNOWN
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def redirect(log: Path, *descriptors: int) -> None:
    """Let what is written to these file descriptors go to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in descriptors:
        os.dup2(file, descriptor)
    os.close(file)


def when_parent_ends(act: Callable[[], None]) -> None:
    """Wait for the process that started this one to be gone, however it went; then `act`."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        act()
