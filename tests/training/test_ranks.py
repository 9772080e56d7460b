"""A run on several processes (gloo, CPU) beside the same run on one: numbers, stops, resumes, deaths."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import device_mesh

from lorabench.config.decode import InputError
from lorabench.launch.pool import Pool, launch
from lorabench.launch.worker import Settings, Target, execute_run
from lorabench.processes import distributed
from lorabench.processes.distributed import Gradients, Place, World, local_part, use_device
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.training import batches, evaluation, loop, passes, sharding, state
from lorabench.training import meter as meters
from lorabench.training import run as journey
from lorabench.training.base import Base
from lorabench.training.state import Training, random_state
from lorabench.training.step import Asked
from tests.conftest import make_spec

TOLERANCES = {"float32": (1e-5, 3e-5, 1e-6), "bfloat16": (1e-2, 5e-2, 3e-2)}
"""Of losses, of what was learned relative to its norm, and of accuracies: sums in another order, over six steps.

ΔW of a norm's gain is some 1e-3 of the gain, whose last bit is 6e-8 in float32.
"""
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
    tolerance, weight_tolerance, accuracy = TOLERANCES[record.spec["dtype"]]
    assert losses(root, record) == pytest.approx(losses(other_root, other), rel=tolerance)
    for name, value in record.measures.items():
        if name.startswith(("valid_", "test_", "train_loss", "base_")):
            assert other.measures[name] == pytest.approx(value, rel=tolerance, abs=accuracy), name
    wanted, got = learned(root, record), learned(other_root, other)
    assert wanted.keys() == got.keys() and wanted
    for name, tensor in wanted.items():
        assert float((got[name] - tensor).norm()) <= weight_tolerance * float(tensor.norm()) + 1e-8, name
    assert any(float(tensor.norm()) for tensor in wanted.values())


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    """Without the launcher's look at whether each method fits its model, which takes as long as a run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorabench.launch.pool._Launch._check", lambda self: None)
        yield


@pytest.fixture(scope="module")
def specs(tiny_bases: dict[str, str], encoder_decoders: dict[str, str], labelled: str) -> dict[str, RunSpec]:
    full = SAME | {"method": {"name": "full"}, "lr": 1e-3}
    classified = {"name": "classification", "data": labelled, "max_eval": 7}
    writing = {"name": "seq2seq", "data": "builtin:arithmetic", "source": "{prompt}", "target": "{response}",
               "max_train": 16, "max_eval": 5, "generate": {"max_new_tokens": 4, "batch_size": 2}}  # fmt: skip
    return {
        "lora": make_spec(**SAME, eval_every=3),
        "parts": make_spec(**SAME, micro_batch_size=1, gradient_checkpointing=True),
        "adalora": make_spec(**SAME, method={"name": "adalora", "rank": 2, "start_rank": 4}),
        "bfloat16": make_spec(**SAME, dtype="bfloat16"),
        "empty": make_spec(**SAME | {"batch_size": 2}),
        "bitfit": make_spec(**SAME, task=classified, method={"name": "bitfit"}, model=tiny_bases["bert"]),
        "prompt": make_spec(**SAME, method={"name": "prompt"}),
        "classifier": make_spec(**SAME, task=classified, model=tiny_bases["bert"]),
        "full": make_spec(**full),
        "writing": make_spec(**full, task=writing, model=encoder_decoders["t5"]),
        "full bfloat16": make_spec(**full, dtype="bfloat16"),
        "full empty": make_spec(**full | {"batch_size": 2}),
    }


@pytest.fixture(scope="module")
def alone(specs: dict[str, RunSpec], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, RunRecord]]:
    """Each run on one process."""
    root = tmp_path_factory.mktemp("alone")
    return root, dict(zip(specs, run(root, 1, *specs.values()), strict=True))


def observed(spec: RunSpec, store: Store, settings: Settings) -> None:
    """Notes what this rank holds after training, and when it made meshes and loaded bases; only the first may save."""
    events, trained, in_turn = [], journey.train, sharding.in_turn

    def noting(training: Training, *rest: Any) -> Asked:
        yield from trained(training, *rest)
        states = [value for state in training.optimizer.state.values() for value in state.values()]
        events.extend(sum(local_part(t).numel() for t in part) for part in (training.model.parameters(), states))

    def fail(*_: Any) -> None:
        raise AssertionError("no file is for this rank to write")

    def event(name: str, call: Any) -> Any:
        return lambda *arguments: (events.append(name), call(*arguments))[1]

    journey.train, sharding.in_turn = noting, event("load", in_turn)
    device_mesh.init_device_mesh = event("mesh", device_mesh.init_device_mesh)
    if settings.place.rank:
        type(spec.method).save = fail
    execute_run(spec, store, settings)
    (store.folder(spec.id) / f"events.{settings.place.rank}").write_text(json.dumps(events))


@pytest.mark.parametrize(
    ("processes", "sharding", "names"),
    [
        (2, "ddp", ["lora", "adalora", "prompt", "bfloat16"]),
        (2, "fsdp", ["parts", "bitfit", "adalora", "full bfloat16", "writing", "full"]),
        (3, "ddp", ["classifier", "empty"]),
        (3, "fsdp", ["full empty"]),
    ],
)
def test_several_processes_compute_what_one_does(processes, sharding, names, specs, alone, tmp_path):
    """With equal shares, unequal ones and an empty one."""
    root, records = alone
    found = run(tmp_path, processes, *(specs[name] for name in names), target=observed, sharding=sharding)
    for name, record in zip(names, found, strict=True):
        assert_same(root, records[name], tmp_path, record)
        assert {record.environment[key] for key in ("ranks", "sharding")} == {processes, sharding}
        assert record.measures["all_ranks_peak_gib"] > record.measures["peak_gib"] > 0
        assert record.measures["num_trainable"] == records[name].measures["num_trainable"]
    events = [json.loads((tmp_path / "runs" / record.run_id / f"events.{r}").read_text()) for r in range(processes)]
    if sharding == "fsdp":
        assert_shared_out(record, events)


def assert_shared_out(record: RunRecord, events: list[list[Any]]) -> None:
    """Each rank holds its share of the weights and of the optimizer's state; all make one mesh, before they load."""
    assert all(each[:2] == ["mesh", "load"] and each.count("mesh") == 1 for each in events)
    held = [[number for number in each if isinstance(number, int)] for each in events]
    total, share = record.measures["num_parameters"], 1.02 / len(events)
    assert sum(parameters for parameters, _ in held) == total
    assert all(parameters < share * total and state < 2 * share * total for parameters, state in held)


def test_shares_are_even_and_leave_nothing_out():
    for size, count in ((1, 5), (2, 5), (3, 2), (4, 9), (4, 0)):
        worlds = [World(place=Place(rank=rank, size=size)) for rank in range(size)]
        shares = [list(world.share(range(count))) for world in worlds]
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def at_step(step: int, rank: int, act: Any) -> None:
    """In this process, if it is of that rank: `act` in the midst of the step."""
    schedule = loop.schedule

    def acting(spec: RunSpec, now: int) -> float:
        if now == step:
            act()
        return schedule(spec, now)

    loop.schedule = acting if rank else schedule


def asked_to_stop(spec: RunSpec, store: Store, settings: Settings) -> None:
    """The last rank alone gets the signal."""
    at_step(3, settings.place.rank == settings.place.size - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    execute_run(spec, store, settings)


def asked_while_evaluating(spec: RunSpec, store: Store, settings: Settings) -> None:
    """After training, between the evaluation of one split and of the next."""
    evaluate = evaluation.evaluate

    def asking(training: Training, examples: Any, split: str, *rest: Any) -> dict[str, float]:
        if split == "test" and settings.place.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(training, examples, split, *rest)

    evaluation.evaluate = asking
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


def asked_later(spec: RunSpec, store: Store, settings: Settings) -> None:
    """The more processes, the later."""
    at_step(settings.place.size + 1, settings.place.rank == 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    execute_run(spec, store, settings)


@pytest.mark.parametrize(("name", "sharding", "sizes"), [("lora", "ddp", (1, 2)), ("full", "fsdp", (1, 2, 3))])
def test_a_stopped_run_goes_on_with_any_number_of_processes(name, sharding, sizes, specs, alone, tmp_path):
    """One after the other with so many, and at last with one."""
    root, records = alone
    for size in sizes:
        (stopped,) = run(tmp_path, size, specs[name], target=asked_later, sharding=sharding)
        assert stopped.status == Status.CANCELLED and stopped.error == "stopped by SIGTERM; run again to resume"
        assert stopped.resumed_from_step == (size + 1 if size > 1 else None)
    (resumed,) = run(tmp_path, 1, specs[name])
    assert resumed.resumed_from_step == sizes[-1] + 2 and resumed.attempts == len(sizes) + 1
    assert_same(root, records[name], tmp_path, resumed)
    assert "model_flops_utilization" not in resumed.measures  # steps of different numbers of processes are timed
    assert resumed.provenance["model_flops_utilization"].startswith(f"not measured: {[*sizes]} processes")


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 2, "dropout": 0.2}, {"name": "full"}])
def test_a_resumed_run_has_the_same_bits_with_as_many_processes(method, tmp_path):
    """Dropout too, of which each rank has its own; and snapshots."""
    spec = make_spec(method=method, batch_size=4, snapshot_every=3)
    (whole,) = run(tmp_path / "whole", 2, spec)
    run(tmp_path / "stopped", 2, spec, target=asked_to_stop)
    (stopped,) = run(tmp_path / "stopped", 2, spec, target=asked_while_evaluating)
    assert (stopped.status, stopped.resumed_from_step) == (Status.CANCELLED, 4)
    (resumed,) = run(tmp_path / "stopped", 2, spec)
    assert resumed.resumed_from_step == 6
    assert resumed.files == whole.files and any(path.startswith("snapshots/000003/") for path in whole.files)
    assert losses(tmp_path / "whole", whole) == losses(tmp_path / "stopped", resumed)


def test_damaged_shares_are_set_aside_and_the_run_begins_anew(specs, alone, tmp_path):
    root, records = alone
    run(tmp_path / "stopped", 2, specs["full"], target=asked_to_stop)
    for damage in ("cut short", "junk"):
        shutil.copytree(tmp_path / "stopped", tmp_path / damage)
        (shares,) = (tmp_path / damage / "runs" / specs["full"].id / "checkpoint").glob("shares-*")
        file = max(shares.iterdir(), key=lambda each: each.stat().st_size)
        content = file.read_bytes()
        file.write_bytes(content[:-1] if damage == "cut short" else bytes(len(content)))
        (again,) = run(tmp_path / damage, 2, specs["full"])
        assert again.resumed_from_step is None
    assert_same(root, records["full"], tmp_path / damage, again)


def test_a_gradient_is_summed_in_the_steps_that_have_one(monkeypatch):
    """And left out of the others, as on one process."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))  # two ranks of equal numbers
    first, later = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    gradients = Gradients([first, later], World(place=Place(size=2), sharding="ddp"))
    for used, idle in ((first, later), (later, first)):
        used.grad, idle.grad = torch.ones_like(used), None
        gradients.sum()
        assert used.grad.tolist() == [2.0] * len(used) and idle.grad is None


def test_buckets_hold_every_gradient_once(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 32)
    tensors = [torch.full((size,), 0.0, dtype=dtype) for size in (3, 5, 9, 1) for dtype in (torch.float32, torch.half)]
    buckets = [*distributed._buckets(tensors)]
    assert sorted(id(t) for bucket in buckets for t in bucket) == sorted(map(id, tensors))
    for bucket in buckets:
        assert len({tensor.dtype for tensor in bucket}) == 1 and sum(t.nbytes for t in bucket[:-1]) < 32
    sizes = [sum(t.nbytes for t in bucket) for bucket in buckets]
    assert sum(size < 32 for size in sizes) <= 2  # the last of each dtype


def test_shared_out_weights_are_not_kept_by_autocast():
    for world, cached in ((World(), True), (World(sharding="fsdp"), False)):
        with passes.autocast(make_spec(dtype="bfloat16"), torch.device("cpu"), world):
            assert torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled() == cached


def test_joules_of_ranks_that_are_gone_are_kept():
    """And counted once: those of a machine by one of its ranks."""
    spec, model = make_spec(), torch.nn.Linear(2, 2)
    state = {**meters.Meter(torch.device("cpu"), 1).state, "energy_joules": 10.0}
    state_of = {"meter": state, "random": random_state(batches.CPU)}
    before = [state_of | {"tells_energy": tells} for tells in (1, 0, 1)]
    found = []
    for rank in range(2):
        meter = meters.Meter(torch.device("cpu"), 1)
        base = Base(
            spec=spec, stages=[], device=batches.CPU, world=World(place=Place(rank=rank, size=2, local_rank=rank))
        )
        Training(spec, base, model, torch.optim.SGD(model.parameters()), meter)._load_rank(before)
        found.append(meter.energy_joules)
    assert found == [20.0, 0.0]


def test_several_processes_choose_their_gpus_themselves():
    with pytest.raises(InputError, match="device = cuda:1: 2 processes"):
        use_device("cuda:1", Place(size=2))


def test_shares_hold_the_moments_that_there_are(tmp_path):
    """AdamW keeps none of a weight that has had no gradient: all are so when a task begins, and some may stay so."""
    used, unused = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2))
    optimizer = torch.optim.AdamW([unused, used], lr=0.1, fused=True)
    trained = {"used": used.detach(), "unused": unused.detach()}
    for keys in ({}, {1: {"step", "exp_avg", "exp_avg_sq"}}):
        about = sharding.write_shares(trained, optimizer, tmp_path, World())
        read = sharding.read_shares(dict(about), trained, optimizer, tmp_path, World())
        moments, kept = read["optimizer"]["state"], optimizer.state_dict()["state"]
        assert {number: set(found) for number, found in moments.items()} == keys
        assert all(torch.equal(value, kept[number][key]) for number in keys for key, value in moments[number].items())
        assert all(torch.equal(value, trained[name]) for name, value in read["model"].items())
        used.square().sum().backward()
        optimizer.step()


def test_an_update_is_streamed_into_the_file_that_one_process_writes(tmp_path):
    from lorabench.updates.update import Update, save_updates, stream_updates

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
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
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
    monkeypatch.setattr("lorabench.launch.pool.count_oom_kills", lambda: next(counts))
    (record,) = run(tmp_path, 2, specs["lora"], target=killed)
    assert (record.status, record.error) == (Status.OOM, "rank 1: killed by the kernel: out of memory")


def differing(spec: RunSpec, store: Store, settings: Settings) -> None:
    """Rank 1 begins with other data, with other weights, or changes its weights by itself, as the seed says."""
    if settings.place.rank == 1:
        match spec.seed:
            case 0:
                Base.content = property(lambda base: {"data": {"task": "another"}})
            case 1:
                state.method_seed = lambda spec: 0
            case 2:
                at_step(3, 1, lambda: setattr(torch.optim.AdamW, "step", lambda self: None))
    execute_run(spec, store, settings)


def test_ranks_that_differ_give_no_result(tmp_path):
    """What they begin with is compared before they train."""
    records = run(tmp_path, 2, *(make_spec(batch_size=4, seed=seed) for seed in range(3)), target=differing)
    errors = ("[1] have other data or another base", "[1] start from other weights", "drifted apart: [1]")
    for record, error in zip(records, errors, strict=True):
        assert record.status == Status.FAILED and error in record.error and record.files == {}
    logs = [(tmp_path / "runs" / record.run_id / "steps.jsonl").exists() for record in records]
    assert logs == [False, False, True]


def test_what_is_wrong_on_all_ranks_is_said_once(tmp_path):
    (record,) = run(tmp_path, 2, make_spec(seq_len=1024))
    assert record.status == Status.FAILED and record.error.startswith("seq_len = 1024: must be at most 512")
