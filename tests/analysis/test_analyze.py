import json
import os
import signal
import tomllib
import zipfile
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabench import cli
from lorabench.analyses.spectrum import Spectrum
from lorabench.analysis import analyze as engine
from lorabench.analysis import bases, batch, bundle, jobs
from lorabench.analysis.analyze import analyze
from lorabench.analysis.pairs import PAIR_AXES, find_pairs
from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.config.digests import file_digests
from lorabench.linalg.decompose import subspace_similarity, thin_svd
from lorabench.processes.share import WorkerFailed
from lorabench.spec.analysis import Analysis
from lorabench.spec.sweep import parse_sweep
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.updates import formats
from lorabench.updates.gradients import FOLDER as GRADIENTS
from lorabench.updates.gradients import write_gradients
from lorabench.updates.update import Update, save_svds, save_updates
from tests.conftest import BASE

TEXT = """
[base]
model = "{base}"
task.name = "text"
task.data = "builtin:python-code"
seed = [0, 1]
[[grid]]
method.name = "lora"
method.rank = [2, 4]
lr = [1e-3, 3e-3]
[[grid]]
method.name = "full"
"""
LAYERS = {"model.layers.0.self_attn.q_proj": (12, 10), "model.layers.1.mlp.up_proj": (20, 10)}


STEP = 100
"""Of the one snapshot that each run has: half of its final change."""


def factors(spec):
    g = torch.Generator().manual_seed(spec.seed + 10 * getattr(spec.method, "rank", 0) + int(spec.lr * 1e4))
    rank = getattr(spec.method, "rank", 10)
    return {
        name: (torch.randn(M, rank, generator=g), torch.randn(rank, N, generator=g)) for name, (M, N) in LAYERS.items()
    }


def base_weight(layer):
    return torch.randn(LAYERS[layer], generator=torch.Generator().manual_seed(len(layer)))


def save_adapter(folder, spec, share=1.0):
    config = {"peft_type": "LORA", "r": spec.method.rank, "lora_alpha": spec.method.alpha_value}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, (B, A) in factors(spec).items():
        tensors |= {f"base_model.model.{name}.lora_B.weight": share * B, f"base_model.model.{name}.lora_A.weight": A}
    save_file(tensors, folder / "adapter_model.safetensors")


def save_dense(folder, spec, share=1.0):
    updates = [
        Update(parameter=f"{name}.weight", B=share * B @ A, base_norm=5.0) for name, (B, A) in factors(spec).items()
    ]
    updates.append(Update(parameter="model.norm.weight", B=torch.ones(10, 1)))
    save_updates(updates, folder)


def write_run(store, spec, status=Status.DONE):
    folder = store.folder(spec.id)
    save = save_adapter if spec.method.name == "lora" else save_dense
    for name, share in (("updates", 1.0), (f"snapshots/{STEP:06d}", 0.5)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        save(folder / name, spec, share)
    store.write_spec(spec)
    files = file_digests(folder / "updates", folder) | file_digests(folder / "snapshots", folder)
    gradients = store.root / GRADIENTS / "made.safetensors"
    if not gradients.exists():
        write_gradients({"task": {layer: thin_svd(base_weight(layer).float(), keep=4) for layer in LAYERS}}, gradients)
    store.write(
        RunRecord(
            run_id=spec.id,
            spec=spec.to_json(),
            status=status,
            files=files,
            drift={layer: {"task": 0.02, "task_null": 0.01} for layer in LAYERS},
            movement={} if spec.method.name == "full" else {layer: {"moved_A": 0.5} for layer in LAYERS},
            provenance={"gradients": gradients.name},
        )
    )


def make_sweep(base):
    """Of runs on a base, the folder `base`, with just these two weights."""
    (base / "config.json").write_text('{"model_type": "llama"}')
    save_file({f"{layer}.weight": base_weight(layer) for layer in LAYERS}, base / "model.safetensors")
    text = TEXT.replace("{base}", str(base))
    return parse_sweep(tomllib.loads(text), text)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("base"))


@pytest.fixture
def store(sweep, tmp_path):
    store = Store(tmp_path)
    for spec in sweep.runs:
        write_run(store, spec)
    return store


def caches(store):
    """All files that keep what was analyzed."""
    return [file for kind in ("zip", "parquet") for file in sorted(store.root.rglob(f"*.{kind}"))]


def kept(store):
    """Each run, or pair of runs, with each analysis that its file keeps."""
    found = set()
    for file in store.root.glob("*/**/*.zip"):
        with zipfile.ZipFile(file) as archive:
            run = file.stem if file.parent.name == "pairs" else file.parent.name
            found |= {(run, name.removesuffix(".arrow")) for name in archive.namelist()}
    return found


def delta_of(spec, layer):
    B, A = factors(spec)[layer]
    return B @ A * (spec.method.alpha_value / spec.method.rank if spec.method.name == "lora" else 1)


def test_spectra_are_those_of_the_updates(store, sweep, capsys):
    frames = analyze(store, sweep)
    spectrum = frames["spectrum"]
    assert list(spectrum.columns) == ["run_id", "layer", "kind", "depth", "metric", "value", "null", "null_std"]
    assert set(spectrum["run_id"]) == {spec.id for spec in sweep.runs}
    assert set(spectrum["kind"]) == {"q_proj", "up_proj"}
    values = spectrum.set_index(["run_id", "layer", "metric"])["value"]
    singular = frames["singular_values"].set_index(["run_id", "layer"])
    for spec in sweep.runs:
        for layer in LAYERS:
            S = torch.linalg.svdvals(delta_of(spec, layer).double())
            assert values[spec.id, layer, "frobenius_norm"] == pytest.approx(S.norm().item(), rel=1e-5)
            found = singular.loc[[(spec.id, layer)]]
            assert found["value"].to_numpy() == pytest.approx(S[: len(found)].numpy(), rel=1e-5)
            assert len(found) == getattr(spec.method, "rank", 10)
            assert list(found["index"]) == [*range(1, len(found) + 1)]
            assert np.linalg.norm(found["null"]) <= np.linalg.norm(found["value"]) * (1 + 1e-9)
    assert values[next(s.id for s in sweep.runs if s.method.name == "full"), next(iter(LAYERS)), "relative_norm"] > 0
    assert capsys.readouterr().err == ""


def test_similarities_are_those_of_the_updates(store, sweep):
    phi = analyze(store, sweep)["subspace"]
    assert list(phi.columns)[:8] == ["run_a", "run_b", "axis", "value_a", "value_b", "layer", "kind", "depth"]
    pairs = phi[["run_a", "run_b", "axis"]].drop_duplicates()
    assert pairs["axis"].value_counts().to_dict() == {"method.rank": 4, "seed": 4 + 1, "lr": 4, "method": 4}
    specs = {spec.id: spec for spec in sweep.runs}
    for (run_a, run_b, layer), group in phi.groupby(["run_a", "run_b", "layer"], observed=True):
        a, b = (thin_svd(delta_of(specs[run], layer).double()) for run in (run_a, run_b))
        p, q = (getattr(specs[run].method, "rank", 10) for run in (run_a, run_b))
        for side, U, V in (("output", a.U, b.U), ("input", a.Vh.mT, b.Vh.mT)):
            grid = group[group["side"] == side].pivot(index="i", columns="j", values="phi").to_numpy()
            assert grid == pytest.approx(subspace_similarity(U[:, :p], V[:, :q]).numpy(), abs=1e-4)
    seeds = phi[phi["axis"] == "seed"]
    assert set(zip(seeds["value_a"], seeds["value_b"], strict=True)) == {(0, 1)}


def test_analyses_beside_the_base_are_of_its_weights(store, sweep):
    frames = analyze(store, sweep)
    values = frames["alignment"].query("metric == 'projected_norm'").set_index(["run_id", "layer"])["value"]
    for spec in sweep.runs:
        for layer in LAYERS:
            delta, r = delta_of(spec, layer).double(), getattr(spec.method, "rank", 10)
            U, _, Vh = torch.linalg.svd(delta, full_matrices=False)
            expected = (U[:, :r].mT @ base_weight(layer).double() @ Vh[:r].mT).norm().item()
            assert values[spec.id, layer] == pytest.approx(expected, rel=1e-4)
    assert len(list((store.root / "bases").glob("*.safetensors"))) == len(LAYERS), "one for all runs"
    specs = {spec.id: spec for spec in sweep.runs}
    shared = frames["shared_changes"].query("metric == 'changed_a_in_b'")
    for row in shared.itertuples():
        W = base_weight(row.layer)
        a, b = ((W + delta_of(specs[run], row.layer)).bfloat16() != W.bfloat16() for run in (row.run_a, row.run_b))
        assert row.value == pytest.approx(float((a & b).sum() / a.sum()), abs=0.02)
    assert len(shared) == len(LAYERS) * len(shared[["run_a", "run_b"]].drop_duplicates()) > 0


def test_the_svd_of_a_base_is_made_once(store, sweep, monkeypatch):
    analyze(store, sweep)
    for file in caches(store):
        file.unlink()
    monkeypatch.setattr(bases, "decompose", None)
    assert len(analyze(store, sweep)["intruders"])


def test_a_base_that_is_not_there_is_noted_once(store, sweep, monkeypatch):
    def missing(source, revision):
        raise InputError(f"{source}: gone")

    monkeypatch.setattr(bases, "local_files", missing)
    notes = []
    frames = analyze(store, sweep, note=notes.append)
    assert len(notes) == 1 and "not analyzed beside its base: " in notes[0]
    assert frames["alignment"].empty and frames["shared_changes"].empty and len(frames["spectrum"])
    assert "alignment" not in {name for _, name in kept(store)}, "tried again when the base is there"


def test_what_a_run_kept_of_its_singular_vectors_may_be_too_little(store, sweep):
    full = next(spec for spec in sweep.runs if spec.method.name == "full")
    folder = store.folder(full.id)
    (folder / "updates" / "delta.safetensors").unlink()
    delta = [Update(parameter=f"{name}.weight", B=delta_of(full, name)) for name in LAYERS]
    save_svds(delta, folder / "updates", 2)
    store.write(
        RunRecord(
            run_id=full.id, spec=full.to_json(), status=Status.DONE, files=file_digests(folder / "updates", folder)
        )
    )
    frames = analyze(store, sweep)
    assert full.id in {*frames["spectrum"]["run_id"]} and full.id not in {*frames["intruders"]["run_id"]}


@dataclass(frozen=True, kw_only=True)
class Steps(Analysis):
    needs = "trajectory"

    def compute(self, *layers):
        return [{"step": layer.step, "norm": float(layer.svd.S.norm())} for layer in layers]


def only(monkeypatch, *analyses):
    """Let these be all the analyses that there are."""
    names, example, found = plugins.names, plugins.example, {analysis.name: analysis for analysis in analyses}
    monkeypatch.setattr(plugins, "names", lambda kind: [*found] if kind == "analyses" else names(kind))
    monkeypatch.setattr(
        plugins, "example", lambda kind, name: found[name] if kind == "analyses" else example(kind, name)
    )


def test_a_trajectory_has_each_snapshot_and_the_end(store, sweep, monkeypatch):
    only(monkeypatch, Steps())
    (frame,) = analyze(store, sweep).values()
    assert set(frame["step"]) == {STEP, 200} and len(frame) == 2 * len(LAYERS) * len(sweep.runs)
    for (run_id, layer), rows in frame.groupby(["run_id", "layer"], observed=True):
        spec = next(spec for spec in sweep.runs if spec.id == run_id)
        norm = delta_of(spec, layer).norm().item()
        assert rows.set_index("step")["norm"].to_dict() == pytest.approx({STEP: norm / 2, 200: norm}, rel=1e-5)


def test_what_runs_have_measured_on_data_comes_with_each_layer(store, sweep):
    frames = analyze(store, sweep)
    assert {*frames["drift"]["metric"]} == {"task"} and {*frames["drift"]["value"]} == {0.02}
    assert {*frames["drift"]["layer"]} == {*frames["gradient"]["layer"]} == {*LAYERS}
    at = frames["gradient"].query("metric == 'phi_task_at'")
    assert {*at["step"]} == {STEP, sweep.runs[0].steps} and at["value"].between(0, 1).all()


def test_a_second_time_only_reads(store, sweep, monkeypatch):
    first = analyze(store, sweep)

    def never(*_):
        raise AssertionError("computed again")

    for name in ("open_layers", "load_layer"):
        monkeypatch.setattr(formats, name, never)
    monkeypatch.setattr(batch, "check_files", never)
    second = analyze(store, sweep)
    assert first.keys() == second.keys() == {*plugins.names("analyses")}
    for name in first:
        pd.testing.assert_frame_equal(first[name], second[name])


def test_only_what_is_new_is_computed(store, sweep, monkeypatch):
    analyze(store, sweep)
    opened, original = [], formats.open_layers
    spy = lambda folder: opened.append(folder.parent.name) or original(folder)  # noqa: E731
    monkeypatch.setattr(formats, "open_layers", spy)
    changed = sweep.runs[0]
    B, A = factors(changed)[next(iter(LAYERS))]
    name = f"base_model.model.{next(iter(LAYERS))}"
    save_file({f"{name}.lora_B.weight": 2 * B, f"{name}.lora_A.weight": A},
              store.folder(changed.id) / "updates" / "adapter_model.safetensors")  # fmt: skip
    folder = store.folder(changed.id)
    files = file_digests(folder / "updates", folder)
    store.write(RunRecord(run_id=changed.id, spec=changed.to_json(), status=Status.DONE, files=files))
    frames = analyze(store, sweep)
    partners = {run for pair in find_pairs(sweep, {s.id for s in sweep.runs}, PAIR_AXES)
                for run in (pair.run_a, pair.run_b) if changed.id in (pair.run_a, pair.run_b)}  # fmt: skip
    assert len(opened) == len({*opened}) and {*opened} == partners and len(partners) < len(sweep.runs)
    assert set(frames["spectrum"].query("run_id == @changed.id")["layer"]) == {next(iter(LAYERS))}
    opened.clear()
    monkeypatch.setattr(Spectrum, "version", Spectrum.version + 1)
    analyze(store, sweep)
    assert sorted(opened) == sorted(spec.id for spec in sweep.runs)


def test_runs_that_are_not_done_are_noted_and_left_out(store, sweep):
    failed, kept_nothing, *_, missing = sweep.runs
    write_run(store, failed, Status.FAILED)
    store.write(RunRecord(run_id=kept_nothing.id, spec=kept_nothing.to_json(), status=Status.DONE))
    (store.folder(missing.id) / "record.json").unlink()
    notes = []
    frames = analyze(store, sweep, note=notes.append)
    assert notes == [
        f"not analyzed (failed): {failed.id}",
        f"not analyzed (done, but nothing kept): {kept_nothing.id}",
        f"not analyzed (missing): {missing.id}",
    ]
    left_out = {failed.id, kept_nothing.id, missing.id}
    assert set(frames["spectrum"]["run_id"]) == {spec.id for spec in sweep.runs} - left_out
    assert not left_out & {*frames["subspace"]["run_a"], *frames["subspace"]["run_b"]}


def damage_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damage_nan(file):
    """A whole file with a record that fits, but NaN in its last layer."""
    folder = file.parents[1]
    weights = {"a.weight": torch.ones(3, 3), "b.weight": torch.full((3, 3), float("nan"))}
    save_updates([Update(parameter=name, B=delta) for name, delta in weights.items()], file.parent)
    store = Store(file.parents[3])
    record = store.read(folder.name)
    record.files = file_digests(folder / "updates", folder)
    store.write(record)


def swap(file, name="adapter_model.safetensors"):
    """A whole file of other numbers, as old as the first, and in the first case of its size."""
    before = file.stat()
    if name == file.name:
        save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file)
    else:
        save_updates([Update(parameter="model.layers.0.self_attn.q_proj.weight", B=torch.ones(12, 10))], file.parent)
    os.utime(file.parent / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def into_link(path):
    """The very same content, elsewhere."""
    path.rename(path.parents[2] / f"moved-{path.name}")
    path.symlink_to(path.parents[2] / f"moved-{path.name}")


WAY_OUT = "`run SWEEP --retry corrupt` makes the run again"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_byte, f"adapter_model.safetensors: has changed since it was written; {WAY_OUT}"),
        (lambda file: file.unlink(), f"adapter_model.safetensors: is gone; {WAY_OUT}"),
        (swap, f"adapter_model.safetensors: has changed since it was written; {WAY_OUT}"),
        (lambda file: swap(file, "delta.safetensors"), f"delta.safetensors: is no file of the run's record; {WAY_OUT}"),
        (into_link, f"adapter_model.safetensors: is a link; {WAY_OUT}"),
        (lambda file: into_link(file.parent), f"updates: is a link; {WAY_OUT}"),
        (damage_nan, "b.weight: holds NaN or Inf"),
    ],
)
def test_a_corrupt_run_is_noted_and_left_out(store, sweep, damage, message):
    bad = sweep.runs[0]
    damage(store.folder(bad.id) / "updates" / "adapter_model.safetensors")
    if WAY_OUT in message:
        assert store.verified(store.state(bad.id)).status == Status.CORRUPT
    notes = []
    unread = {}
    frames = analyze(store, sweep, note=notes.append, unread=unread.update)
    assert len(notes) == 1 and f"corrupt): {bad.id}" in notes[0] and message in notes[0]
    assert list(unread) == [bad.id] and message in unread[bad.id]
    for name, frame in frames.items():
        runs = {*frame.get("run_id", []), *frame.get("run_a", []), *frame.get("run_b", [])}
        lacks = "full" if name in ("factors", "movement") else None
        assert runs == {spec.id for spec in sweep.runs if spec.method.name != lacks} - {bad.id}, name
    assert not list(store.root.rglob("*.tmp")) and bad.id not in {run for run, _ in kept(store)}


def test_a_run_that_cannot_be_read_is_told_each_time_and_stands_on_the_page(store, sweep, tmp_path, capsys):
    bad = sweep.runs[0]
    damage_byte(store.folder(bad.id) / "updates" / "adapter_model.safetensors")
    (tmp_path / "tiny.toml").write_text(sweep.text + '\n[[figure]]\nname = "rank_quality"\n')
    command = ["analyze", str(store.root), str(tmp_path / "tiny.toml"), "--workers", "1"]
    for _ in range(2):
        assert cli.main(command) == 1
        told = capsys.readouterr()
        assert f"not analyzed (corrupt): {bad.id}: " in told.err
        assert told.err.count(bad.id + ": ") == 1 and told.err.count("has changed since it was written") == 1
        assert f"{store.root}/tiny/report.html" in told.out
    page = (store.root / "tiny" / "report.html").read_text()
    assert "Not everything was analyzed" in page and "has changed since it was written" in page
    write_run(store, bad)
    assert cli.main(command) == 0 and not capsys.readouterr().err
    assert "Not everything was analyzed" not in (store.root / "tiny" / "report.html").read_text()


def test_a_damaged_cache_is_made_again(store, sweep):
    first = analyze(store, sweep)
    for number, file in enumerate(caches(store)):
        file.write_bytes(file.read_bytes()[: 50 if number % 2 else -50])
    second = analyze(store, sweep)
    for name in first:
        pd.testing.assert_frame_equal(first[name], second[name])


def test_zero_updates_have_norms_but_no_directions(tmp_path):
    text = f'{BASE}method.name = "full"\nseed = [0, 1]\n'
    sweep, store = parse_sweep(tomllib.loads(text), text), Store(tmp_path)
    for spec in sweep.runs:
        folder = store.folder(spec.id) / "updates"
        folder.mkdir(parents=True)
        save_updates([Update(parameter="lin.weight", B=torch.zeros(4, 3), base_norm=2.0)], folder)
        record = RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE)
        record.files = file_digests(folder, folder.parent)
        store.write(record)
    frames = analyze(store, sweep)
    values = frames["spectrum"].query("run_id == @sweep.runs[0].id").set_index("metric")["value"]
    assert values["frobenius_norm"] == values["relative_norm"] == 0 and np.isnan(values["rank_90"])
    assert frames["subspace"].empty and list(frames["subspace"].columns)[:3] == ["run_a", "run_b", "axis"]


def test_an_empty_store(sweep, tmp_path):
    notes = []
    frames = analyze(Store(tmp_path), sweep, note=notes.append)
    assert all(frame.empty for frame in frames.values()) and len(notes) == 1 and "and 7 more" in notes[0]


def test_batches_bound_what_is_lost_and_change_nothing(store, sweep, monkeypatch):
    whole = analyze(store, sweep)
    for file in caches(store):
        file.unlink()
    monkeypatch.setattr(jobs, "MAX_JOBS", 3)
    for name, frame in analyze(store, sweep).items():
        pd.testing.assert_frame_equal(whole[name], frame)


def test_a_folder_that_cannot_be_written(store, sweep):
    (store.root / "pairs").write_text("in the way")
    with pytest.raises(InputError, match=r"zip: cannot be written"):
        analyze(store, sweep)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_stands_in_the_way_of_one_run_takes_no_other_with_it(store, sweep, workers):
    """A folder in the place of its analyses, and in that of another's a pipe, which would be waited for."""
    whole = analyze(store, sweep)
    blocked, piped = (store.folder(spec.id) for spec in sweep.runs[:2])
    for folder in (blocked, piped):
        (folder / "analyses.zip").unlink()
    (blocked / "analyses.zip").mkdir()
    os.mkfifo(piped / "analyses.zip")
    told = {}
    found = analyze(store, sweep, workers=workers, broken=told.update)
    assert blocked.name in told["spectrum"] and "cannot be written" in told["spectrum"]
    assert {*found["spectrum"]["run_id"]} == {*whole["spectrum"]["run_id"]} - {blocked.name}
    assert (piped / "analyses.zip").is_file()


def contents(store):
    """Every file of an analysis below the store, with its bytes."""
    return {str(f.relative_to(store.root)): f.read_bytes() for f in caches(store)}


def test_a_large_run_is_read_in_one_batch_whatever_it_is_compared_with(store, sweep, monkeypatch):
    records = {spec.id: store.read(spec.id) for spec in sweep.runs}
    pairs = list(find_pairs(sweep, records, PAIR_AXES))
    angles, spectrum = (plugins.example("analyses", name) for name in ("angles", "spectrum"))
    todo = [jobs.Job(analysis=analysis, records=tuple(records[run] for run in runs), root=store.root)
            for analysis in (spectrum, angles) for runs in jobs.subjects(analysis, records, pairs)]  # fmt: skip
    for name, most in (("MAX_BYTES", 1), ("MAX_JOBS", 4)):
        monkeypatch.setattr(jobs, name, most)
        found = list(jobs.batches(todo))
        assert [*map(id, sorted(todo, key=id))] == sorted(id(job) for batch in found for job in batch)
        assert len(found) > 2 and (name == "MAX_BYTES" or max(map(len, found)) <= most)
        monkeypatch.undo()
    monkeypatch.setattr(jobs, "MAX_BYTES", 1)
    found = list(jobs.batches(todo))
    for spec in sweep.runs:
        if spec.method.name == "full":
            having = [batch for batch in found if any(spec.id in job.runs for job in batch)]
            assert 1 <= len(having) <= 2, "its own, and that of the other full fine-tuning"


@pytest.mark.parametrize("parts_a_worker", [1, 4])
def test_several_processes_give_the_same_bytes(store, sweep, monkeypatch, parts_a_worker):
    """Also where one batch is cut into more parts than it has layers."""
    bad = sweep.runs[0]
    damage_byte(store.folder(bad.id) / "updates" / "adapter_model.safetensors")
    notes = [], []
    one = analyze(store, sweep, note=notes[0].append)
    alone = contents(store)
    for file in [*caches(store), *store.root.glob("bases/*")]:
        file.unlink()
    monkeypatch.setattr(engine, "PARTS_A_WORKER", parts_a_worker)
    two = analyze(store, sweep, note=notes[1].append, workers=2)
    assert contents(store) == alone and notes[0] == notes[1] != []
    for name in one:
        pd.testing.assert_frame_equal(one[name], two[name])
    assert not list(store.root.glob(".analyze-*")) and not list(store.root.glob("bases/*.lock"))


@dataclass(frozen=True, kw_only=True)
class Breaks(Analysis):
    """Raises, or ends its process, on one kind of layer of rank 4."""

    needs = "layer"
    how: str

    @property
    def name(self):
        return "breaks"

    def compute(self, *layers):
        if layers[0].kind == "q_proj" and layers[0].rank == 4:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("this analysis has a mistake")
        return [{"rank": layers[0].svd.numerical_rank}]


@pytest.mark.parametrize(
    ("how", "workers", "message"),
    [
        ("raises", 1, "ValueError: this analysis has a mistake .test_analyze.py, line [0-9]+.\nthe rest is kept"),
        ("raises", 2, "ValueError: this analysis has a mistake .test_analyze.py, line [0-9]+.\nthe rest is kept"),
        (
            "killed",
            2,
            "a worker was killed by SIGKILL; [0-9]+ parts of the analyses were not computed\nthe rest is kept",
        ),
    ],
)
def test_what_fails_is_told_and_the_rest_is_kept(store, sweep, monkeypatch, how, workers, message):
    only(monkeypatch, Breaks(how=how))
    monkeypatch.setattr(jobs, "MAX_JOBS", 1)
    with pytest.raises(WorkerFailed, match=message):
        analyze(store, sweep, workers=workers)
    assert kept(store) == {(spec.id, "breaks") for spec in sweep.runs if getattr(spec.method, "rank", 0) != 4}
    assert not list(store.root.glob(".analyze-*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_analysis_that_raises_takes_no_other_with_it(store, sweep, monkeypatch, workers):
    only(monkeypatch, Breaks(how="raises"), Spectrum())
    told = {}
    frames = analyze(store, sweep, workers=workers, broken=told.update)
    assert told.keys() == {"breaks"} and "has a mistake" in told["breaks"]
    assert {*frames["spectrum"]["run_id"]} == {spec.id for spec in sweep.runs}
    assert {*frames["breaks"]["run_id"]} == {spec.id for spec in sweep.runs if getattr(spec.method, "rank", 0) != 4}
    analyze(store, sweep, broken=told.update)
    assert "breaks" in told, "and is asked again"
    assert not list(store.root.glob(".analyze-*"))


def test_what_a_killed_process_has_left_goes(store, sweep):
    left = store.root / ".analyze-left"
    left.mkdir()
    (left / "lock").write_text("")
    (left / "0-1-0.arrow").write_text("half")
    analyze(store, sweep)
    assert not left.exists()


def test_a_bundle_is_read_instead_of_the_runs_own_files(store, sweep, monkeypatch):
    monkeypatch.setattr(bundle, "MIN_JOBS", 2)
    first = analyze(store, sweep)
    files = {*caches(store)}
    bundles = {file for file in files if file.parent.name == bundle.FOLDER}
    assert {file.stem for file in bundles} == {*plugins.names("analyses")}
    for file in files - bundles:
        file.unlink()
    monkeypatch.setattr(formats, "open_layers", None)
    for name, frame in analyze(store, sweep).items():
        pd.testing.assert_frame_equal(first[name], frame)
    monkeypatch.undo()
    for spec in sweep.runs[1:3]:  # taken out of the middle, and put back
        (store.folder(spec.id) / "record.json").rename(store.folder(spec.id) / "away.json")
    monkeypatch.setattr(bundle, "MIN_JOBS", 2)
    fewer = analyze(store, sweep, note=lambda _: None)
    assert len(fewer["spectrum"]["run_id"].unique()) == len(sweep.runs) - 2
    for spec in sweep.runs[1:3]:
        (store.folder(spec.id) / "away.json").rename(store.folder(spec.id) / "record.json")
    for name, frame in analyze(store, sweep).items():
        pd.testing.assert_frame_equal(first[name], frame)
