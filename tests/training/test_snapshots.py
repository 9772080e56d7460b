"""ΔW kept while training: what a shorter run would have ended with, at no cost to the run's own bits and measures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lorabench.analysis.analyze import analyze
from lorabench.config.decode import InputError
from lorabench.config.digests import file_digests
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep, read_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.execute import execute
from lorabench.training.meter import Meter
from tests.conftest import make_spec
from tests.training.test_execute import QUIET, snapshot_files, stop_after
from tests.training.test_sequence import make_sequence

ROOT = Path(__file__).parents[2]
FLAT = {"warmup": 0.0, "schedule": "constant"}
"""So that a shorter run is the beginning of a longer one."""
LORA = {"name": "lora", "rank": 2, "dropout": 0.2}
SEQUENCE = [{"name": "text", "data": f"builtin:{data}", "max_train": 16, "max_eval": 2}
            for data in ("python-code", "english-docs")]  # fmt: skip
SPECS = {
    "lora": make_spec(method=LORA, snapshot_every=2, **FLAT),
    "full": make_spec(method={"name": "full"}, lr=1e-3, snapshot_every=2, **FLAT),
    "singular vectors": make_spec(keep="svd:1", snapshot_every=2, **FLAT),
    "pissa": make_spec(method={"name": "lora", "rank": 2, "init": "pissa"}, snapshot_every=4, eval_every=2, **FLAT),
    "reloads the base": make_spec(
        method={"name": "peft", "type": "LORA", "config": {"r": 2, "lora_dropout": 0.2}}, snapshot_every=3, **FLAT
    ),
}


def run(spec: RunSpec, folder) -> tuple[Store, object]:
    store = Store(folder)
    assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return store, store.read(spec.id)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store of each spec's uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    for spec in SPECS.values():
        run(spec, folder)
    return Store(folder)


@pytest.fixture
def reference(whole):
    """Their records."""
    return {name: whole.read(spec.id) for name, spec in SPECS.items()}


@pytest.mark.parametrize("name", SPECS)
def test_a_snapshot_is_what_a_shorter_run_ends_with(name, reference, tmp_path):
    """The last step's is in `updates/`."""
    spec = SPECS[name]
    steps = range(spec.snapshot_every, spec.steps, spec.snapshot_every)
    folders = {path.rpartition("/")[0] for path in reference[name].files}
    assert folders == {"updates", *(f"snapshots/{step:06d}" for step in steps)}
    _, shorter = run(dataclasses.replace(spec, steps=steps[-1], snapshot_every=None), tmp_path)
    assert snapshot_files(reference[name], steps[-1]) == snapshot_files(shorter, None)


def test_the_bits_and_the_measures_are_those_of_a_run_without(reference, tmp_path):
    """To load the base draws random numbers, and dropout would show it."""
    spec = dataclasses.replace(SPECS["reloads the base"], snapshot_every=None)
    _, plain = run(spec, tmp_path)
    kept = reference["reloads the base"].measures
    assert kept.keys() - plain.measures.keys() == {"snapshot_seconds"} and kept["snapshot_seconds"] > 0
    assert plain.files == reference["reloads the base"].updates
    for name in ("valid_loss", "train_loss", "test_loss", "updates_bytes"):
        assert kept[name] == plain.measures[name]


@pytest.mark.parametrize(("name", "checks"), [("lora", 8), ("pissa", 7), ("reloads the base", 6)])
def test_a_resumed_run_keeps_the_same_snapshots(name, checks, reference, tmp_path, monkeypatch):
    spec, store = SPECS[name], Store(tmp_path)
    with monkeypatch.context() as context:
        stop_after(context, checks)
        assert execute(spec, store, QUIET) == Status.CANCELLED
    store, record = run(spec, tmp_path)
    assert record.files == reference[name].files and record.attempts == 2
    assert file_digests(store.folder(spec.id) / "snapshots", store.folder(spec.id)).items() <= record.files.items()


def test_what_lies_past_the_checkpoint_is_replaced(reference, tmp_path, monkeypatch):
    """A killed run may have kept snapshots of steps that are taken again, and half of one."""
    spec, store = SPECS["lora"], Store(tmp_path)
    with monkeypatch.context() as context:
        stop_after(context, 5)
        assert execute(spec, store, QUIET) == Status.CANCELLED
    folder = store.folder(spec.id) / "snapshots"
    for name in ("000004", "000005", "000004.123.tmp"):
        (folder / name).mkdir()
        (folder / name / "delta.safetensors").write_text("stale")
    store, record = run(spec, tmp_path)
    assert record.resumed_from_step < 4 and record.files == reference["lora"].files
    assert sorted(file.name for file in folder.iterdir()) == ["000002", "000004"]


def test_steps_count_over_all_tasks(tmp_path):
    """Also at the end of a task, and none at the end of the last."""
    spec = make_sequence(*SEQUENCE, method=LORA, steps=4, snapshot_every=2, **FLAT)
    first = make_spec(task=SEQUENCE[0], method=LORA, steps=4, **FLAT)
    _, record = run(spec, tmp_path)
    assert {path.split("/")[1] for path in record.files if path not in record.updates} == {"000002", "000004", "000006"}
    assert snapshot_files(record, 4) == snapshot_files(run(first, tmp_path)[1], None)


def test_an_error_while_keeping_leaves_nothing_half_written(tmp_path, monkeypatch):
    """Nor what an earlier attempt kept, for this one has begun anew."""
    spec, store = SPECS["lora"], Store(tmp_path)
    stale = store.folder(spec.id) / "snapshots" / "000003"
    stale.mkdir(parents=True)

    def fail(self, model, load_base, folder, keep):
        (folder / "adapter_model.safetensors").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(type(spec.method), "save", fail)
    assert execute(spec, store, QUIET) == Status.FAILED
    assert "No space left" in store.read(spec.id).error and list(stale.parent.iterdir()) == []


def test_the_trajectory_of_a_run_is_analyzed(whole):
    """All vectors of rank 2 are kept with the adapter; of the one that `svd:1` keeps no direction of ΔW is known."""
    specs = {name: SPECS[name] for name in ("lora", "singular vectors")}
    frame = analyze(whole, Sweep(name="kept", text="", runs=tuple(specs.values())))["dynamics"]
    for name, spec in specs.items():
        rows = frame[(frame["run_id"] == spec.id) & frame["step"].notna()]
        steps = {metric: list(chunk["step"]) for metric, chunk in rows.groupby("metric", observed=True)}
        layers = rows["layer"].nunique()
        assert steps["effective_rank_entropy"] == steps["phi_final_output"] == [2, 4, 6] * layers and layers > 1
        cosines = rows[rows["metric"] == "cosine_final"].groupby("step")["value"]
        assert (cosines.count() == (layers if name == "lora" else 0)).all()
    ends = rows[(rows["metric"] == "phi_final_input") & (rows["step"] == 6)]
    assert ends["value"].to_numpy() == pytest.approx(np.ones(layers), abs=1e-5)


def test_the_ids_of_runs_without_snapshots_are_as_they_were():
    """Held against runs made before there were any."""
    old = pd.read_csv(ROOT / "results" / "reference" / "methods" / "tables" / "runs.csv")["run_id"]
    assert {spec.id for spec in read_sweep(ROOT / "sweeps" / "methods.toml").runs} == set(old)
    assert "snapshot_every" not in make_spec().to_json()


def test_the_field_is_part_of_the_id_and_survives_json():
    spec = SPECS["lora"]
    assert RunSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert len({spec.id, dataclasses.replace(spec, snapshot_every=3).id, make_spec(method=LORA, **FLAT).id}) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"snapshot_every": 0}, "snapshot_every = 0: must be at least 1"),
        ({"snapshot_every": 5, "keep": "none"}, 'snapshot_every = 5: keep = "none" keeps nothing of ΔW'),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        make_spec(**changes)


def test_a_pause_is_not_training_s(monkeypatch):
    now, joules = itertools.count(), itertools.count(0, 10)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    meter = Meter(torch.device("cpu"), steps=100)  # every look at the clock takes a second, at the energy 10 joules
    meter._energy._read = lambda: next(joules)
    meter.start_training()
    with meter.clock("train"), meter.pause_training("snapshot"):
        next(joules)
        for _ in range(5):
            next(now)
    meter.end_training()
    assert meter.wall_time()["train_seconds"] == 2 and meter.wall_time()["snapshot_seconds"] == 6
    assert meter.energy_joules == 20
