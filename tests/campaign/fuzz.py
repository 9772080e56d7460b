"""Damaged adapters, sweep files, cluster profiles and stores: each must give a result, or one clear error.

Thousands of cases a process: it imports torch once. A case is named by its kind, seed and number, and can be run alone:
`python -m tests.campaign.fuzz adapters SEED NUMBER`.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "tests" / "fixtures" / "adapters"
SLOW_SECONDS, STUCK_SECONDS = 10.0, 120.0
"""Of the processor and of the clock: on a machine that does other things a case may take long and be quick."""
MOST_BYTES, BATCH = 2 * 2**30, 2000
LONGEST_LINE = 3000
"""Of a message: a value is cut to 80 letters, but the choices that it tells are all there."""


@dataclass
class Figures:
    """How many cases of each kind, how they ended, and what should not have happened."""

    cases: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        self.cases += other.cases
        self.refused += other.refused
        self.seconds += other.seconds
        self.slowest_seconds = max(self.slowest_seconds, other.slowest_seconds)
        self.faults += other.faults
        self.notes += other.notes


class Slow(BaseException):
    """A case that goes on for too long; no `except Exception` takes it for something else."""


Case = Callable[[random.Random, Path], None]


def adapters() -> Case:
    """A fixture of some format, its tensors, configuration or bytes damaged, opened and read whole."""
    from lorabench.updates import formats
    from tests.campaign.mutations import change_tensors, changed_bytes, changed_json

    fixtures = sorted(path / "adapter" for path in ADAPTERS.iterdir() if (path / "adapter").is_dir())

    def case(random_: random.Random, folder: Path) -> None:
        source = folder / "adapter"
        shutil.copytree(random_.choice(fixtures), source)
        files = sorted(file for file in source.rglob("*") if file.is_file())
        for _ in range(random_.randint(1, 2)):
            file = random_.choice(files)
            if file.suffix == ".safetensors" and random_.random() < 0.8:
                change_tensors(file, random_)
            elif file.suffix == ".json":
                file.write_bytes(changed_json(file.read_bytes(), random_))
            else:
                file.write_bytes(changed_bytes(file.read_bytes(), random_))
        alpha = random_.choice((None, None, 8.0))
        opened = formats.open_adapter(source if random_.random() < 0.8 else files[-1], alpha=alpha)
        for _ in formats.load_layers(opened):
            pass

    return case


def sweeps() -> Case:
    """A shipped sweep, some of its lines changed, read and expanded."""
    from lorabench.spec.sweep import read_sweep
    from tests.campaign.mutations import changed_text

    texts = [file.read_text() for file in sorted((ROOT / "sweeps").glob("*.toml"))]

    def case(random_: random.Random, folder: Path) -> None:
        text = random_.choice(texts)
        for _ in range(random_.randint(1, 3)):
            text = changed_text(text, random_)
        file = folder / "sweep.toml"
        file.write_text(text, "utf-8", errors="surrogateescape")
        read_sweep(file)

    return case


def profiles() -> Case:
    """A shipped cluster profile, some of its lines changed, read."""
    from lorabench.cluster.profile import read_profile
    from tests.campaign.mutations import changed_text

    texts = [file.read_text() for file in sorted((ROOT / "slurm").glob("*.toml"))]

    def case(random_: random.Random, folder: Path) -> None:
        text = random_.choice(texts)
        for _ in range(random_.randint(1, 3)):
            text = changed_text(text, random_)
        file = folder / "profile.toml"
        file.write_text(text, "utf-8", errors="surrogateescape")
        read_profile(file)

    return case


def stores() -> Case:
    """A store of done and failed runs with a file or two damaged: `status`, `logs`, and now and then the report."""
    from lorabench import cli
    from lorabench.cluster.enqueue import Plan, new_name, write_jobs, write_plan
    from lorabench.cluster.queue import Array
    from lorabench.config.durable import write_json
    from lorabench.store.claim import take
    from lorabench.store.store import Store
    from tests import synthetic
    from tests.campaign.mutations import changed_json

    whole = Path(tempfile.mkdtemp(prefix="lorabench-fuzz-"))
    text = synthetic.TEXT.replace("rank = [1, 4, 16, 64]", "rank = [1, 4]").replace("seed = [0, 1, 2]", "seed = [0, 1]")
    store = Store(whole)
    sweep = synthetic.fill(store, synthetic.read(text))
    for spec in sweep.runs[:3]:
        folder = store.folder(spec.id)
        hold = take(folder)
        assert hold is not None
        with hold:
            hold.progress |= {"phase": "train", "step": 1, "steps": 2, "loss": 2.5, "tokens_per_second": 100.0}
        (folder / "steps.jsonl").write_text('{"step": 1, "loss": 2.5}\n' * 3)
        (folder / "log.txt").write_text("begun\n")
    (whole / "quickstart").mkdir()
    (whole / "quickstart" / "sweep.toml").write_text(text)
    write_json(whole / "quickstart" / ".report.json", {"inputs": "x", "files": ["report.html"]})
    plan = Plan(
        sweep="quickstart", cluster="here", kind="local", slurm_cluster=None, profile={}, retry={},
        specs={spec.id: spec.to_json() for spec in sweep.runs[:2]}, jobs=[[spec.id] for spec in sweep.runs[:2]],
        arrays=[(0, 2)],
    )  # fmt: skip
    submission = write_plan(whole, new_name("quickstart"), plan)
    write_jobs(submission, [Array(first=0, count=2, job_id="1")])

    def case(random_: random.Random, folder: Path) -> None:
        root = folder / "results"
        shutil.copytree(whole, root)
        files = sorted(file for file in root.rglob("*.json*") if file.is_file())
        for file in random_.sample(files, random_.randint(1, 3)):
            act = random_.random()
            if act < 0.05:
                file.unlink()
                file.mkdir()
            elif act < 0.1:
                file.unlink()
            else:
                file.write_bytes(changed_json(file.read_bytes(), random_))
        run = random_.choice(sweep.runs).id
        commands = [["status", str(root), "--json"], ["status", str(root)], ["logs", run, "--results", str(root)]]
        command = ["report", str(root)] if random_.random() < 0.002 else random_.choice(commands)
        talk = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(talk):
            code = cli.main(command)
        told = talk.getvalue()
        assert code in (0, 1, 2), f"exit code {code}"
        _check_message(told)

    return case


KINDS: dict[str, Callable[[], Case]] = {
    "adapters": adapters, "sweeps": sweeps, "profiles": profiles, "stores": stores,
}  # fmt: skip


def _check_message(text: str) -> None:
    lines = text.splitlines() or [""]
    assert max(map(len, lines)) <= LONGEST_LINE, f"a message of {max(map(len, lines))} letters: {text[:200]}"
    assert all(letter.isprintable() or letter in "\t\n" for letter in text), f"control characters: {text[:200]!r}"


def run_case(case: Case, kind: str, seed: int, number: int, figures: Figures) -> None:
    """One case in a folder of its own; what it should not do goes into the figures."""
    from lorabench.config.decode import InputError

    def note(fault: str, detail: str) -> None:
        figures.faults[fault] += 1
        figures.notes.append(f"{fault}: {kind} {seed} {number}: {detail}")

    begin = time.process_time()
    figures.cases[kind] += 1
    with tempfile.TemporaryDirectory(prefix="lorabench-fuzz-", dir=_fast_folder()) as folder:
        signal.setitimer(signal.ITIMER_PROF, SLOW_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, STUCK_SECONDS)
        try:
            case(random.Random(f"{kind} {seed} {number}"), Path(folder))
        except InputError as error:
            figures.refused += 1
            if wrong := _wrong_message(str(error)):
                note("message", wrong)
        except Slow:
            note("slow", f"over {SLOW_SECONDS:g} s of the processor, or {STUCK_SECONDS:g} s of the clock")
        except Exception:
            note("traceback", "".join(traceback.format_exc().splitlines(keepends=True)[-5:]))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    figures.slowest_seconds = max(figures.slowest_seconds, time.process_time() - begin)


def _wrong_message(text: str) -> str:
    try:
        _check_message(text)
    except AssertionError as error:
        return str(error)
    return ""


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _prepare() -> None:
    """What each process does once: quiet libraries, an alarm that raises, and a bound on memory."""
    import torch

    def ring(*_: Any) -> None:
        raise Slow

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, ring)
    signal.signal(signal.SIGPROF, ring)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _batch(kind: str, seed: int, first: int, count: int, answer: Connection) -> None:
    """In a process of its own: cases one after another; tells each number before it begins, and the figures at last."""
    case, figures = KINDS[kind](), Figures()
    _prepare()
    begin = time.perf_counter()
    for number in range(first, first + count):
        answer.send(number)
        run_case(case, kind, seed, number, figures)
    figures.seconds = time.perf_counter() - begin
    answer.send(figures)


def campaign(num_cases: int, seed: int, say: Callable[[str], None] = print) -> Figures:
    """So many cases, shared out among the kinds; two processes at a time."""
    total, context = Figures(), get_context("spawn")
    shares = {"adapters": 0.45, "sweeps": 0.25, "profiles": 0.1, "stores": 0.2}
    for kind, share in shares.items():
        count, first = round(num_cases * share), 0
        while first < count:
            size = min(BATCH, count - first)
            first += _watched(context, kind, seed, first, size, total)
        say(f"{kind}: {total.cases[kind]} cases; faults so far: {dict(total.faults) or 0}")
    return total


def _watched(context: Any, kind: str, seed: int, first: int, count: int, total: Figures) -> int:
    """Run a batch; how many cases it came through. One that ends the process is a fault, and the rest goes on."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_batch, args=(kind, seed, first, count, there))
    process.start()
    there.close()
    number = first
    with contextlib.suppress(EOFError):
        while isinstance(told := here.recv(), int):
            number = told
        process.join()
        total.add(told)
        return count
    process.join()
    total.cases[kind] += number + 1 - first
    total.faults["ended the process"] += 1
    total.notes.append(f"ended the process: {kind} {seed} {number}: exit code {process.exitcode}")
    return number + 1 - first


if __name__ == "__main__":
    kind, seed, number = sys.argv[1], *map(int, sys.argv[2:4])
    _prepare()
    only = Figures()
    run_case(KINDS[kind](), kind, seed, number, only)
    print("\n".join(only.notes) or f"refused {only.refused}, no fault")
