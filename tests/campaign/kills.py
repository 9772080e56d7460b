"""Random kills on this machine: of workers, fork server, launcher and whole trees; stopped processes; two launchers.

A round is a fresh store. `lorabench run` is started on it again and again, and something is done to it each time, until
every run is done; never with `--retry`. Then every file is held against those of a store that was left alone.

Where runs are packed, a kill takes a whole pack, and what is left of it goes on in another: then losses, step by step,
and ΔW are held against those of runs that were never in a pack, to the tolerance that docs/training.md states.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.updates.formats import read_updates

SWEEP = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
task.retain = "builtin:english-docs"
task.max_train = 64
task.max_eval = 8
seq_len = 64
batch_size = 2
steps = 90
eval_every = 30
serving = false

[[grid]]
method.name = "lora"
method.rank = [1, 2]
method.dropout = 0.1
snapshot_every = 30
seed = [0, 1, 2, 3, 4, 5]

[[grid]]
method.name = "full"
seed = [0, 1]
"""
BLOWS = ("worker", "worker", "two", "two", "server", "launcher", "tree", "stop")
"""Workers twice as often: nearly each of a launch's is struck."""
FEWEST_LAUNCHES, MOST_LAUNCHES = 4, 12
"""Of a round with blows; then it is left alone."""
PATIENCE_SECONDS = 300.0
"""A launch that takes longer hangs."""
AT_MOST = 1.5
"""Seconds that a worker is spared at most: a run of the sweep takes about two, and most are to be struck."""


Begin = Callable[[], "subprocess.Popen[bytes]"]
"""Another launch of the round's sweep on its store."""


@dataclass
class Figures:
    """What a campaign has done, and what it has found."""

    rounds: int = 0
    launches: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def fault(self, kind: str, note: str) -> None:
        self.faults[kind] += 1
        self.notes.append(f"{kind}: {note}")


LOSS, UPDATE = 1e-5, 3e-5
"""What a run in a pack may differ by from the run alone: its losses, relatively, and its ΔW, of its norm."""


def start(sweep: Path, results: Path, log: Path, pack: str) -> subprocess.Popen[bytes]:
    """`lorabench run`, in a session of its own."""
    command = [sys.executable, "-m", "lorabench", "run", str(sweep), "--results", str(results), "--workers", "2"]
    with open(log, "ab") as talk:
        return subprocess.Popen(
            [*command, "--pack", pack, "--device", "cpu", "--checkpoint-seconds", "0.3"],
            stdout=talk, stderr=talk, start_new_session=True,
        )  # fmt: skip


class Watch:
    """Looks at every record while the blows fall: one that was done must never change again."""

    def __init__(self, store: Store, figures: Figures):
        self._store, self._figures = store, figures
        self._done: dict[str, bytes] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._once()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self._once()

    def _once(self) -> None:
        for run_id in self._store.run_ids():
            with contextlib.suppress(OSError):
                content = (self._store.folder(run_id) / "record.json").read_bytes()
                if b'"status": "done"' not in content:
                    if run_id in self._done:
                        self._figures.fault("undone", f"{run_id}: its record was done, and is not any more")
                        del self._done[run_id]
                elif self._done.setdefault(run_id, content) != content:
                    self._figures.fault("done twice", f"{run_id}: its whole record was written again")
                    self._done[run_id] = content


class Battery:
    """One launch and what is done to it."""

    def __init__(self, begin: Begin, store: Store, blow: str, random_: random.Random, figures: Figures):
        self.begin, self.store, self.blow, self.random, self.figures = begin, store, blow, random_, figures
        self.launchers = [begin() for _ in range(2 if blow == "two" else 1)]

    def go(self) -> None:
        """Until every launcher has ended, one way or another."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        act = {"worker": self._kill_workers, "two": self._kill_workers, "stop": self._stop}.get(self.blow, self._kill)
        act(deadline)
        for launcher in self.launchers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(max(1.0, deadline - time.monotonic()))
            if launcher.poll() is None:
                what = f"after {self.blow}: the launcher has not ended in {PATIENCE_SECONDS:g} s"
                self.figures.fault("hung", f"{what}: {'; '.join(self._standing(launcher.pid))}")
                kill_tree(launcher.pid)
                launcher.wait()
        self._wait_for_orphans()

    @property
    def _going(self) -> bool:
        return any(launcher.poll() is None for launcher in self.launchers)

    def _workers(self) -> list[int]:
        """Processes that hold a claim."""
        launchers = {launcher.pid for launcher in self.launchers}
        claims = [state.claim for state in self.store.states()]
        return [claim.pid for claim in claims if claim and claim.is_alive() and claim.pid not in {0, *launchers}]

    def _standing(self, pid: int) -> Iterator[str]:
        """What a launcher that hangs waits for: its processes with their seconds of CPU, and the runs that go on."""
        with contextlib.suppress(psutil.Error):
            for each in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                yield f"process {each.pid} {each.status()} {sum(each.cpu_times()[:2]):.1f} s"
        for state in self.store.states():
            if state.status not in (Status.DONE, Status.MISSING):
                claim = state.claim
                yield f"{state.run_id} {state.status}" + (f" by {claim.pid} {claim.progress}" if claim else "")

    def _server(self) -> int | None:
        for launcher in self.launchers:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(launcher.pid).children():
                    if any("forkserver" in word for word in child.cmdline()):
                        return child.pid
        return None

    def _kill_workers(self, deadline: float) -> None:
        """Most workers at some moment of their work."""
        moments: dict[int, float] = {}
        while self._going and time.monotonic() < deadline:
            for pid in self._workers():
                if pid not in moments:
                    spared = self.random.random() < 0.25
                    moments[pid] = deadline if spared else time.monotonic() + self.random.uniform(0.0, AT_MOST)
                if time.monotonic() >= moments[pid] and self._signal(pid, signal.SIGKILL, self.blow):
                    moments[pid] = deadline
            time.sleep(0.02)

    def _kill(self, deadline: float) -> None:
        """The fork server (several times), the launcher, or all of them, some time after the first run has begun."""
        times = self.random.randint(1, 4) if self.blow == "server" else 1
        for _ in range(times):
            while self._going and not self._workers() and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(self.random.uniform(0.0, 2 * AT_MOST))
            if not self._going:
                return
            if self.blow == "server":
                server = self._server()
                if server is not None:
                    self._signal(server, signal.SIGKILL, "server")
            elif self.blow == "launcher":
                self._signal(self.launchers[0].pid, signal.SIGKILL, "launcher")
            else:
                self.figures.kills["tree"] += 1
                kill_tree(self.launchers[0].pid)

    def _stop(self, deadline: float) -> None:
        """Stopped and continued: workers, server or launcher; another launcher may begin meanwhile."""
        while self._going and time.monotonic() < deadline:
            time.sleep(self.random.uniform(0.2, AT_MOST))
            found = [*self._workers(), self._server(), self.launchers[0].pid]
            pid = self.random.choice([pid for pid in found if pid])
            if not self._signal(pid, signal.SIGSTOP, "stop"):
                continue
            if len(self.launchers) == 1 and self.random.random() < 0.3:
                self.launchers.append(self.begin())
            time.sleep(self.random.uniform(0.2, 4.0))
            self._signal(pid, signal.SIGCONT, None)

    def _signal(self, pid: int, number: int, counted: str | None) -> bool:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        if counted:
            self.figures.kills[counted] += 1
        return True

    def _wait_for_orphans(self) -> None:
        """A worker without its launcher writes its checkpoint and stops."""
        deadline = time.monotonic() + 60
        while self._workers():
            if time.monotonic() > deadline:
                self.figures.fault("orphan", f"after {self.blow}: a worker goes on without its launcher")
                for pid in self._workers():
                    self._signal(pid, signal.SIGKILL, None)
                return
            time.sleep(0.05)


def kill_tree(pid: int) -> None:
    """All processes that one has started, and it."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                each.kill()


def differences(got: Store, want: Store) -> list[tuple[str, str]]:
    """(kind, what) of every run that is not done, or of which a file, a loss or a step is not as it should be."""
    found = []
    for run_id in want.run_ids():
        ours, theirs = got.state(run_id), want.read(run_id)
        if ours.status != Status.DONE or ours.record is None:
            found.append(("lost", f"{run_id}: {ours.status}: {ours.error}"))
            continue
        assert theirs is not None
        if ours.record.files != theirs.files:
            found.append(("falsely done", f"{run_id}: other updates or snapshots than of a run left alone"))
        losses = [name for name in theirs.measures if name.endswith(("_loss", "_after", "forgetting"))]
        if any(ours.record.measures.get(name) != theirs.measures[name] for name in losses):
            found.append(("falsely done", f"{run_id}: other losses than of a run left alone"))
        steps = [(store.folder(run_id) / "steps.jsonl").read_bytes() for store in (got, want)]
        if steps[0] != steps[1]:
            found.append(("differing files", f"{run_id}: steps.jsonl"))
        for name in theirs.files:
            files = [store.folder(run_id) / name for store in (got, want)]
            if not files[0].is_file() or files[0].read_bytes() != files[1].read_bytes():
                found.append(("differing files", f"{run_id}: {name}"))
    return found


def apart(got: Store, want: Store) -> list[tuple[str, str]]:
    """The same where runs have been packed: what is not as it should be within LOSS and UPDATE."""
    found = []
    for run_id in want.run_ids():
        ours, theirs = got.state(run_id), want.read(run_id)
        if ours.status != Status.DONE or ours.record is None:
            found.append(("lost", f"{run_id}: {ours.status}: {ours.error}"))
            continue
        assert theirs is not None
        rows = [_losses(store, run_id) for store in (got, want)]
        if rows[0].keys() != rows[1].keys():
            found.append(("differing files", f"{run_id}: other rows in steps.jsonl"))
        elif others := [at for at, loss in rows[1].items() if not math.isclose(rows[0][at], loss, rel_tol=LOSS)]:
            found.append(("falsely done", f"{run_id}: other losses than alone, first {others[0]}"))
        if got.verified(ours).status != Status.DONE or ours.record.files.keys() != theirs.files.keys():
            found.append(("differing files", f"{run_id}: not those of its record, or of the run alone"))
            continue
        for folder in {Path(name).parent for name in theirs.files}:
            far = distance(*(store.folder(run_id) / folder for store in (got, want)))
            found += [("falsely done", f"{run_id}: {folder} is {far:.1e} of its norm away")] if far > UPDATE else []
    return found


def _losses(store: Store, run_id: str) -> dict[tuple[int, str], float]:
    """By step and name."""
    text = (store.folder(run_id) / "steps.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return {(row["step"], name): value for row in rows for name, value in row.items() if name.endswith("loss")}


def distance(one: Path, other: Path) -> float:
    """‖ΔW - ΔW'‖ / ‖ΔW'‖ over all layers of two folders."""
    first, second = ({u.parameter: u.dense().double() for u in read_updates(folder)} for folder in (one, other))
    between = sum(float((first[name] - second[name]).square().sum()) for name in second)
    return math.sqrt(between / sum(float(value.square().sum()) for value in second.values()))


def campaign(minutes: float, seed: int, say=print, pack: str = "off") -> Figures:
    """Rounds until the time is over; a round that has begun is ended. `pack`: how many runs at most in a process."""
    random_, figures = random.Random(seed), Figures()
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="lorabench-campaign-") as name:
        folder = Path(name)
        sweep = folder / "sweep.toml"
        sweep.write_text(SWEEP)
        alone = Store(folder / "alone")
        code = start(sweep, alone.root, folder / "alone.log", "off").wait(600)
        assert code == 0, (folder / "alone.log").read_text()
        while time.monotonic() < end or not figures.rounds:
            store = Store(folder / f"round{figures.rounds}")
            begin = partial(start, sweep, store.root, folder / f"{store.root.name}.log", pack)
            _round(store, begin, random_, figures)
            for kind, what in (differences if pack == "off" else apart)(store, alone):
                figures.fault(kind, what)
            figures.rounds += 1
            say(f"round {figures.rounds}: {sum(figures.kills.values())} kills, faults: {dict(figures.faults) or 0}")
    return figures


def _round(store: Store, begin: Begin, random_: random.Random, figures: Figures) -> None:
    with Watch(store, figures):
        for _ in range(random_.randint(FEWEST_LAUNCHES, MOST_LAUNCHES)):
            if store.run_ids() and all(state.status == Status.DONE for state in store.states()):
                break
            figures.launches += 1
            Battery(begin, store, random_.choice(BLOWS), random_, figures).go()
        for _ in range(2):  # what a kill has left is taken up by asking again, without --retry
            figures.launches += 1
            code = begin().wait(600)
        if code:
            log = store.root.with_suffix(".log").read_text()
            figures.fault("not taken up", f"exit code {code} of a launch left alone:\n{log[-1500:]}")
