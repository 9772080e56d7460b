"""A run on several processes (gloo, CPU) beside the same run on one: numbers, stops, resumes, deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorabench import execute, sharding, train
from lorabench.distributed import Place, World, local_part
from lorabench.launch import Pool, launch
from lorabench.record import RunRecord, Status, Store
from lorabench.spec import RunSpec
from lorabench.sweep import Sweep
from lorabench.worker import Settings, Target, execute_run
from tests.conftest import make_spec

TOLERANCE = 1e-5
"""Of losses, and of what was learned relative to its norm: sums of float32 in another order, over six steps."""
SAME = {"batch_size": 5, "epsilon": 1e-5, "steps": 6}
"""Five examples are no equal shares for any number of ranks here. With an epsilon near 0 AdamW would make steps of
full length of what is rounding alone (the gradient of an attention key's bias is zero)."""


def run(root: Path, processes: int, *specs: RunSpec, target: Target = execute_run, **settings: Any) -> list[RunRecord]:
    """The records after a launch with so many processes a run."""
    sweep = Sweep(name="ranks", text="", runs=tuple(specs))
    pool = Pool(processes=processes, settings=Settings(device="cpu", **settings))
    launch(sweep, Store(root), pool, target)
    return [Store(root).read(spec.id) for spec in specs]


def learned(root: Path, record: RunRecord) -> dict[str, torch.Tensor]:
    """Every tensor of `updates/`."""
    files = [root / "runs" / record.run_id / path for path in record.updates if path.endswith(".safetensors")]
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def losses(root: Path, record: RunRecord) -> list[float]:
    rows = (root / "runs" / record.run_id / "steps.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, rows) for key in ("loss", "grad_norm", "valid_loss") if key in row]


def assert_same(root: Path, record: RunRecord, other_root: Path, other: RunRecord) -> None:
    assert record.status == other.status == Status.DONE, (record.error, other.error)
    assert losses(root, record) == pytest.approx(losses(other_root, other), rel=TOLERANCE)
    for name, value in record.measures.items():
        if name.startswith(("valid_", "test_", "train_loss", "base_")):
            assert other.measures[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), name
    wanted, got = learned(root, record), learned(other_root, other)
    assert wanted.keys() == got.keys() and wanted
    for name, tensor in wanted.items():
        assert float((got[name] - tensor).norm()) <= TOLERANCE * float(tensor.norm()) + 1e-8, name
    assert any(float(tensor.norm()) for tensor in wanted.values())


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    """Without the launcher's look at whether each method fits its model, which takes as long as a run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorabench.launch._Launch._check", lambda self: None)
        yield


@pytest.fixture(scope="module")
def specs(tiny_bases: dict[str, str], labelled: str) -> dict[str, RunSpec]:
    classified = {"name": "classification", "data": labelled, "max_eval": 7}
    return {
        "lora": make_spec(**SAME, eval_every=3),
        "parts": make_spec(**SAME, micro_batch_size=1, gradient_checkpointing=True),
        "adalora": make_spec(**SAME, method={"name": "adalora", "rank": 2, "start_rank": 4}),
        "bitfit": make_spec(**SAME, task=classified, method={"name": "bitfit"}, model=tiny_bases["bert"]),
        "prompt": make_spec(**SAME, method={"name": "prompt"}),
        "classifier": make_spec(**SAME, task=classified, model=tiny_bases["bert"]),
        "full": make_spec(**SAME, method={"name": "full"}, lr=1e-3),
    }


@pytest.fixture(scope="module")
def alone(specs: dict[str, RunSpec], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, RunRecord]]:
    """Each run on one process."""
    root = tmp_path_factory.mktemp("alone")
    return root, dict(zip(specs, run(root, 1, *specs.values()), strict=True))


@pytest.mark.parametrize(
    ("processes", "sharding", "names"),
    [
        (2, "ddp", ["lora", "parts", "adalora", "bitfit", "prompt", "classifier", "full"]),
        (3, "ddp", ["adalora"]),
        (4, "ddp", ["classifier"]),
        (2, "fsdp", ["lora", "parts", "adalora", "bitfit", "prompt", "classifier", "full"]),
        (3, "fsdp", ["full"]),
    ],
)
def test_several_processes_compute_what_one_does(processes, sharding, names, specs, alone, tmp_path):
    root, records = alone
    found = run(tmp_path, processes, *(specs[name] for name in names), sharding=sharding)
    for name, record in zip(names, found, strict=True):
        assert_same(root, records[name], tmp_path, record)
        assert {record.environment[key] for key in ("ranks", "sharding")} == {processes, sharding}
        assert record.measures["all_ranks_peak_gib"] > record.measures["peak_gib"] > 0
        assert record.measures["num_trainable"] == records[name].measures["num_trainable"]


def test_a_share_may_be_empty(alone, tmp_path):
    specs = [make_spec(**SAME | {"batch_size": 2}, method={"name": name}) for name in ("lora", "full")]
    for one, many in zip(run(tmp_path / "1", 1, *specs), run(tmp_path / "3", 3, *specs), strict=True):
        assert_same(tmp_path / "1", one, tmp_path / "3", many)
    assert many.environment["sharding"] == "fsdp"


def test_shares_are_even_and_leave_nothing_out():
    for size, count in ((1, 5), (2, 5), (3, 2), (4, 9), (4, 0)):
        worlds = [World(place=Place(rank=rank, size=size)) for rank in range(size)]
        shares = [list(world.share(range(count))) for world in worlds]
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def at_step(step: int, rank: int, act: Any) -> None:
    """In this process, if it is of that rank: `act` in the midst of the step."""
    schedule = train.schedule

    def acting(spec: RunSpec, now: int) -> float:
        if now == step:
            act()
        return schedule(spec, now)

    train.schedule = acting if rank else schedule


def asked_to_stop(spec: RunSpec, store: Store, settings: Settings) -> None:
    """The last rank alone gets the signal."""
    at_step(3, settings.place.rank == settings.place.size - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    execute_run(spec, store, settings)


def asked_while_evaluating(spec: RunSpec, store: Store, settings: Settings) -> None:
    """After training, between the evaluation of one split and of the next."""
    evaluate = execute.evaluate

    def asking(training: train.Training, examples: Any, split: str, *rest: Any) -> dict[str, float]:
        if split == "test" and settings.place.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(training, examples, split, *rest)

    execute.evaluate = asking
    execute_run(spec, store, settings)


def killed(spec: RunSpec, store: Store, settings: Settings) -> None:
    at_step(3, settings.place.rank == 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    execute_run(spec, store, settings)


def killed_with_seed_0(spec: RunSpec, store: Store, settings: Settings) -> None:
    (execute_run if spec.seed else killed)(spec, store, settings)


def out_of_memory(spec: RunSpec, store: Store, settings: Settings) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    at_step(3, settings.place.rank == 1, fail)
    execute_run(spec, store, settings)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("lora", (1, "ddp"), (2, "ddp")),
        ("lora", (2, "ddp"), (1, "ddp")),
        ("full", (1, "ddp"), (2, "fsdp")),
        ("full", (2, "fsdp"), (3, "fsdp")),
        ("full", (3, "fsdp"), (1, "ddp")),
    ],
)
def test_a_stopped_run_goes_on_with_any_number_of_processes(name, before, after, specs, alone, tmp_path):
    root, records = alone
    (stopped,) = run(tmp_path, before[0], specs[name], target=asked_to_stop, sharding=before[1])
    assert stopped.status == Status.CANCELLED and stopped.error == "stopped by SIGTERM; run again to resume"
    (resumed,) = run(tmp_path, after[0], specs[name], sharding=after[1])
    assert resumed.resumed_from_step == 4 and resumed.attempts == 2
    assert_same(root, records[name], tmp_path, resumed)


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 2, "dropout": 0.2}, {"name": "full"}])
def test_a_resumed_run_has_the_same_bits_with_as_many_processes(method, tmp_path):
    """Dropout too, of which each rank has its own; and snapshots."""
    spec = make_spec(method=method, batch_size=4, snapshot_every=2)
    (whole,) = run(tmp_path / "whole", 2, spec)
    run(tmp_path / "stopped", 2, spec, target=asked_to_stop)
    (stopped,) = run(tmp_path / "stopped", 2, spec, target=asked_while_evaluating)
    assert (stopped.status, stopped.resumed_from_step) == (Status.CANCELLED, 4)
    (resumed,) = run(tmp_path / "stopped", 2, spec)
    assert resumed.resumed_from_step == 6
    assert resumed.files == whole.files and len({path.split("/")[1] for path in whole.files}) > 2
    assert losses(tmp_path / "whole", whole) == losses(tmp_path / "stopped", resumed)


@pytest.mark.parametrize("damage", ["cut short", "junk"])
def test_damaged_shares_are_set_aside_and_the_run_begins_anew(damage, specs, alone, tmp_path):
    root, records = alone
    run(tmp_path, 2, specs["full"], target=asked_to_stop)
    (shares,) = (tmp_path / "runs" / specs["full"].id / "checkpoint").glob("shares-*")
    file = max(shares.iterdir(), key=lambda each: each.stat().st_size)
    content = file.read_bytes()
    match damage:
        case "cut short":
            file.write_bytes(content[:-1])
        case "junk":
            file.write_bytes(bytes(len(content)))
    (again,) = run(tmp_path, 2, specs["full"])
    assert again.resumed_from_step is None
    assert_same(root, records["full"], tmp_path, again)


def held(spec: RunSpec, store: Store, settings: Settings) -> None:
    """Notes what this rank holds after training: numbers of parameters, and of the optimizer's state."""
    trained = execute.train

    def noting(training: train.Training, *rest: Any) -> None:
        trained(training, *rest)
        states = [value for state in training.optimizer.state.values() for value in state.values()]
        counts = [sum(local_part(t).numel() for t in part) for part in (training.model.parameters(), states)]
        (store.root / f"held.{settings.place.rank}").write_text(json.dumps(counts))

    execute.train = noting
    execute_run(spec, store, settings)


def test_a_rank_holds_its_share_of_the_weights_and_of_the_optimizer_s_state(specs, tmp_path):
    (record,) = run(tmp_path, 2, specs["full"], target=held)
    found = [json.loads((tmp_path / f"held.{rank}").read_text()) for rank in range(2)]
    total = record.measures["num_parameters"]
    assert sum(parameters for parameters, _ in found) == total
    assert all(parameters < 0.51 * total and state < 2 * 0.51 * total for parameters, state in found)


def test_an_update_is_streamed_into_the_file_that_one_process_writes(tmp_path):
    from lorabench.update import Update, save_updates, stream_updates

    updates = [
        Update(parameter="b.weight", B=torch.randn(4, 3), base_norm=1.5),
        Update(parameter="a.weight", B=torch.randn(4, 2).half(), A=torch.randn(2, 3).half(), base_norm=None),
        Update(parameter="ä.bias", B=torch.randn(5, 1).double()),
        Update(parameter="c.weight", B=torch.randn(2, 7).bfloat16().T),
    ]
    for write in (save_updates, stream_updates):
        (tmp_path / write.__name__).mkdir()
        write(iter(updates), tmp_path / write.__name__)
    one, other = (list((tmp_path / name).iterdir()) for name in ("save_updates", "stream_updates"))
    assert [file.name for file in one] == [file.name for file in other] == ["delta.safetensors"]
    assert one[0].read_bytes() == other[0].read_bytes()


def test_quantized_weights_are_not_shared_out(tmp_path):
    spec = make_spec(quantization="nf4", batch_size=4)
    (record,) = run(tmp_path, 2, spec, sharding="fsdp")
    assert record.status == Status.FAILED
    assert record.error.startswith('--sharding fsdp: quantization = "nf4": the weights of bitsandbytes cannot')
    assert sharding.choose(spec, "auto", torch.device("cpu"), {}) == "ddp"


def test_from_the_command_line_and_what_using_the_result_takes(tmp_path):
    """Rank 0 measures inference by itself when all else is done; over shared-out weights nobody can."""
    sweep = tmp_path / "sweep.toml"
    sweep.write_text("""
[base]
task.name = "text"
task.max_train = 16
task.max_eval = 4
seq_len = 32
batch_size = 4
steps = 4
[[grid]]
method.name = ["lora", "full"]
""")
    command = [sys.executable, "-m", "lorabench", "run", sweep, "--results", tmp_path / "results"]
    done = subprocess.run([*command, "--processes", "2", "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lora, full = (state.record for state in sorted(Store(tmp_path / "results").states(), key=lambda s: s.run_id)[::-1])
    assert (lora.environment["sharding"], full.environment["sharding"]) == ("ddp", "fsdp")
    assert lora.measures["decode_merged_batch_1_seconds"] > 0 and lora.measures["merge_error"] < 1e-4
    assert full.provenance["serving"] == "not measured: no process has the whole model (fsdp)"


def test_a_dead_rank_ends_the_others_and_the_record_says_which(specs, tmp_path):
    (record,) = run(tmp_path, 3, specs["lora"], target=killed)
    assert (record.status, record.error) == (Status.CANCELLED, "rank 1: killed by signal 9; run again to resume")
    (record,) = run(tmp_path, 3, specs["lora"], target=out_of_memory)
    assert record.status == Status.OOM and record.error.startswith("rank 1: OutOfMemoryError: CUDA out of memory")
    (record,) = run(tmp_path, 2, specs["lora"])
    assert record.status == Status.OOM  # not tried again unless asked


def test_the_kernel_s_kill_of_any_rank_is_out_of_memory(specs, tmp_path, monkeypatch):
    counts = iter([7, 8])
    monkeypatch.setattr("lorabench.launch.count_oom_kills", lambda: next(counts))
    (record,) = run(tmp_path, 2, specs["lora"], target=killed)
    assert (record.status, record.error) == (Status.OOM, "rank 1: killed by the kernel: out of memory")


def drifting(spec: RunSpec, store: Store, settings: Settings) -> None:
    """Rank 1 changes its weights by itself, as no run should."""

    def noise() -> None:
        torch.optim.AdamW.step = lambda self: None

    at_step(3, settings.place.rank == 1, noise)
    execute_run(spec, store, settings)


def test_ranks_that_have_drifted_apart_give_no_result(specs, tmp_path):
    (record,) = run(tmp_path, 2, specs["lora"], target=drifting)
    assert record.status == Status.FAILED and "drifted apart: [1]" in record.error and record.files == {}


def test_what_is_wrong_on_all_ranks_is_said_once(tmp_path):
    (record,) = run(tmp_path, 2, make_spec(seq_len=1024))
    assert record.status == Status.FAILED and record.error.startswith("seq_len = 1024: must be at most 512")
