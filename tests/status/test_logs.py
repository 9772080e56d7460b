"""Logs: which run is meant, its last lines, and what is added until it ends."""

import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.cli import main
from lorabench.status import logs
from lorabench.status.logs import find_run, follow, last_lines
from lorabench.store.claim import take
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests import fake_runs
from tests.fake_slurm import FakeSlurm, submitted
from tests.fake_slurm import slurm_commands as slurm_commands

SPECS = list(fake_runs.sweep(*range(3)).runs)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of two runs that were submitted in one job, the first has begun."""
    store = Store(tmp_path / "results")
    folder = submitted(store.root, [SPECS[:2]], ["5"])
    store.write_spec(SPECS[0])
    (store.folder(SPECS[0].id) / "log.txt").write_text("one\ntwo\nthree\n")
    (folder / "submitit").mkdir()
    (folder / "submitit" / "5_0_log.out").write_text("of the job\n")
    (folder / "submitit" / "5_0_log.err").write_text("module: command not found\n")
    (folder / "submitit" / "55_0_log.out").write_text("of another job\n")
    return store


def call(store: Store, *arguments: str) -> int:
    return main(["logs", *arguments, "--results", str(store.root)])


@given(st.lists(st.text("ab é✓", max_size=9), max_size=30), st.booleans(), st.integers(0, 12), st.integers(1, 64))
def test_last_lines_are_those_of_the_whole_text(lines: list[str], ends: bool, count: int, block: int) -> None:
    """Read from the end in blocks, which may begin inside a character."""
    text = "\n".join(lines) + "\n" * ends
    with tempfile.NamedTemporaryFile() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "BLOCK", block)
        Path(file.name).write_text(text)
        found = last_lines(Path(file.name), count)
    whole = text.splitlines()
    assert found == whole[max(0, len(whole) - count) :]


def test_a_run_is_named_by_its_beginning_or_the_closest(store: Store) -> None:
    first, second = SPECS[0].id, SPECS[1].id
    assert find_run(store, first) == first and find_run(store, second) == second  # the second has no folder
    length = next(n for n in range(len(first)) if first[:n] != second[:n])
    assert find_run(store, first[:length]) == first
    assert find_run(store, f"{store.folder(first)}/") == first  # as a shell completes it
    with pytest.raises(Exception, match="no such run"):
        find_run(store, f"{store.root}/elsewhere/{first}")
    with pytest.raises(Exception, match=f"RUN = {first[: length - 1]}: begins 2 runs: "):
        find_run(store, first[: length - 1])
    with pytest.raises(Exception, match=f"Did you mean '{first}'"):
        find_run(store, "x" + first[1:])


def test_the_log_of_a_run_and_of_its_job(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(store, SPECS[0].id) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
    assert call(store, SPECS[0].id, "--lines", "2") == 0
    assert capsys.readouterr().out == "two\nthree\n"
    assert call(store, SPECS[1].id, "--job") == 0
    out = capsys.readouterr().out
    assert "of the job" in out and "module: command not found" in out and "of another job" not in out


def test_what_has_no_log_yet_says_how_it_stands(
    store: Store, slurm_commands: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm_commands.queue({"5": "PENDING Priority"})
    assert call(store, SPECS[1].id) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"{SPECS[1].id}: no log yet: pending (Priority)" in err
    store.write_spec(SPECS[2])
    assert call(store, SPECS[2].id, "--job") == 1
    assert "was never submitted: it has no job" in capsys.readouterr().err


def test_a_log_is_followed_until_its_run_is_settled(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = SPECS[2]
    store.write_spec(spec)
    monkeypatch.setattr(logs, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.02)
    begun = threading.Event()

    def work() -> None:
        with take(store.folder(spec.id)), open(store.folder(spec.id) / "log.txt", "w") as log:
            begun.set()
            for number in range(20):
                log.write(f"line {number}\n")
                log.flush()
                time.sleep(0.02)
            store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE))

    worker = threading.Thread(target=work)
    worker.start()
    begun.wait()
    assert call(store, spec.id, "--follow") == 0
    worker.join()
    assert capsys.readouterr().out == "".join(f"line {number}\n" for number in range(20))


def test_a_log_that_is_begun_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("old 1\nold 2\nold 3\n")
    ended = iter([False, True])

    def has_ended() -> bool:
        file.write_text("new\nhalf a li")
        return next(ended)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "TICK_SECONDS", 0.01)
        patch.setattr(logs, "LOOK_SECONDS", 0.0)
        assert "".join(follow(lambda: [file], has_ended, 2)) == "old 2\nold 3\nnew\n"
