"""Each file of a store damaged in every way: commands end with their exit codes and a line a fault, no traceback.

All in one process, with what draws and what computes left out: some hundred cases in seconds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorabench.analysis import analyze
from lorabench.cli import main
from lorabench.cluster.enqueue import Plan, new_name, write_jobs, write_plan
from lorabench.cluster.queue import Array
from lorabench.config.digests import file_digests
from lorabench.config.durable import write_json
from lorabench.config.quote import LINE
from lorabench.launch.pool import Outcome, _Launch
from lorabench.report import outputs
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep, parse_sweep
from lorabench.store.claim import take
from lorabench.store.record import RunRecord, Status
from lorabench.store.steps import write_steps
from lorabench.store.store import Store

TEXT = """
name = "small"
[base]
model = "builtin:tiny-llama"
method.name = "lora"
task.name = "text"
task.data = "builtin:python-code"
method.rank = [1, 2, 4]
[[table]]
rows = ["method.rank"]
value = "valid_loss"
"""
HUGE, LARGE = int("9" * 400), 2**70


def deep(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "cut": lambda old: old[: len(old) // 2],
    "no Unicode": lambda old: b"\xff\xfe" + old,
    "half a surrogate": lambda old: json.dumps({"error": "\ud800"}).encode(),
    "nulls": lambda old: b"null",
    "zeros": lambda old: b"\0" * len(old),
    "a list": lambda old: b"[" + old + b"]",
    "nested": lambda old: b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    "digits": lambda old: b'{"status": ' + b"9" * 9000 + b"}",
    "other keys": lambda old: b'{"\\u001b[2J": 1}',
}
VALUES = {
    "null": None,
    "number": 1,
    "negative": -LARGE,
    "huge": HUGE,
    "not a number": float("nan"),
    "infinite": float("inf"),
    "text": "x" * 5000,
    "control": "\x1b[2J\n\ud800",
    "outside": "../../../secret",
    "absolute": "/etc/passwd",
    "list": [1, "x"],
    "table": {"status": HUGE, "../../../secret": "x"},
    "nested": deep(200),
}


def places(table: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys on the way to each value of a JSON table; of what is nested, the first two stand for all."""
    items = (
        list(table.items()) if isinstance(table, dict) else list(enumerate(table)) if isinstance(table, list) else []
    )
    for key, value in items if len(path) == 0 else items[:2]:
        yield (*path, key)
        yield from places(value, (*path, key))


def replaced(table: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = list(table) if isinstance(table, list) else dict(table)
    copy[path[0]] = replaced(table[path[0]], path[1:], value)
    return copy


class Small:
    """A results folder: three runs that are done, one of them submitted, and the sweep's stamps."""

    def __init__(self, root: Path):
        self.root, self.store = root, Store(root)
        self.sweep: Sweep = parse_sweep(tomllib.loads(TEXT), default_name="small")
        for number, spec in enumerate(self.sweep.runs):
            self._add(spec, 2.0 + number)
        folder = root / "small"
        folder.mkdir()
        (folder / "sweep.toml").write_text(TEXT)
        (folder / "old.pdf").write_text("x")
        write_json(folder / ".report.json", {"inputs": "x", "files": ["old.pdf"]})
        write_json(folder / ".analyze.json", {"key": "x", "files": ["old.pdf"], "runs": [self.sweep.runs[0].id]})
        spec = self.sweep.runs[0]
        plan = Plan(
            sweep="small", cluster="here", kind="local", slurm_cluster=None, profile={}, retry={},
            specs={spec.id: spec.to_json()}, jobs=[[spec.id]], arrays=[(0, 1)],
        )  # fmt: skip
        write_jobs(write_plan(root, new_name("small"), plan), [Array(first=0, count=1, job_id="1")])

    def _add(self, spec: RunSpec, loss: float) -> None:
        self.store.write_spec(spec)
        folder = self.store.folder(spec.id)
        hold = take(folder, {"phase": "train", "step": 1, "steps": 2, "loss": 2.5, "tokens_per_second": 9.0})
        assert hold is not None
        with hold:
            (folder / "updates").mkdir()
            (folder / "updates" / "delta.safetensors").write_bytes(os.urandom(64))
            (folder / "log.txt").write_text("begun\n")
            record = RunRecord(
                run_id=spec.id, spec=spec.to_json(), status=Status.DONE, started="2026-01-01T00:00:00+00:00",
                measures={"valid_loss": loss, "total_seconds": 3.0, "peak_gib": 1.0, "train_seconds": 2.0},
                environment={"packages": {"torch": "2"}, "git": {"dirty": True}, "hardware": {"device": "cpu"}},
                provenance={"update": "against the base"}, sequence={"tasks": ["a"], "matrices": {"loss": [[1.0]]}},
                files=file_digests(folder / "updates", folder),
                steps_sha256=write_steps(folder / "steps.jsonl", ["{}\n"]),
            )  # fmt: skip
            self.store.write(record)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("whole") / "results")


@pytest.fixture(autouse=True)
def without_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """`report` draws no figure and decomposes no matrix, `run` starts nothing: all else is as it is."""

    def go(self: _Launch) -> Outcome:
        self._sort()
        return Outcome(states=[self.store.state(spec.id, spec) for spec in self.sweep.runs])

    monkeypatch.setattr(_Launch, "go", go)
    monkeypatch.setattr(analyze, "analyze", lambda *_, **__: {})
    monkeypatch.setattr(outputs, "named_figures", lambda _: {})


class Case:
    """A copy of the store in which one file is damaged, and what the commands say of it."""

    def __init__(self, whole: Small, root: Path, capsys: pytest.CaptureFixture[str]):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(whole.root, root, symlinks=True)
        self.root, self.store, self._capsys = root, Store(root), capsys

    def call(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        """What it prints on stdout; what it says is one bounded line a fault."""
        code = main([*arguments])
        out, told = self._capsys.readouterr()
        assert code in codes, f"{arguments}: {code}: {told}"
        lines = told.splitlines()
        assert len(lines) <= 8 and "Traceback" not in told and all(len(line) < LINE + 200 for line in lines), told
        assert not any(c in told + out for c in "\x1b\x00")
        return out

    def statuses(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> dict[str, str]:
        rows = json.loads(self.call("status", str(self.root), "--json", *arguments, codes=codes))["runs"]
        return {row["run_id"]: row["status"] for row in rows}


def check(case: Case, whole: Small, damaged: str, fully: bool) -> None:
    """Every run but the damaged one is shown as done, by each command."""
    others = {spec.id for spec in whole.sweep.runs if spec.id != damaged}
    found = case.statuses("--verify", codes=(0, 1))
    assert all(found[run_id] == "done" for run_id in others)
    assert found.get(damaged, "missing") in ("done", "corrupt", "missing", "failed", "lost", "interrupted")
    case.call("run", str(case.root / "small" / "sweep.toml"), "--results", str(case.root), codes=(0, 1))
    if fully:
        case.call("status", str(case.root))
        case.call("logs", damaged, "--results", str(case.root), codes=(0, 1, 2))
        is_taken = any(
            file.is_dir() for file in (case.root / "small").glob(".*.json")
        )  # a folder, where it would write
        case.call("report", str(case.root), "small", codes=(2,) if is_taken else (0, 1))
        assert (case.root.parent / "secret").read_text() == "mine"


RUN_FILES = ["spec.json", "record.json", "steps.jsonl", "log.txt", "claims/0001.json", "updates/delta.safetensors"]
OTHERS = ["small/.report.json", "small/.analyze.json", "queue/*/plan.json", "queue/*/jobs.json"]


def find(root: Path, pattern: str, run_id: str) -> Path:
    if pattern in RUN_FILES:
        return root / "runs" / run_id / pattern
    (file,) = root.glob(pattern)
    return file


@pytest.mark.parametrize("name", [*RUN_FILES, *OTHERS])
def test_a_file_damaged_as_a_whole(name: str, whole: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "secret").write_text("mine")
    damaged = whole.sweep.runs[0].id
    for kind, damage in BYTES.items():
        case = Case(whole, tmp_path / "results", capsys)
        file = find(case.root, name, damaged)
        file.write_bytes(damage(file.read_bytes()))
        check(case, whole, damaged, fully=kind in ("cut", "nested"))
    for swap in (Path.unlink, into_folder, into_pipe, into_dangling, lambda file: file.rename(f"{file}.old")):
        case = Case(whole, tmp_path / "results", capsys)
        swap(find(case.root, name, damaged))
        check(case, whole, damaged, fully=swap is into_folder)


def into_folder(file: Path) -> None:
    file.unlink()
    (file / "inner").mkdir(parents=True)


def into_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def into_dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


@pytest.mark.parametrize("name", ["record.json", "claims/0001.json", *OTHERS])
def test_a_value_of_another_kind(name: str, whole: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every value of every file, by turns: hundreds of cases."""
    (tmp_path / "secret").write_text("mine")
    damaged = whole.sweep.runs[0].id
    table = json.loads(find(whole.root, name, damaged).read_text())
    kinds = list(VALUES)
    case = Case(whole, tmp_path / "results", capsys)
    file = find(case.root, name, damaged)
    for number, path in enumerate(places(table)):
        for kind in kinds[number % 6 :: 6]:
            file.write_text(json.dumps(replaced(table, path, VALUES[kind])))
            found = case.statuses()
            assert all(found[spec.id] == "done" for spec in whole.sweep.runs[1:]), (path, kind)
            if number % 2:
                case.call("status", str(case.root))
            if name in ("record.json", "small/.report.json") and kind in ("outside", "table") and number % 3 == 0:
                case.call("report", str(case.root), "small", codes=(0, 1))
                assert (tmp_path / "secret").read_text() == "mine"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "is gone"),
        (
            lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 255]) + file.read_bytes()[1:]),
            "has changed since it was written",
        ),
        (lambda file: file.write_bytes(b""), "has changed since it was written"),
        (into_folder, "is no file"),
        (into_dangling, "is a link"),
    ],
)
@pytest.mark.parametrize("name", ["updates/delta.safetensors", "steps.jsonl"])
def test_files_that_are_gone_or_changed_are_found_and_made_again_when_asked(
    name: str, damage: Callable[[Path], object], reason: str, whole: Small, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    case, damaged = Case(whole, tmp_path / "results", capsys), whole.sweep.runs[1].id
    assert set(case.statuses("--verify").values()) == {"done"}
    damage(case.store.folder(damaged) / name)
    assert set(case.statuses().values()) == {"done"}
    found = case.statuses("--verify", codes=(1,))
    assert found == {spec.id: "corrupt" if spec.id == damaged else "done" for spec in whole.sweep.runs}
    assert f"{name}: {reason}" in case.call("status", str(case.root), "--verify", codes=(1,))
    sweep = str(case.root / "small" / "sweep.toml")
    case.call("run", sweep, "--results", str(case.root))
    assert set(case.statuses().values()) == {"done"}
    case.call("run", sweep, "--results", str(case.root), "--retry", "corrupt", codes=(1,))
    assert case.store.state(damaged).status == Status.MISSING
    (shelf,) = (case.root / "runs" / ".corrupt").iterdir()
    assert shelf.name == f"{damaged}.1" and (shelf / "record.json").is_file()


def test_a_record_whose_spec_is_gone_is_held_against_its_folder(whole: Small, tmp_path: Path) -> None:
    shutil.copytree(whole.root, tmp_path / "results")
    store, (one, two, _) = Store(tmp_path / "results"), whole.sweep.runs
    (store.folder(one.id) / "spec.json").unlink()
    assert store.state(one.id).status == Status.DONE
    file = store.folder(one.id) / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"spec": two.to_json()}))
    state = store.state(one.id)
    assert state.status == Status.CORRUPT and "its spec is not the run's" in state.error


def file_for_the_run(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("junk")


def file_for_the_claims(folder: Path) -> None:
    (folder / "record.json").unlink()
    shutil.rmtree(folder / "claims", ignore_errors=True)
    (folder / "claims").write_text("junk")


def run_that_links_to_itself(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


def record_that_links_to_itself(folder: Path) -> None:
    (folder / "record.json").unlink()
    (folder / "record.json").symlink_to(folder / "record.json")


def loss_that_is_none(folder: Path) -> None:
    table = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(table | {"measures": {"valid_loss": float("nan")}}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (file_for_the_run, "is no folder"),
        (run_that_links_to_itself, "is no folder"),
        (file_for_the_claims, "claims: is no folder"),
        (record_that_links_to_itself, "record.json: cannot be read"),
        (loss_that_is_none, "measures.valid_loss = nan: must be finite in a run that is done"),
    ],
)
def test_what_stands_in_the_place_of_something_else_is_one_run_s_damage(
    damage: Callable[[Path], object], reason: str, whole: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, damaged = Case(whole, tmp_path / "results", capsys), whole.sweep.runs[1].id
    damage(case.store.folder(damaged))
    found = case.statuses(codes=(0, 1))
    assert found == {spec.id: "corrupt" if spec.id == damaged else "done" for spec in whole.sweep.runs}
    assert reason in case.store.state(damaged).error
    sweep = str(case.root / "small" / "sweep.toml")
    case.call("run", sweep, "--results", str(case.root), codes=(1,))
    case.call("run", sweep, "--results", str(case.root), "--retry", "corrupt", codes=(1,))
    assert case.store.state(damaged).status == Status.MISSING
    assert [found.name for found in (case.root / "runs" / ".corrupt").iterdir()] == [f"{damaged}.1"]


def test_a_spec_that_is_gone_is_found_when_asked(whole: Small, tmp_path: Path) -> None:
    shutil.copytree(whole.root, tmp_path / "results")
    store, (one, two, _) = Store(tmp_path / "results"), whole.sweep.runs
    (store.folder(one.id) / "spec.json").unlink()
    found = [store.verified(store.state(spec.id)) for spec in (one, two)]
    assert [state.status for state in found] == [Status.CORRUPT, Status.DONE] and "is gone" in found[0].error


def test_measures_that_are_not_finite_are_nan(whole: Small, tmp_path: Path) -> None:
    shutil.copytree(whole.root, tmp_path / "results")
    store, spec = Store(tmp_path / "results"), whole.sweep.runs[0]
    file = store.folder(spec.id) / "record.json"
    measures = {"valid_loss": 2.0, "merge_error": float("nan"), "forgetting": float("inf")}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"measures": measures}))
    read = store.read(spec.id).measures
    assert read.pop("valid_loss") == 2.0 and read.keys() == measures.keys() - {"valid_loss"}
    assert all(math.isnan(value) for value in read.values())
