"""The fork server: processes that start in milliseconds, with torch imported, and stop when they are told to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, parent_process, resource_tracker
from pathlib import Path
from typing import Any

from lorabench.machine import PATIENT_THREADS

SERVER_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # NumPy's BLAS starts its threads when imported
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # and so does pandas' pyarrow
    **PATIENT_THREADS,
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # `is_available` without a CUDA context
}
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


def start_server(log: Path, preload: Sequence[str], environment: dict[str, str]) -> Any:
    """The fork server's context. The server is started with the signals that mean "stop" blocked.

    A terminal's Ctrl-C, and SLURM's SIGTERM and SIGUSR2, reach every process there is, but only the one that started
    the server decides what to do. Its processes inherit the block, and lift it for SIGTERM, by which they are asked to
    stop.
    None of `preload`'s imports may start a thread or a CUDA context, which would not survive the fork; what is printed
    meanwhile goes to `log`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload])
    added = {key: value for key, value in (SERVER_ENVIRONMENT | environment).items() if key not in os.environ}
    os.environ.update(added)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    resource_tracker.ensure_running()  # else the server starts it, and it unblocks SIGINT and SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    terminal = os.dup(2)
    try:
        redirect(log, 2)
        forkserver.ensure_running()
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for key in added:
            del os.environ[key]
    return context


@contextlib.contextmanager
def stops_blocked() -> Iterator[None]:
    """Around the start of a process: should the server have died, it is started anew, and inherits the block again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
