"""One run from spec to record: whole, reproducible, resumable, and true about how it ended."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from lorabench.config import plugins
from lorabench.config.decode import encode
from lorabench.spec.measures import MEASURES
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training import execute as module
from lorabench.training import loop as train_module
from lorabench.training import run as journey
from lorabench.training.execute import Options, execute
from lorabench.training.loop import schedule
from lorabench.training.stop import Stop, Stopped
from tests.conftest import make_spec

QUIET = Options(log_to_file=False, device="cpu")
SPECS = {
    "lora": make_spec(),
    "evaluated": make_spec(eval_every=2),
    "dropout": make_spec(method={"name": "lora", "rank": 2, "dropout": 0.2}),
    "nf4": make_spec(quantization="nf4"),
    "full": make_spec(method={"name": "full"}, lr=1e-3),
    "accumulated": make_spec(micro_batch_size=1, schedule="cosine", weight_decay=0.1, gradient_checkpointing=True),
    "bfloat16": make_spec(dtype="bfloat16"),
}


def stop_after(monkeypatch, checks: int) -> None:
    """Make the run's own check stop it, as a signal would, the `checks`-th time it looks."""
    seen = iter(range(10**6))

    def check(self):
        if next(seen) == checks:
            raise Stopped("SIGTERM")

    monkeypatch.setattr(Stop, "check", check)


def whole_and_resumed(spec, tmp_path, monkeypatch, checks: int) -> tuple[Store, Store]:
    """The run at one go, and stopped on its way and taken up again: of the same files and the same loss."""
    whole, resumed = Store(tmp_path / "whole"), Store(tmp_path / "resumed")
    assert execute(spec, whole, QUIET) == Status.DONE, whole.read(spec.id).error
    with monkeypatch.context() as context:
        stop_after(context, checks)
        assert execute(spec, resumed, QUIET) == Status.CANCELLED
    assert execute(spec, resumed, QUIET) == Status.DONE, resumed.read(spec.id).error
    want, got = whole.read(spec.id), resumed.read(spec.id)
    assert got.files == want.files and got.measures["valid_loss"] == want.measures["valid_loss"]
    assert got.movement == want.movement
    return whole, resumed


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Each spec's uninterrupted record."""
    store = Store(tmp_path_factory.mktemp("reference"))
    for spec in SPECS.values():
        assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return {name: store.read(spec.id) for name, spec in SPECS.items()}


def test_record_is_whole(reference):
    record = reference["lora"]
    assert record.status == Status.DONE and record.error is None
    assert set(record.measures) <= set(MEASURES)
    expected = {"valid_loss", "test_loss", "valid_token_accuracy", "peak_gib", "tokens_per_second", "total_seconds"}
    assert expected <= set(record.measures)
    assert all(math.isfinite(value) for value in record.measures.values())
    assert record.environment["packages"]["torch"] == torch.__version__
    assert len(record.environment["model_sha256"]) == 64
    assert set(record.files) >= {"updates/adapter_config.json", "updates/adapter_model.safetensors"}


@pytest.mark.parametrize("name", SPECS)
def test_same_spec_gives_the_same_bits(name, reference, tmp_path):
    store = Store(tmp_path)
    execute(SPECS[name], store, QUIET)
    assert store.read(SPECS[name].id).files == reference[name].files


@pytest.mark.parametrize("checks", [1, 4, 6, 9, 11])
@pytest.mark.parametrize("name", SPECS)
def test_resumed_run_gives_the_same_bits(name, checks, reference, tmp_path, monkeypatch):
    """Stopped in the first evaluation, while training and in evaluations between, and in the last one."""
    spec, store = SPECS[name], Store(tmp_path)
    stop_after(monkeypatch, checks)
    assert execute(spec, store, QUIET) == Status.CANCELLED
    assert "run again to resume" in store.read(spec.id).error
    monkeypatch.undo()
    assert execute(spec, store, QUIET) == Status.DONE
    record = store.read(spec.id)
    assert record.files == reference[name].files and record.movement == reference[name].movement
    assert record.attempts == 2
    assert record.measures["valid_loss"] == reference[name].measures["valid_loss"]
    assert record.measures["train_loss"] == reference[name].measures["train_loss"]
    rows = [json.loads(line) for line in (store.folder(spec.id) / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, spec.steps + 1))
    assert [row["step"] for row in rows if "valid_loss" in row] == ([2, 4] if spec.eval_every else [])


METHOD_SPECS = {
    name: make_spec(method=encode(plugins.example("methods", name)), keep="updates")
    for name in plugins.names("methods")
    if name not in ("bitfit", "full", "lora")  # no biases in the built-in model; above
} | {
    "dora": make_spec(method={"name": "lora", "rank": 2, "dora": True}),
    "pissa": make_spec(method={"name": "lora", "rank": 2, "init": "pissa"}),
    "loftq": make_spec(method={"name": "lora", "rank": 2, "init": "loftq"}, quantization="nf4"),
    "lora+": make_spec(method={"name": "lora", "rank": 2, "lr_ratio": 8.0}),
}


@pytest.mark.parametrize("name", METHOD_SPECS)
def test_every_method_runs_whole_and_resumes_with_the_same_bits(name, tmp_path, monkeypatch):
    """The resumed run keeps snapshots too: that must change nothing, and the last one be what is learned."""
    spec, whole, resumed = METHOD_SPECS[name], Store(tmp_path / "whole"), Store(tmp_path / "resumed")
    assert execute(spec, whole, QUIET) == Status.DONE, whole.read(spec.id).error
    monkeypatch.setattr(train_module, "snapshot_due", lambda training: training.step % 2 == 0)  # the last step's too
    kept = dataclasses.replace(spec, snapshot_every=2)
    with monkeypatch.context() as context:
        stop_after(context, 6)
        assert execute(kept, resumed, QUIET) == Status.CANCELLED
    assert execute(kept, resumed, QUIET) == Status.DONE, resumed.read(kept.id).error
    want, got = whole.read(spec.id), resumed.read(kept.id)
    assert 0 < got.resumed_from_step < spec.steps
    assert got.updates == want.files and got.updates
    by_step = {step: snapshot_files(got, step) for step in (2, 4, 6)}
    assert by_step[6] == snapshot_files(got, None) and by_step[2] != by_step[4] != by_step[6]
    assert got.measures["valid_loss"] == want.measures["valid_loss"] != want.measures["base_valid_loss"]
    assert got.provenance["update"].startswith("against" if spec.method.has_update else "not applicable")


def snapshot_files(record, step):
    """Name -> digest of the files of a snapshot, or of `updates/` for None."""
    folder = "updates" if step is None else f"snapshots/{step:06d}"
    return {path.removeprefix(folder): digest for path, digest in record.files.items() if path.startswith(f"{folder}/")}


def test_stopping_while_training_keeps_the_steps_done(tmp_path, monkeypatch):
    spec, store = SPECS["lora"], Store(tmp_path)
    stop_after(monkeypatch, 6)
    execute(spec, store, QUIET)
    monkeypatch.undo()
    execute(spec, store, QUIET)
    assert 0 < store.read(spec.id).resumed_from_step < spec.steps


def test_accumulated_gradients_are_the_batch_s(tmp_path):
    """On responses of unequal lengths, where a mean of the parts' means would be another gradient."""
    rows = [{"prompt": "a", "response": "b " * (1 + 12 * (i % 3))} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store, task = Store(tmp_path / "results"), {"name": "completion", "data": str(tmp_path)}
    norms = []
    for micro in (None, 1):
        spec = make_spec(task=task, batch_size=4, micro_batch_size=micro, steps=2)
        assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
        log = (store.folder(spec.id) / "steps.jsonl").read_text().splitlines()
        norms.append([json.loads(line)["grad_norm"] for line in log])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_done_is_not_computed_again(tmp_path, monkeypatch):
    store = Store(tmp_path)
    execute(SPECS["lora"], store, QUIET)
    monkeypatch.setattr(module, "run", lambda *_: pytest.fail("ran again"))
    assert execute(SPECS["lora"], store, QUIET) == Status.DONE


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), Status.OOM),
        (MemoryError(), Status.OOM),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), Status.OOM),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), Status.FAILED),
        (OSError(28, "No space left on device"), Status.FAILED),
    ],
)
def test_an_error_becomes_its_status(error, status, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(journey, "train", fail)
    store = Store(tmp_path)
    assert execute(SPECS["lora"], store, QUIET) == status
    record = store.read(SPECS["lora"].id)
    assert type(error).__name__ in record.error


def test_divergence_is_a_finding(tmp_path):
    spec = make_spec(method={"name": "full"}, lr=1e12, clip="none", warmup=0.0, steps=40)
    store = Store(tmp_path)
    assert execute(spec, store, QUIET) == Status.DIVERGED
    assert store.read(spec.id).error.startswith("step ")


def test_time_limit_leaves_a_checkpoint(tmp_path, monkeypatch):
    store, spec = Store(tmp_path), SPECS["lora"]
    monkeypatch.setattr(Stop, "check", fire_at(5, Stop.check))
    assert execute(spec, store, dataclasses.replace(QUIET, timeout_seconds=3600)) == Status.TIMEOUT
    assert "--retry timeout" in store.read(spec.id).error
    monkeypatch.undo()
    assert execute(spec, store, QUIET) == Status.DONE
    assert store.read(spec.id).resumed_from_step > 0


def fire_at(count, check):
    """`Stop.check` whose deadline has passed the `count`-th time it looks."""
    seen = iter(range(10**6))

    def late(self):
        if next(seen) == count:
            self.deadline = 0.0
        check(self)

    return late


@pytest.mark.parametrize("damage", ["junk", "cut short", "other data"])
def test_a_checkpoint_of_no_use_is_set_aside(damage, reference, tmp_path, monkeypatch):
    spec, store = SPECS["lora"], Store(tmp_path)
    stop_after(monkeypatch, 6)
    execute(spec, store, QUIET)
    monkeypatch.undo()
    file = store.folder(spec.id) / "checkpoint" / "state.pt"
    match damage:
        case "junk":
            file.write_bytes(b"junk")
        case "cut short":
            file.write_bytes(file.read_bytes()[:-100])
        case "other data":
            torch.save(torch.load(file) | {"content": {"data": {"task": "another"}}}, file)
    assert execute(spec, store, QUIET) == Status.DONE
    assert store.read(spec.id).files == reference["lora"].files
    assert store.read(spec.id).resumed_from_step is None


def test_a_step_log_that_a_crash_cut_short_is_no_obstacle(reference, tmp_path, monkeypatch):
    spec, store = SPECS["lora"], Store(tmp_path)
    stop_after(monkeypatch, 6)
    execute(spec, store, QUIET)
    monkeypatch.undo()
    with open(store.folder(spec.id) / "steps.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    assert execute(spec, store, QUIET) == Status.DONE
    assert len((store.folder(spec.id) / "steps.jsonl").read_text().splitlines()) == spec.steps


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_are_not_finite_are_never_done(method, tmp_path):
    """The last step's gradient is finite, and its update is not: only a look at what came of it can tell."""
    spec, store = make_spec(method={"name": method}, steps=1, warmup=0.0, lr=1e38), Store(tmp_path)
    assert execute(spec, store, QUIET) == Status.DIVERGED
    assert store.read(spec.id).files == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "builtin:tiny-lama"}, ["tiny-lama", "builtin:tiny-llama"]),
        ({"model": "./nowhere"}, ["./nowhere", "no such folder"]),
        ({"task": {"name": "text", "text": "body"}}, ["task.text", "body", "source, text"]),
        ({"task": {"name": "text", "data": "builtin:java-code"}}, ["java-code", "builtin:python-code"]),
        ({"seq_len": 1024}, ["seq_len = 1024", "512"]),
        ({"method": {"name": "lora", "targets": "wq_proj"}}, ["method.targets", "wq_proj", "q_proj"]),
    ],
)
def test_bad_input_fails_with_one_clear_line(changes, words, tmp_path):
    spec, store = make_spec(**changes), Store(tmp_path)
    assert execute(spec, store, QUIET) == Status.FAILED
    error = store.read(spec.id).error
    assert all(word in error for word in words), error
    assert "\n" not in error


def test_svd_and_nothing_are_kept_as_asked(tmp_path):
    store = Store(tmp_path)
    svd = make_spec(method={"name": "full"}, keep="svd:2", lr=1e-3)
    none = make_spec(keep="none")
    for spec in (svd, none):
        assert execute(spec, store, QUIET) == Status.DONE
    assert list(store.read(svd.id).files) == ["updates/svd.safetensors"]
    assert store.read(none.id).files == {} and store.read(none.id).measures["updates_bytes"] == 0


def test_ranks_of_one_seed_do_not_share_their_initialization(tmp_path):
    from lorabench.updates.formats import read_updates

    store, factors = Store(tmp_path), {}
    for rank in (2, 4):
        spec = make_spec(method={"name": "lora", "rank": rank}, lr=1e-12, steps=1)
        execute(spec, store, QUIET)
        factors[rank] = next(iter(read_updates(store.folder(spec.id) / "updates"))).A
    cosine = torch.cosine_similarity(factors[2][0], factors[4][0], dim=0)
    assert abs(float(cosine)) < 0.5  # 1 if they came from one random stream; about 1 / sqrt(128) by chance


def test_learning_rate_schedule():
    spec = make_spec(steps=10, warmup=0.2, schedule="linear")
    want = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert [schedule(spec, step) for step in range(10)] == pytest.approx(want)
    assert schedule(make_spec(warmup=0.0, schedule="constant"), 5) == 1.0
    assert schedule(make_spec(warmup=0.0, schedule="cosine", steps=10), 5) == pytest.approx(0.5)


def test_spec_survives_json():
    for spec in SPECS.values():
        again = type(spec).from_json(json.loads(json.dumps(encode(spec))))
        assert again == spec and again.id == spec.id
