"""Claims: of any number of workers exactly one gets a run, whoever died before."""

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorabench.store import claim
from lorabench.store.claim import STALE_SECONDS, Claim, Lost, current_claim, take
from tests.store import other_processes
from tests.store.test_record import refuse

ROUNDS = 60


def race(root: Path) -> list[int]:
    """Winners of each round between three processes."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=other_processes.race, args=(str(root), ROUNDS, barrier, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=10)
    return [sum(winners) for winners in zip(*outcomes, strict=True)]


def write_claim(folder: Path, **fields: object) -> Claim:
    values = {
        "number": 1,
        "host": "h",
        "machine": claim._machine(),
        "pid": 2**22 + 1,
        "process_start": "1",
        "time": time.time(),
    } | fields
    (folder / "claims").mkdir(parents=True, exist_ok=True)
    file = folder / "claims" / f"{values['number']:04d}.json"
    file.write_text(json.dumps(values))
    os.utime(file, (values["time"],) * 2)
    return Claim(**values)


def test_of_racing_processes_exactly_one_gets_a_fresh_run(tmp_path: Path) -> None:
    assert race(tmp_path) == [1] * ROUNDS


def test_a_dead_owner_is_followed_by_exactly_one(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        write_claim(tmp_path / str(number))
    assert race(tmp_path) == [1] * ROUNDS
    assert {current_claim(tmp_path / str(number)).number for number in range(ROUNDS)} == {2}


def test_a_live_claim_is_kept_and_a_released_one_is_free(tmp_path: Path) -> None:
    first = take(tmp_path)
    with first:
        assert current_claim(tmp_path).is_alive()
        assert take(tmp_path) is None
    assert not current_claim(tmp_path).is_alive()
    second = take(tmp_path)
    assert second.number == 2
    with pytest.raises(Lost):
        first.check()
    second.check()


@pytest.mark.parametrize(("age", "alive"), [(0, True), (STALE_SECONDS - 5, True), (STALE_SECONDS + 5, False)])
def test_an_owner_on_another_machine_lives_as_long_as_its_heartbeat(tmp_path: Path, age: float, alive: bool) -> None:
    write_claim(tmp_path, machine="elsewhere", time=time.time() - age)
    assert current_claim(tmp_path).is_alive() is alive
    assert (take(tmp_path) is None) is alive


@pytest.mark.parametrize("ahead", [-1000, 1000])
@pytest.mark.parametrize("whose", ["writer", "reader"])
def test_clocks_that_differ_neither_kill_nor_revive_an_owner(
    whose: str, ahead: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of two machines; what counts is the age of the file by the clock that dates it."""
    now = time.time()
    if whose == "reader":
        clock = SimpleNamespace(time=lambda: now + ahead, monotonic=time.monotonic, sleep=time.sleep)
        monkeypatch.setattr(claim, "time", clock)
    monkeypatch.setattr(claim, "_LEADS", {})
    for name, age, alive in (("live", 0, True), ("dead", STALE_SECONDS + 5, False)):
        folder = tmp_path / name
        write_claim(folder, machine="elsewhere", time=now - age + (ahead if whose == "writer" else 0))
        os.utime(folder / "claims" / "0001.json", (now - age,) * 2)
        assert current_claim(folder).is_alive() is alive
        assert (take(folder) is None) is alive
        assert sorted(os.listdir(folder / "claims")) == ["0001.json"] + ["0002.json"] * (not alive)


class Clocks:
    """Those of a reader, of an owner on another machine, and of what dates their files; each can be set."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.passed = folder, 0.0
        self.reader = self.files = time.time()
        patch.setattr(claim, "_LEADS", {})
        patch.setattr(claim, "_STILL", {})
        patch.setattr(claim, "_lead", lambda folder: self.reader - self.files)
        clock = SimpleNamespace(time=lambda: self.reader, monotonic=lambda: self.passed, sleep=self.wait)
        patch.setattr(claim, "time", clock)
        self.lives = True
        self.beat()

    def beat(self) -> None:
        write_claim(self.folder, machine="elsewhere", time=self.files)

    def wait(self, seconds: float) -> None:
        """Time passes, and the owner beats every two seconds as long as it lives."""
        end = self.passed + seconds
        while self.passed < end:
            step = min(2.0, end - self.passed)
            self.passed, self.reader, self.files = self.passed + step, self.reader + step, self.files + step
            if self.lives:
                self.beat()


@pytest.mark.parametrize("step", [-3600, -600, 600, 3600])
@pytest.mark.parametrize("whose", ["reader", "files", "both"])
def test_a_clock_that_is_set_neither_kills_nor_revives_an_owner(
    whose: str, step: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`both`: two containers on one machine, or its disk."""
    monkeypatch.setattr(claim, "LOOK_AGAIN_SECONDS", 6.0)
    clocks = Clocks(tmp_path, monkeypatch)
    assert current_claim(tmp_path).is_alive()
    clocks.wait(4)
    clocks.reader += step if whose != "files" else 0
    clocks.files += step if whose != "reader" else 0
    if whose == "reader":
        assert current_claim(tmp_path).is_alive()
    assert take(tmp_path) is None  # also where it was set between two heartbeats
    clocks.wait(4)
    assert current_claim(tmp_path).is_alive()
    clocks.lives = False
    clocks.wait(STALE_SECONDS + 5)
    assert not current_claim(tmp_path).is_alive() and take(tmp_path).number == 2


def test_many_dead_owners_are_looked_at_twice_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `status` does after a node's end: it first reads all claims, and then takes what was on it."""
    slept: list[float] = []
    clock = SimpleNamespace(time=time.time, monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(claim, "time", clock)
    monkeypatch.setattr(claim, "LOOK_AGAIN_SECONDS", 0.5)
    folders = [tmp_path / str(number) for number in range(20)]
    for folder in folders:
        write_claim(folder, machine="elsewhere", time=time.time() - STALE_SECONDS - 5)
        assert not current_claim(folder).is_alive()
    assert all(take(folder) for folder in folders)
    assert sum(slept) == 0.5


def test_a_later_process_with_the_same_pid_is_not_the_owner(tmp_path: Path) -> None:
    write_claim(tmp_path, pid=os.getpid(), process_start="1")
    assert not current_claim(tmp_path).is_alive()
    write_claim(tmp_path, pid=os.getpid(), process_start=claim.process_start(os.getpid()))
    assert current_claim(tmp_path).is_alive()


def test_a_claim_that_was_never_written_is_respected_only_while_fresh(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    file = tmp_path / "claims" / "0001.json"
    file.write_text("")
    assert take(tmp_path) is None
    os.utime(file, (time.time() - STALE_SECONDS - 5,) * 2)
    assert take(tmp_path).number == 2


def test_a_claim_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with take(tmp_path, {"job": "5"}):
        refuse(monkeypatch, "0001.json", errno.ESTALE, times=2)
        assert current_claim(tmp_path).progress == {"job": "5"}


@pytest.mark.parametrize(("age", "alive"), [(0, True), (STALE_SECONDS + 5, False)])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_claim_that_cannot_be_read_lives_while_its_file_is_fresh(
    number: int, age: float, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_claim(tmp_path, number=3)
    os.utime(tmp_path / "claims" / "0003.json", (time.time() - age,) * 2)
    refuse(monkeypatch, "0003.json", number)
    found = current_claim(tmp_path)
    assert found and found.number == 3 and found.is_alive() is alive
    hold = take(tmp_path)
    assert hold is None if alive else hold and hold.number == 4


def test_claims_that_cannot_be_listed_are_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_claim(tmp_path)

    def refuse(folder: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(claim.os, "listdir", refuse)
    assert current_claim(tmp_path).is_alive() and take(tmp_path) is None
    os.utime(tmp_path / "claims", (time.time() - STALE_SECONDS - 5,) * 2)
    assert not current_claim(tmp_path).is_alive() and take(tmp_path) is None


def test_the_heartbeat_carries_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.02)
    with take(tmp_path) as hold:
        born = current_claim(tmp_path).time
        hold.progress |= {"phase": "train", "step": 3}
        deadline = time.monotonic() + 5
        while not current_claim(tmp_path).progress:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert current_claim(tmp_path).progress == {"phase": "train", "step": 3}
        assert current_claim(tmp_path).time > born
