"""Several processes that share tasks: each takes the next when it is free; one that dies takes its own task with it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.processes.forks import Forked, Server, ServerDied, redirect, start_server, when_parent_ends

PATIENCE_SECONDS = 5.0
"""How long workers that are asked to stop may take."""
TICK_SECONDS = 0.2
"""Between two looks for a Ctrl-C whose KeyboardInterrupt was lost."""

Do = Callable[[Any, Callable[[float], None]], Any]
"""Does a task and returns its result; its second argument is told how much has been done."""


class WorkerFailed(Exception):
    """A task was not done: what it raised in its process, as text, or what ended that process."""


@dataclass(kw_only=True, eq=False)
class _Worker:
    process: Forked
    pipe: Any
    task: int | None = None


def share(
    do: Do, tasks: Sequence[Any], num_workers: int, preload: Sequence[str], log: Path, advance: Callable[[float], None]
) -> Generator[tuple[int, Any]]:
    """The place of each task, as they are done, with its result, or with InputError or WorkerFailed.

    `do`, tasks and results travel by pickle. When the caller stops, however that is, the workers are stopped too.
    Ctrl-C stops it, also where the process was started with SIGINT ignored, as a shell does for `command &`.
    """
    waiting = list(range(len(tasks)))[::-1]
    workers: list[_Worker] = []
    with interrupts() as came, _stopping(workers):
        server = start_server(log, preload, {})
        while waiting or any(worker.task is not None for worker in workers):
            while len(workers) < min(num_workers, len(waiting) + sum(worker.task is not None for worker in workers)):
                workers.append(_start(server, do, log))
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task = waiting.pop()
                    with contextlib.suppress(BrokenPipeError):  # it has died: seen below
                        worker.pipe.send(tasks[worker.task])
            ready = connection.wait([worker.pipe for worker in workers], TICK_SECONDS)
            if came:
                raise KeyboardInterrupt
            for worker in [worker for worker in workers if worker.pipe in ready]:
                result = _receive(worker, advance)
                if worker.pipe.closed:
                    workers.remove(worker)
                if result is not None and worker.task is not None:
                    place, worker.task = worker.task, None
                    yield place, result[0] if isinstance(result, tuple) else result


@contextlib.contextmanager
def interrupts(*, at_once: bool = True) -> Iterator[list[int]]:
    """What has come of Ctrl-C: raised where it comes, unless `at_once` is false, and kept.

    For the KeyboardInterrupt is lost where a finalizer is running, and waits for what comes next where a system call
    is just about to begin.
    """
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)
        if at_once:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _start(server: Server, do: Do, log: Path) -> _Worker:
    here, there = server.context.Pipe()
    try:
        process = server.start(_main, (there, do, log), daemon=True)
    except ServerDied as died:
        raise WorkerFailed(str(died)) from None
    there.close()
    return _Worker(process=Forked(process), pipe=here)


def _receive(worker: _Worker, advance: Callable[[float], None]) -> Any:
    """What a worker has sent: None where it is only how far it is; its end where it has died."""
    try:
        kind, content = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        if worker.process.is_orphan:
            return WorkerFailed("a worker ended, and so had its fork server")
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        return WorkerFailed(f"a worker {how}")
    if kind == "progress":
        advance(content)
        return None
    return {"done": lambda: (content,), "input": lambda: content, "failed": lambda: WorkerFailed(content)}[kind]()


@contextlib.contextmanager
def _stopping(workers: list[_Worker]) -> Iterator[None]:
    """At the end the workers are asked to stop; what has not in PATIENCE_SECONDS, or at another Ctrl-C, is killed."""
    try:
        yield
    finally:
        try:
            for worker in workers:
                worker.process.send(signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE_SECONDS
            for worker in workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.process.send(signal.SIGKILL)
                worker.process.join()
                worker.pipe.close()


def _main(pipe: Any, do: Do, log: Path) -> None:
    """A worker: one task after another, until the pipe is closed or SIGTERM comes."""
    redirect(log, 1, 2)
    signal.signal(signal.SIGTERM, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    end = lambda: when_parent_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    threading.Thread(target=end, daemon=True, name="watch parent").start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            pipe.send(_done(do, pipe.recv(), lambda amount: pipe.send(("progress", amount))))


def _done(do: Do, task: Any, advance: Callable[[float], None]) -> tuple[str, Any]:
    try:
        return "done", do(task, advance)
    except InputError as error:
        return "input", error
    except Exception:  # the one who shares the tasks is told, and goes on with the others
        return "failed", traceback.format_exc()


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
