"""A run that is shown live: its curves stand in TensorBoard's files, and nothing of the run itself changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorabench.store.exporters.tensorboard import Live
from lorabench.store.record import STEPS_FILE, Status
from lorabench.store.steps import StepLog
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
from tests.conftest import make_spec


def shown(folder: Path) -> dict[tuple[str, int], list[float]]:
    """What TensorBoard reads there: every point by its tag and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def test_a_run_that_is_shown_has_the_same_bits(tmp_path: Path) -> None:
    spec = make_spec(eval_every=3)
    stores = {live: Store(tmp_path / str(live)) for live in (None, "tensorboard")}
    records = {}
    for live, store in stores.items():
        assert execute(spec, store, Options(device="cpu", log_to_file=False, live=live)) == Status.DONE
        records[live] = store.read(spec.id)
    assert records[None].digests == records["tensorboard"].digests
    found = shown(stores["tensorboard"].root / "exports" / "tensorboard" / spec.id)
    assert not (stores[None].root / "exports").exists()
    lines = (stores[None].folder(spec.id) / STEPS_FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    wanted = {(key, row["step"]): value for row in rows for key, value in row.items() if key != "step"}
    assert found.keys() == wanted.keys() and ("valid_loss", 3) in wanted
    assert all(found[key] == [pytest.approx(wanted[key], rel=1e-6)] for key in wanted)


def test_a_log_that_goes_on_is_shown_once(tmp_path: Path) -> None:
    lines: list[str] = []
    for step in (1, 2):  # the second time with the lines of a checkpoint, as another process has them
        log = StepLog(tmp_path / STEPS_FILE, lines, 60, Live(tmp_path / "shown"))
        log.step({"step": step, "loss": 1 / step})
        log.flush()
    assert shown(tmp_path / "shown") == {("loss", 1): [1.0], ("loss", 2): [0.5]}
