"""What runs and their jobs have printed: where it is, its last lines, and what is added to it."""

from __future__ import annotations

import difflib
import io
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from lorabench.cluster.queue import Submission, read_submissions
from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show_path
from lorabench.store.store import Store

BLOCK = 65536
TICK_SECONDS = 0.5
LOOK_SECONDS = 5.0
"""Between two looks whether what is followed has ended."""


def find_run(store: Store, text: str, sweeps: Collection[str] | None = None, declared: Collection[str] = ()) -> str:
    """The id of the run that `text` is, or begins, or whose folder it is: in the store or its queue, or `declared` by a
    sweep and not begun.

    InputError names the closest of them; or, where one of these sweeps might have been meant, the closest of those
    alone, for then something is done to it.
    """
    ids, text = store.run_ids(), store.named(text)
    if text in ids:
        return text
    ids = sorted({*ids, *declared, *(id for submission in read_submissions(store.root) for id in submission.specs)})
    found = [text] if text in ids else [id for id in ids if id.startswith(text)]
    if len(found) == 1:
        return found[0]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise InputError(f"RUN = {clip(text)}: begins {len(found)} runs: {', '.join(found[:3])}{more}")
    close = difflib.get_close_matches(text, ids if sweeps is None else sweeps, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else f" `lorabench status {show_path(store.root)}` lists them"
    raise InputError(
        f"RUN = {clip(text)}: no such {'run' if sweeps is None else 'run or sweep'} in {show_path(store.root)}.{hint}"
    )


def jobs_of(store: Store, run_id: str) -> list[tuple[Submission, str]]:
    """The jobs that the run was given to, the latest first, each with its id on the cluster."""
    found = []
    for submission in read_submissions(store.root):
        for job, run_ids in enumerate(submission.jobs):
            if run_id in run_ids and (job_id := submission.job_ids[job]):
                found.append((submission, job_id))
    return found[::-1]


def run_log(store: Store, run_id: str) -> Path:
    return store.folder(run_id) / "log.txt"


def last_lines(file: Path, count: int) -> list[str]:
    """The last lines of a file, without their ends; none where there is no such file."""
    text = b""
    try:
        with open(file, "rb") as handle:
            start = handle.seek(0, os.SEEK_END)
            while start > 0 and text.count(b"\n") <= count:
                size = min(BLOCK, start)
                start -= size
                handle.seek(start)
                text = handle.read(size) + text
    except OSError:
        return []
    return text.decode("utf-8", "replace").splitlines()[-count:] if count else []


def follow(files: Callable[[], Sequence[Path]], has_ended: Callable[[], bool], count: int) -> Iterator[str]:
    """The last `count` lines of the files and what is added to them, until what writes them has ended.

    Files that come into being meanwhile are read from their beginning.
    """
    read: dict[Path, int] = {}
    for file in files():
        read[file] = file.stat().st_size
        yield "".join(f"{line}\n" for line in last_lines(file, count))
    looked, ended = time.monotonic(), has_ended()
    while True:
        for file in files():
            read[file], text = _added(file, read.get(file, 0))
            if text:
                yield text
        if ended:
            return
        time.sleep(TICK_SECONDS)
        if time.monotonic() > looked + LOOK_SECONDS:
            looked, ended = time.monotonic(), has_ended()


def _added(file: Path, position: int) -> tuple[int, str]:
    """How far a file is read when all that was added since `position` is, and this; whole lines only."""
    try:
        with open(file, "rb") as handle:
            if handle.seek(0, io.SEEK_END) < position:  # it was begun anew
                position = 0
            handle.seek(position)
            text = handle.read()
    except OSError:
        return position, ""
    end = text.rfind(b"\n") + 1
    return position + end, text[:end].decode("utf-8", "replace")
