"""One run as a worker sees it: claim, load, train, evaluate, save, record; whatever happens, a true status."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabench.config.decode import InputError
from lorabench.config.durable import remove
from lorabench.models import base_model, weights
from lorabench.models.remarks import remarks
from lorabench.processes.distributed import (
    Place,
    RankFailed,
    Sharding,
    World,
    is_peer_loss,
    joined,
    local_part,
    log_name,
    meet,
    own_device,
    told,
)
from lorabench.spec.run_spec import RunSpec, canonical_json
from lorabench.store import claim
from lorabench.store.claim import Followed, Hold, Lost
from lorabench.store.record import STEPS_FILE, RunRecord, Status
from lorabench.store.steps import StepLog, write_steps
from lorabench.store.store import Store
from lorabench.training import bookkeeping, environment, ranks, serving, sharding
from lorabench.training import meter as meters
from lorabench.training.examples import Examples, prepare_stages
from lorabench.training.loop import Saves, evaluate, stop_on_signals, train
from lorabench.training.snapshots import drop_unknown, keep_snapshot, write_update
from lorabench.training.state import Diverged, Stop, Stopped, Training, make_optimizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how a run is executed: never what is computed."""

    device: str = "auto"
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:1`."""
    checkpoint_seconds: float = 60.0
    timeout_seconds: float | None = None
    """End with status `timeout` after so long; the checkpoint stays."""
    job: str | None = None
    """The cluster's id of the job; it stands in the claim."""
    log_to_file: bool = True
    """Send stdout and stderr to the run's log.txt."""
    place: Place = field(default_factory=Place)
    """Among the processes that compute the run together; each of them calls `execute`."""
    sharding: Sharding = "auto"


def execute(spec: RunSpec, store: Store, options: Options) -> Status:
    """One run in this process, or this process's part of it. Its final status; `running` if another worker has it.

    Of several ranks the first one claims the run and writes its record. RankFailed on each of them where one has
    failed: whoever has started them knows of all, and says in the record what it was.
    """
    place, meeting = options.place, meet(options.place)
    hold = _take(spec, store, options) if place.rank == 0 else Followed()
    word = told(place, meeting, lambda: str(Status.MISSING if isinstance(hold, Hold) else hold))
    if not isinstance(hold, Hold) or word != Status.MISSING:
        return Status(word)
    with hold, _log(store.folder(spec.id) / log_name(place.rank), options.log_to_file), _only_new_garbage():
        return _attempt(spec, store, options, hold, meeting)


@contextlib.contextmanager
def _only_new_garbage() -> Iterator[None]:
    """What is there before stays out of the collector's sight: half a million objects of the libraries' imports, a
    quarter of a second for each of the meter's collections. In a run's own process they are already."""
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _take(spec: RunSpec, store: Store, options: Options) -> Hold | Status:
    """The claim on the run, or how it stands where there is nothing to do: done, or running elsewhere."""
    store.write_spec(spec)
    if store.state(spec.id).status == Status.DONE:
        return Status.DONE
    hold = claim.take(store.folder(spec.id), {"job": options.job} if options.job else None)
    if hold is None:
        return Status.RUNNING
    state = store.state(spec.id)
    if state.status == Status.DONE or state.unread:  # finished between the look and the claim
        with hold:
            if state.unread:
                raise InputError(state.error or "")
            return Status.DONE
    return hold


def _attempt(spec: RunSpec, store: Store, options: Options, hold: Hold, meeting: Any) -> Status:
    place = options.place
    record = RunRecord(
        run_id=spec.id, spec=spec.to_json(), status=Status.RUNNING, started=_now(), attempts=hold.number
    )  # fmt: skip
    if place.rank == 0:
        store.write(record)
    deadline = time.monotonic() + options.timeout_seconds if options.timeout_seconds else None
    stop = Stop(deadline=deadline, marker=store.cancel_marker(spec.id))
    try:
        device = _use_device(options)
        with stop_on_signals(stop), joined(place, meeting, device) as stop.world:
            _run(spec, store, options, hold, record, stop)
        record.status = Status.DONE
    except Stopped as error:
        record.status = Status.TIMEOUT if str(error) == "timeout" else Status.CANCELLED
        record.error = f"stopped by {error}; run again to resume"
        if record.status == Status.TIMEOUT:
            record.error = f"stopped after {options.timeout_seconds:g} s; --retry timeout resumes it"
    except Diverged as error:
        record.status, record.error = Status.DIVERGED, str(error)
    except Lost:
        raise  # the run is another worker's now: leave its record alone
    except Exception as error:
        traceback.print_exc()
        record.status = Status.OOM if _is_out_of_memory(error) else Status.FAILED
        record.error = _one_line(error)
        if place.size > 1:
            raise RankFailed(record.status, record.error, is_peer_loss(error)) from error
    if place.rank:
        return record.status
    record.finished = _now()
    hold.check()
    store.write(record)
    if record.status == Status.DONE:
        shutil.rmtree(store.folder(spec.id) / "checkpoint", ignore_errors=True)
    return record.status


def _run(spec: RunSpec, store: Store, options: Options, hold: Hold, record: RunRecord, stop: Stop) -> None:
    """Load, evaluate, train, evaluate, save: fills `record`."""
    folder, world = store.folder(spec.id), stop.world
    checkpoint = checkpoint_file(folder)
    device = _use_device(options)
    torch.set_num_threads(spec.threads)
    hold.progress |= {"phase": "load", "step": 0, "steps": spec.total_steps}
    record.environment = environment.describe(device)
    meter = meters.Meter(device, spec.total_steps)
    with meter.clock("load"):
        stages = prepare_stages(spec)
        options_of_model = stages[0].model_options
        meter.set_baseline()
    if world.size > 1:
        stop.world = world = world.spread(sharding.choose(spec, options.sharding, device, options_of_model), device)
    tuned, skeleton, counts, about = sharding.in_turn(world, lambda: _load_tuned(spec, stages, meter, world))
    record.environment |= world.describe() | base_model.fingerprint(spec) | bookkeeping.data_of(stages)
    record.measures |= counts
    record.provenance |= about
    content: dict[str, Any] = {key: record.environment.get(key) for key in ("model_commit", "model_sha256", "data")}
    training = Training(spec, tuned, make_optimizer(spec, tuned), meter, world, content=content, skeleton=skeleton)
    _compare_ranks(training)
    _seed_rank(training)
    if world.from_first(checkpoint.exists):
        record.resumed_from_step = _resume(training, checkpoint)
    if not training.rows:
        _evaluate_base(training, stages, base_loader(training, stages), stop, hold)
        _seed_rank(training)
    if world.is_first:
        drop_unknown(folder, training.snapshots, hold)
    _train_and_evaluate(training, stages, options, stop, hold, folder)
    _check_weights(training)
    hold.progress["phase"] = "save"
    with _kept_if_it_fails(training, folder, hold):
        if spec.keep != "none":
            load_base = base_loader(training, stages)
            record.files = write_update(training, load_base, folder, "updates", hold) | training.snapshots
        if world.is_first:
            record.steps_sha256 = write_steps(folder / STEPS_FILE, training.log)
        bookkeeping.fill(record, training, folder)
    stop.world = world.leave()
    if spec.serving and world.is_sharded:
        record.provenance["serving"] = "not measured: no process has the whole model (fsdp)"
    elif spec.serving and world.is_first:
        _write_unserved(record, store, hold)
        hold.progress["phase"] = "serve"
        with meter.clock("serve"):
            _serve(record, training, stages, folder, stop)
        record.measures |= meter.wall_time()


@contextlib.contextmanager
def _kept_if_it_fails(training: Training, folder: Path, hold: Hold) -> Iterator[None]:
    """A checkpoint of the end where what comes after training fails, so that another version can go on from there.

    Where several ranks compute the run it is written beforehand: a rank that fails cannot have the others write it.
    """

    def save() -> None:
        hold.check()
        rows = training.rows
        training.rows = rows[:-1]  # whoever goes on evaluates again
        training.save(checkpoint_file(folder))
        training.rows = rows

    if training.world.size > 1:
        save()
    try:
        yield
    except Lost:
        raise  # the folder is another worker's now
    except Exception:
        if training.world.size == 1:
            save()
        raise


def _load_tuned(
    spec: RunSpec, stages: list[Examples], meter: meters.Meter, world: World
) -> tuple[nn.Module, nn.Module | None, dict[str, float], dict[str, str]]:
    """The base with the method attached, a copy of it without numbers, its counts, and remarks on the base."""
    with meter.clock("load"), meter.phase("load"):
        base = seeded_base(spec, stages[0], sharding.loads_on(world, meter.device))
    base_model.check_length(spec, base_model.max_length(base))
    about, num_base = remarks(spec, base), weights.count(base)
    torch.manual_seed(method_seed(spec))
    tuned = spec.method.attach(base, spec)
    skeleton = bookkeeping.skeleton_of(tuned)
    if spec.gradient_checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    counts = bookkeeping.counts_of(tuned, num_base, stages)
    return sharding.shard(tuned, world, meter.device, spec.method.trains_base), skeleton, counts, about


def base_loader(training: Training, stages: list[Examples]) -> Callable[[], nn.Module]:
    """Loads the untouched base, shared out over the ranks where the tuned model is."""
    world, device = training.world, training.meter.device

    def load() -> nn.Module:
        base = seeded_base(training.spec, stages[0], sharding.loads_on(world, device))
        return sharding.shard(base, world, device, trains_base=True)

    return partial(sharding.in_turn, world, load)


def checkpoint_file(folder: Path) -> Path:
    """Where a run keeps the state that it goes on from."""
    return folder / "checkpoint" / "state.pt"


def _resume(training: Training, checkpoint: Path) -> int | None:
    """Load the checkpoint; one that is of no use is set aside, and the run begins anew. The step, None if anew."""
    try:
        training.load(checkpoint)
    except ValueError as error:
        if training.world.is_first:
            remove(checkpoint.with_suffix(".unusable"))
            os.replace(checkpoint, checkpoint.with_suffix(".unusable"))
        print(f"checkpoint {error}; it is set aside, and the run begins anew")
        return None
    return training.step


def _train_and_evaluate(
    training: Training, stages: list[Examples], options: Options, stop: Stop, hold: Hold, folder: Path
) -> None:
    """Everything that a stop can interrupt, task after task; the checkpoint is written whenever one does."""
    meter = training.meter

    def checkpoint() -> None:
        hold.check()
        log.flush()
        training.save(checkpoint_file(folder))

    def snapshot() -> None:
        keep_snapshot(training, base_loader(training, stages), folder, hold)

    @contextlib.contextmanager
    def evaluating() -> Iterator[None]:
        hold.progress["phase"] = "evaluate"
        try:
            with meter.clock("evaluate"):
                yield
        except Stopped:
            checkpoint()
            raise

    log_file = folder / STEPS_FILE if training.world.is_first else None
    log = StepLog(log_file, training.log, options.checkpoint_seconds)
    saves = Saves(checkpoint=checkpoint, snapshot=snapshot)
    for stage in range(training.stage, len(stages)):
        if stage > training.stage:
            training.next_task()
        hold.progress |= {"phase": "train", "step": training.step}
        meter.start_training()
        with meter.clock("train"):
            train(training, stages[stage], log, stop, saves, hold)
        meter.end_training()
        with evaluating():
            is_last = stage == len(stages) - 1
            after = _evaluate(training, stages, ["validation", *(["test", "retain"] if is_last else [])], stop)
        training.rows.append(after["validation"])
    _note_after(training, after)


def _evaluate_base(
    training: Training, stages: list[Examples], load_base: Callable[[], nn.Module], stop: Stop, hold: Hold
) -> None:
    """What the untouched base does on the tasks; a random prompt in front of it would be another model."""
    hold.progress["phase"] = "evaluate"
    with training.meter.clock("evaluate"):
        base = training.model if training.spec.method.starts_at_base else load_base()
        before = _evaluate(training, stages, ["validation", "retain"], stop, base)
    training.rows.append(before["validation"])
    training.metrics["base_valid_loss"] = before["validation"][-1]["valid_loss"]
    for retained in before["retain"]:
        training.metrics["retain_loss_before"] = retained["retain_loss"]


def _evaluate(
    training: Training, stages: list[Examples], splits: list[str], stop: Stop, model: nn.Module | None = None
) -> dict[str, list[dict[str, float]]]:
    """Split -> its metrics on every task for `validation`, on the last task that has the split for the others."""
    found = {}
    for split in splits:
        having = [examples for examples in stages if examples.splits.get(split)]
        found[split] = [
            evaluate(training, examples, split, stop, model)
            for examples in (having if split == "validation" else having[-1:])
        ]
    return found


def _note_after(training: Training, after: dict[str, list[dict[str, float]]]) -> None:
    training.metrics |= after["validation"][-1]
    for tested in after["test"]:
        training.metrics |= tested
    for retained in after["retain"]:
        training.metrics["retain_loss_after"] = retained["retain_loss"]
        training.metrics["forgetting"] = retained["retain_loss"] - training.metrics["retain_loss_before"]
    last = training.losses[-max(1, training.spec.steps // 10) :]
    training.metrics["train_loss"] = sum(last) / len(last)


def _write_unserved(record: RunRecord, store: Store, hold: Hold) -> None:
    """What stands if the process is killed while it measures: a run that is done, for all that counts is saved."""
    note = {"serving": "not measured: the process was killed meanwhile"}
    hold.check()
    store.write(replace(record, status=Status.DONE, finished=_now(), provenance=record.provenance | note))


def _serve(record: RunRecord, training: Training, stages: list[Examples], folder: Path, stop: Stop) -> None:
    """What using the model takes, measured when all else is saved: the run is done even if this fails."""
    spec, device = training.spec, training.meter.device
    training.model.zero_grad(set_to_none=True)
    del training.optimizer
    subject = serving.Subject(
        spec=spec,
        model=training.model,
        load_base=base_loader(training, stages),
        examples=stages[-1],
        folder=folder / "updates",
        device=device,
    )
    measures, notes = serving.measure(subject, stop.check)
    record.measures |= measures
    record.provenance |= notes


def seeded_base(spec: RunSpec, examples: Examples, device: torch.device) -> nn.Module:
    """The untouched base: every call gives the same, the random head included."""
    torch.manual_seed(spec.seed)
    return base_model.load_base(spec, device, examples.model_options)


def method_seed(spec: RunSpec, **also: int) -> int:
    """Seed of a method's own initialization and dropout.

    It depends on the method too: from one random stream the A of rank 8 would be the first rows of the A of rank 64,
    and their subspaces would agree for no other reason.
    """
    content = canonical_json({"seed": spec.seed, "method": spec.to_json()["method"]} | also)
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


def _compare_ranks(training: Training) -> None:
    """Raises RuntimeError where ranks begin with other data or weights, which each has read or made by itself."""
    world = training.world
    if world.size > 1:
        if strange := ranks.strangers(world, training.content):
            raise RuntimeError(f"the ranks differ: {strange} have other data or another base than rank 0")
        trained = ranks.digest(training.spec.method.trained_state(training.model).values())
        if strange := ranks.strangers(world, trained, ranks.frozen_sums(training.model)):
            raise RuntimeError(f"the ranks differ: {strange} start from other weights than rank 0")


def _check_weights(training: Training) -> None:
    """Raises Diverged where trained weights are not finite, and RuntimeError where ranks differ in what all hold."""
    world, trained = training.world, training.spec.method.trained_state(training.model)
    if world.any(not all(local_part(tensor).isfinite().all() for tensor in trained.values())):
        raise Diverged(f"step {training.step}: trained weights are not finite")
    if world.size > 1:
        strange = ranks.strangers(world, ranks.digest(trained.values()))
        if strange:
            raise RuntimeError(f"the ranks have drifted apart: {strange} hold other trained weights than rank 0")


def _seed_rank(training: Training) -> None:
    """Dropout of its own for each rank but the first, which goes on as one process would."""
    if not training.world.is_first:
        torch.manual_seed(method_seed(training.spec, process=training.world.rank))


def _use_device(options: Options) -> torch.device:
    """This process's device, made the current one."""
    device = pick_device(options.device)
    if device.index is not None and options.place.size > 1:
        raise InputError(f"device = {options.device}: {options.place.size} processes take a GPU each; use cuda")
    device = own_device(options.place, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _is_out_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "out of memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def _one_line(error: Exception) -> str:
    if isinstance(error, InputError):
        return "; ".join(error.problems)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def _log(file: Path, enabled: bool) -> Iterator[None]:
    """Append everything that is printed, by Python or by a library below it, to the run's log."""
    if not enabled:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(file, "a", buffering=1) as handle:
        handle.write(f"--- {_now()} pid {os.getpid()}\n")
        handle.flush()
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, number in zip(saved, (1, 2), strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
