"""Records and the store: whole or not at all, and damage is a status with a reason, never a crash."""

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lorabench.config import json_file as stored_files
from lorabench.config.decode import InputError
from lorabench.config.durable import write_bytes
from lorabench.spec.measures import MEASURES
from lorabench.spec.run_spec import RunSpec
from lorabench.store.claim import take
from lorabench.store.crash_record import settle
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
from lorabench.updates.tensorfile import disk_errors
from tests.store import other_processes

SPEC = RunSpec.from_json({"method": {"name": "lora"}, "task": {"name": "text"}})


def stored(root: Path, **fields: object) -> Store:
    store = Store(root)
    store.write_spec(SPEC)
    values = {"run_id": SPEC.id, "spec": SPEC.to_json(), "status": Status.DONE, "measures": {"valid_loss": 2.5}}
    values |= fields
    store.write(RunRecord(**values))
    return store


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refuse(patch: pytest.MonkeyPatch, name: str, number: int, times: int | None = None) -> None:
    """Have files of this name answer with this error, always or the first times."""
    real, refusals = stored_files._read, []

    def read(file: Path, max_bytes: int) -> bytes:
        if file.name == name and (times is None or len(refusals) < times):
            refusals.append(file)
            raise OSError(number, os.strerror(number))
        return real(file, max_bytes)

    patch.setattr(stored_files, "_read", read)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store = stored(tmp_path, error="e", environment={"a": [1]}, files={"updates/x": "00"}, resumed_from_step=3)
    record = store.read(SPEC.id)
    assert record.status is Status.DONE and record.spec == SPEC.to_json()
    assert store.read_spec(SPEC.id) == SPEC
    store.write(record)
    assert store.read(SPEC.id) == record


def test_a_record_cut_short_anywhere_is_corrupt_and_never_done(tmp_path: Path) -> None:
    store = stored(tmp_path)
    file = store.folder(SPEC.id) / "record.json"
    whole = file.read_bytes()
    for length in range(0, len(whole.rstrip()), 41):
        file.write_bytes(whole[:length])
        state = store.state(SPEC.id)
        assert state.status == Status.CORRUPT and "record.json: not valid JSON" in state.error


@pytest.mark.parametrize("name", ["record.json", "spec.json"])
def test_a_file_that_was_replaced_while_it_was_read_is_read_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS tells of it so."""
    store = stored(tmp_path)
    refuse(monkeypatch, name, errno.ESTALE, times=2)
    assert store.state(SPEC.id).status == Status.DONE


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["record.json", "spec.json"])
def test_what_cannot_be_read_is_not_taken_for_damaged_nor_written_over(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path)
    with monkeypatch.context() as patch:
        refuse(patch, name, number)
        state = store.state(SPEC.id)
        assert state.status == Status.FAILED and state.unread and f"{name}: cannot be read" in (state.error or "")
        if name == "record.json":
            assert settle(store, state, Status.OOM, "its job is gone").unread
            with pytest.raises(InputError, match="cannot be read"):
                execute(SPEC, store, Options(device="cpu"))
    assert store.state(SPEC.id).status == Status.DONE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "finished"}, "status = \"finished\": unknown status 'finished'"),
        ({"run_id": "lora-000000000000"}, "is the record of another run"),
        ({"measures": {"valid_loss": "low"}}, 'measures.valid_loss = "low": must be a number'),
        ({"measures": [1]}, "measures = [1]: must be dict"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"spec": SPEC.to_json() | {"lr": 0.5}}, "its spec is not the run's"),
    ],
)
def test_an_edited_record_is_corrupt_with_its_reason(tmp_path: Path, changes: dict, message: str) -> None:
    store = stored(tmp_path)
    edit(store.folder(SPEC.id) / "record.json", **changes)
    state = store.state(SPEC.id)
    assert state.status == Status.CORRUPT and message in state.error


def test_an_edited_spec_is_corrupt(tmp_path: Path) -> None:
    store = stored(tmp_path)
    edit(store.folder(SPEC.id) / "spec.json", lr=0.5)
    state = store.state(SPEC.id)
    assert state.status == Status.CORRUPT and "it was edited" in state.error
    with pytest.raises(InputError, match="it was edited"):
        store.read_spec(SPEC.id)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_bytes(file, b"0" * 200_000)
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=other_processes.write_often, args=(str(file),))
    writer.start()
    seen = set()
    while writer.is_alive():
        content = file.read_bytes()
        assert len(content) == 200_000 and len(set(content)) == 1
        seen.add(content[0])
    assert writer.exitcode == 0 and len(seen) > 1
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    write_bytes(file, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_status_joins_the_record_with_its_worker(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.state(SPEC.id, SPEC).status == Status.MISSING and store.run_ids() == []
    store.write_spec(SPEC)
    hold = take(store.folder(SPEC.id))
    with hold:
        assert store.state(SPEC.id).status == Status.RUNNING
        store.write(RunRecord(run_id=SPEC.id, spec=SPEC.to_json(), status=Status.RUNNING))
        assert store.state(SPEC.id).status == Status.RUNNING
    assert store.state(SPEC.id).status == Status.INTERRUPTED
    assert store.run_ids() == [SPEC.id]


def test_set_aside_frees_the_run_and_keeps_what_was_there(tmp_path: Path) -> None:
    store = stored(tmp_path, error="first")
    one = store.set_aside(SPEC.id)
    assert store.run_ids() == [] and store.state(SPEC.id, SPEC).status == Status.MISSING
    stored(tmp_path, error="second")
    two = store.set_aside(SPEC.id)
    assert [json.loads((folder / "record.json").read_text())["error"] for folder in (one, two)] == ["first", "second"]


def test_every_measure_says_what_it_is_in() -> None:
    for name, measure in MEASURES.items():
        assert measure.text and measure.group
        for suffix, unit in [("_gib", "GiB"), ("_seconds", "s"), ("_bytes", "bytes"), ("_joules", "J")]:
            assert not name.endswith(suffix) or measure.unit == unit


def test_a_full_disk_is_an_os_error_whoever_writes() -> None:
    with pytest.raises(OSError, match="No space left") as caught, disk_errors(Path("adapter")):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "adapter"
    with pytest.raises(SafetensorError), disk_errors(Path("x")):
        raise SafetensorError("header too large")
