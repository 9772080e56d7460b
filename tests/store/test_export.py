"""What is exported is read back by the libraries that it is written for, and held against the runs themselves."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from lorabench.cli import main
from lorabench.spec.run_spec import flatten
from lorabench.store.export import tools
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests import fake_runs

Curves = dict[str, dict[int, float]]
ROWS = {
    0: [{"step": 1, "loss": 3.5, "grad_norm": 0.25, "lr": 0.01}, {"step": 2, "loss": 3.25, "grad_norm": 0.5, "lr": 0.0},
        {"step": 2, "valid_loss": 3.0}],
    1: [{"step": 1, "loss": math.nan, "grad_norm": 0.125, "lr": 0.01}],
}  # fmt: skip
MEASURES = {0: {"valid_loss": 2.5, "num_trainable": 512.0}, 1: {"num_trainable": 256.0}}
STATUSES = {0: Status.DONE, 1: Status.DIVERGED}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run that is done, one that diverged, one that has only begun."""
    store, sweep = Store(tmp_path_factory.mktemp("results")), fake_runs.sweep(0, 1, 2)
    for spec in sweep.runs:
        store.write_spec(spec)
    for spec in sweep.runs[:2]:
        text = "".join(json.dumps(row) + "\n" for row in ROWS[spec.seed])
        (store.folder(spec.id) / "steps.jsonl").write_text(text)
        values = {
            "status": STATUSES[spec.seed],
            "measures": MEASURES[spec.seed],
            "started": "2026-01-01T00:00:00+00:00",
        }
        store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), **values))
    return store


def curves(seed: int) -> Curves:
    found: Curves = defaultdict(dict)
    for row in ROWS[seed]:
        for key in row.keys() - {"step"}:
            found[key][row["step"]] = row[key]
    return dict(found)


def final(seed: int) -> dict[str, float]:
    return {f"final/{key}": value for key, value in MEASURES[seed].items()}


def exported(store: Store, tool: str, folder: Path, *more: str) -> dict[int, str]:
    """Seed -> id of the runs that are exported, twice: they take the place of what they were."""
    for _ in range(2):
        assert main(["export", str(store.root), "--to", tool, "--output", str(folder), *more]) == 0
    return {store.read_spec(run_id).seed: run_id for run_id in store.run_ids() if store.read(run_id)}


def assert_same(found: Curves, wanted: Curves) -> None:
    assert found.keys() == wanted.keys()
    for key, points in wanted.items():
        assert found[key] == pytest.approx(points, nan_ok=True), key


def test_csv(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(store, "csv", tmp_path)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(tmp_path)] * 2
    assert "exported 2 runs; left out, not ended or damaged: 1" in captured.err
    runs = {int(row["seed"]): row for row in csv.DictReader((tmp_path / "runs.csv").open())}
    steps = list(csv.DictReader((tmp_path / "steps.csv").open()))
    for seed, row in runs.items():
        spec = store.read_spec(row["run_id"])
        assert row["status"] == STATUSES[seed] and row["serving"] == "true" and row["method.layers"] == ""
        assert float(row["lr"]) == spec.lr and row["method.alpha"] == "2r"
        assert {key: float(row[key]) for key in MEASURES[seed]} == MEASURES[seed]
        own = [line for line in steps if line["run_id"] == row["run_id"]]
        found = {key: {int(line["step"]): float(line[key]) for line in own if line[key]} for key in curves(seed)}
        assert_same(found, curves(seed))


def test_tensorboard(store: Store, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for seed, run_id in exported(store, "tensorboard", tmp_path).items():
        events = EventAccumulator(str(tmp_path / run_id))
        events.Reload()
        found = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        assert_same(found, curves(seed) | {key: {0: value} for key, value in final(seed).items()})
        data = HParamsPluginData.FromString(
            events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        ).session_start_info.hparams
        config = flatten(store.read_spec(run_id).to_json())
        assert data.keys() == config.keys()
        assert data["seed"].number_value == seed and data["method.layers"].string_value == "null"
        assert data["model"].string_value == config["model"] and data["serving"].string_value == "true"


def test_mlflow(store: Store, tmp_path: Path) -> None:
    ids = exported(store, "mlflow", tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tmp_path.as_uri())
    experiment = client.get_experiment_by_name(store.root.name)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == set(ids.values())
    for seed, run_id in ids.items():
        theirs = runs[run_id]
        config = flatten(store.read_spec(run_id).to_json())
        assert theirs.data.params.keys() == config.keys() and theirs.data.params["lr"] == str(config["lr"])
        assert theirs.info.status == {0: "FINISHED", 1: "FAILED"}[seed]
        assert theirs.info.start_time == 1767225600000
        histories = {key: client.get_metric_history(theirs.info.run_id, key) for key in theirs.data.metrics}
        found = {key: {point.step: point.value for point in points} for key, points in histories.items()}
        assert_same(found, curves(seed) | {key: {0: value} for key, value in final(seed).items()})


def test_wandb(store: Store, tmp_path: Path) -> None:
    for seed, run_id in exported(store, "wandb", tmp_path).items():
        (file,) = tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
        records = wandb_records(file)
        (run,) = [record.run for record in records if record.HasField("run")]
        assert (run.run_id, run.project) == (run_id, store.root.name) and list(run.tags) == [STATUSES[seed]]
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config == flatten(store.read_spec(run_id).to_json()) | {"_wandb": config.get("_wandb")}
        found: Curves = defaultdict(dict)
        for record in records:
            for item in record.history.item:
                key = item.key or ".".join(item.nested_key)
                if not key.startswith("_"):
                    found[key][record.history.step.num] = json.loads(item.value_json)
        assert_same(dict(found), curves(seed))
        summary: dict[str, Any] = {}
        for record in records:
            summary |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
        assert {key: summary[key] for key in MEASURES[seed]} == MEASURES[seed]
        assert [r.exit.exit_code for r in records if r.HasField("exit")] == [int(STATUSES[seed] != Status.DONE)]


def wandb_records(file: Path) -> list[Any]:
    """W&B's own messages, out of the log format of LevelDB: blocks of 32 KiB, chunks of checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, found, message = file.read_bytes(), [], b""
    place = 7  # what W&B puts before it
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or its last part
            found.append(Record.FromString(message))
            message = b""
    return found


@pytest.mark.parametrize(("tool", "package"), [("mlflow", "mlflow-skinny"), ("wandb", "wandb"), ("tensorboard",) * 2])
def test_a_library_that_is_lacking_is_named(
    tool: str, package: str, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tool else found(name))
    assert main(["export", str(store.root), "--to", tool]) == 2
    assert f"--to {tool}: needs a library that is not installed: `pip install {package}`" in capsys.readouterr().err
    assert not (store.root / "exports").exists()


def test_a_damaged_log_costs_its_curves_alone(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "results"
    spec = fake_runs.sweep(0).runs[0]
    other = Store(root)
    other.write_spec(spec)
    values = {"status": Status.DONE, "measures": MEASURES[0], "steps_sha256": "0" * 64}
    other.write(RunRecord(run_id=spec.id, spec=spec.to_json(), **values))
    (other.folder(spec.id) / "steps.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert main(["export", str(root), "--to", "csv"]) == 0
    assert f"{spec.id}: without its curves: " in capsys.readouterr().err
    assert "512" in (root / "exports" / "csv" / "runs.csv").read_text()


def test_nothing_that_has_ended_is_nothing_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(tmp_path).write_spec(fake_runs.sweep(0).runs[0])
    assert main(["export", str(tmp_path), "--to", "csv"]) == 2
    assert "no run has ended: there is nothing to export" in capsys.readouterr().err
    assert tools() == ["csv", "mlflow", "tensorboard", "wandb"]
