"""Whatever becomes of a run's files while it is stopped, it ends with the bytes of one left alone, or begins anew."""

from __future__ import annotations

import dataclasses
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lorabench.config.digests import check_files, file_digest
from lorabench.store.record import Status
from lorabench.store.steps import StepLog, write_steps
from lorabench.store.store import Store
from lorabench.training.execute import execute
from lorabench.training.state import Training, read_checkpoint
from tests.conftest import make_spec
from tests.training.test_execute import QUIET, stop_after

SPEC = make_spec(eval_every=2, snapshot_every=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The run left alone."""
    store = Store(tmp_path_factory.mktemp("whole"))
    assert execute(SPEC, store, QUIET) == Status.DONE
    return store


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The run stopped after a snapshot."""
    store = Store(tmp_path_factory.mktemp("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 9)
        assert execute(SPEC, store, QUIET) == Status.CANCELLED
    return store


def resumed(stopped: Store, root: Path, damage: Callable[[Path], None]) -> Store:
    """A copy of the stopped run that goes on after something was done to its folder."""
    shutil.copytree(stopped.root, root)
    store = Store(root)
    damage(store.folder(SPEC.id))
    assert execute(SPEC, store, QUIET) == Status.DONE
    return store


def assert_same(got: Store, want: Store) -> None:
    ours, theirs = got.read(SPEC.id), want.read(SPEC.id)
    assert ours and theirs and ours.digests == theirs.digests and len(ours.digests) > 4
    check_files(got.folder(SPEC.id), ours.digests)
    assert (got.folder(SPEC.id) / "steps.jsonl").read_bytes() == (want.folder(SPEC.id) / "steps.jsonl").read_bytes()


def into_folder(file: Path) -> None:
    file.unlink()
    (file / "inner").mkdir(parents=True)


def into_link(file: Path) -> None:
    file.rename(file.parents[3] / "elsewhere")
    file.symlink_to(file.parents[3] / "elsewhere")


def flip(file: Path) -> None:
    """A bit in the middle, of a zip in that of its largest member: between two of them may be padding."""
    content = bytearray(file.read_bytes())
    place = len(content) // 2
    if zipfile.is_zipfile(file):
        largest = max(zipfile.ZipFile(file).infolist(), key=lambda member: member.compress_size)
        place = largest.header_offset + largest.compress_size // 2
    content[place] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "a line that is none": lambda file: file.write_bytes(b"[1]\n" + file.read_bytes()),
    "no Unicode": lambda file: file.write_bytes(b"\xff\xfe" + file.read_bytes()),
    "twice": lambda file: file.write_bytes(2 * file.read_bytes()),
    "a folder": into_folder,
    "a link": into_link,
    "a bit": flip,
}


@pytest.mark.parametrize("damage", ["gone", "a line that is none", "a folder", "a link"])
def test_a_damaged_step_log_neither_fails_the_run_nor_is_taken_for_whole(
    damage: str, whole: Store, stopped: Store, tmp_path: Path
) -> None:
    store = resumed(stopped, tmp_path / "s", lambda folder: DAMAGE[damage](folder / "steps.jsonl"))
    assert_same(store, whole)
    assert store.read(SPEC.id).resumed_from_step > 2


def test_a_run_whose_snapshots_are_damaged_begins_anew(whole: Store, stopped: Store, tmp_path: Path) -> None:
    store = resumed(stopped, tmp_path / "s", lambda folder: flip(snapshot(folder)))
    assert_same(store, whole)
    assert store.read(SPEC.id).resumed_from_step is None


def snapshot(folder: Path) -> Path:
    (file,) = (folder / "snapshots" / "000002").glob("*.safetensors")
    return file


def checkpoint(folder: Path) -> Path:
    return folder / "checkpoint" / "state.pt"


@pytest.mark.parametrize("find", [snapshot, checkpoint])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "a folder", "a link", "a bit"])
def test_a_checkpoint_that_is_not_whole_or_lacks_a_snapshot_is_refused(
    damage: str, find: Callable[[Path], Path], stopped: Store, tmp_path: Path
) -> None:
    shutil.copytree(stopped.root, tmp_path / "s")
    folder = Store(tmp_path / "s").folder(SPEC.id)
    assert read_checkpoint(checkpoint(folder))["step"] > 2
    DAMAGE[damage](find(folder))
    if (damage, find) == ("a link", checkpoint):  # to what it was
        assert read_checkpoint(checkpoint(folder))["step"] > 2
        return
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(checkpoint(folder))


def test_files_in_the_place_of_folders_are_no_obstacle(whole: Store, stopped: Store, tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        for name in ("checkpoint", "snapshots"):
            shutil.rmtree(folder / name)
        for name in ("checkpoint", "snapshots", "updates"):
            (folder / name).write_text("x")

    assert_same(resumed(stopped, tmp_path / "s", damage), whole)


def test_what_a_link_leads_to_is_never_removed(whole: Store, stopped: Store, tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    (mine / "thesis.txt").write_text("x")

    def damage(folder: Path) -> None:
        (folder / "snapshots" / "000099").symlink_to(mine)
        (folder / "updates").symlink_to(mine)

    assert_same(resumed(stopped, tmp_path / "s", damage), whole)
    assert [file.name for file in mine.iterdir()] == ["thesis.txt"]


class Killed(BaseException):
    """As SIGKILL: nothing of the run's own catches it."""


def test_a_row_is_written_once_though_the_run_died_before_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation's row is in the file, and the checkpoint from which it is made again is older."""
    spec, alone, store = make_spec(eval_every=2), Store(tmp_path / "alone"), Store(tmp_path / "killed")
    often = dataclasses.replace(QUIET, checkpoint_seconds=0)
    assert execute(spec, alone, often) == Status.DONE
    real = Training.save

    def save(self: Training, file: Path) -> None:
        if self.step == 3:
            raise Killed
        real(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", save)
        with pytest.raises(Killed):
            execute(spec, store, often)
    file = store.folder(spec.id) / "steps.jsonl"
    assert '"step": 2, "valid_loss"' in file.read_text()
    assert execute(spec, store, often) == Status.DONE and store.read(spec.id).resumed_from_step == 2
    assert file.read_bytes() == (alone.folder(spec.id) / "steps.jsonl").read_bytes()


def test_a_file_taken_away_from_a_run_that_goes_on_is_whole_again(tmp_path: Path) -> None:
    file, lines = tmp_path / "steps.jsonl", []
    log = StepLog(file, lines, 60)
    for step, damage in enumerate((Path.unlink, into_folder, Path.touch), 1):
        log.step({"step": step})
        log.flush()
        assert file.read_text() == "".join(lines) and len(lines) == step
        damage(file)
    file.write_text("nonsense")
    assert write_steps(file, lines) == file_digest(file) and file.read_text() == "".join(lines)
