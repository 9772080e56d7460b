"""Several processes that share tasks: each takes the next when it is free; one that dies takes its own task with it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from lorabench.decode import InputError
from lorabench.forks import Forked, Server, ServerDied, redirect, start_server, when_parent_ends

PATIENCE_SECONDS = 5.0
"""How long a worker that is asked to stop may take."""

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
    """
    server = start_server(log, preload, {})
    waiting = list(range(len(tasks)))[::-1]
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task is not None for worker in workers):
            while len(workers) < min(num_workers, len(waiting) + sum(worker.task is not None for worker in workers)):
                workers.append(_start(server, do, log))
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task = waiting.pop()
                    with contextlib.suppress(BrokenPipeError):  # it has died: seen below
                        worker.pipe.send(tasks[worker.task])
            ready = connection.wait([worker.pipe for worker in workers])
            for worker in [worker for worker in workers if worker.pipe in ready]:
                result = _receive(worker, advance)
                if worker.pipe.closed:
                    workers.remove(worker)
                if result is not None and worker.task is not None:
                    place, worker.task = worker.task, None
                    yield place, result[0] if isinstance(result, tuple) else result
    finally:
        _stop(workers)


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


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.send(signal.SIGTERM)
    for worker in workers:
        worker.process.join(PATIENCE_SECONDS)
        if worker.process.is_alive():
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
