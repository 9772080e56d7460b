"""One run, from its spec to its record, in the order in which it happens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorabench.config.durable import remove
from lorabench.models import base_model, weights
from lorabench.models.remarks import remarks
from lorabench.processes.distributed import Sharding, local_part
from lorabench.spec.run_spec import RunSpec, method_seed
from lorabench.store.claim import Hold, Lost
from lorabench.store.record import STEPS_FILE, RunRecord, Status, now
from lorabench.store.steps import StepLog, write_steps
from lorabench.store.store import Store
from lorabench.training import bookkeeping, environment, ranks, serving, sharding
from lorabench.training.base import Base
from lorabench.training.evaluation import evaluate_base, evaluate_task
from lorabench.training.loop import Saves, train
from lorabench.training.meter import Meter
from lorabench.training.snapshots import drop_unknown, keep_snapshot, write_update
from lorabench.training.state import Training, make_optimizer
from lorabench.training.stop import Diverged, Stop, Stopped


@dataclass(kw_only=True)
class Attempt:
    """One go at a run by this process: what it has to do, where it writes, and why it should stop."""

    spec: RunSpec
    store: Store
    hold: Hold
    stop: Stop
    record: RunRecord
    """Filled on the way; written by whoever made the attempt."""
    device: torch.device
    checkpoint_seconds: float = 60.0
    sharding: Sharding = "auto"

    @property
    def folder(self) -> Path:
        return self.store.folder(self.spec.id)

    @property
    def checkpoint(self) -> Path:
        return checkpoint_file(self.folder)

    def phase(self, name: str, **progress: int) -> None:
        """What the claim says of the run from now on."""
        self.hold.progress |= {"phase": name} | progress


def checkpoint_file(folder: Path) -> Path:
    """Where a run keeps the state that it goes on from."""
    return folder / "checkpoint" / "state.pt"


def run(attempt: Attempt) -> None:
    """Read the data, load the base, attach, count, evaluate, train, evaluate, save, record, serve."""
    base, meter = _read(attempt)
    training = _attach(attempt, base, meter)
    _resume(attempt, training)
    if not training.rows:
        attempt.phase("evaluate")
        evaluate_base(training, attempt.stop)
        _seed_rank(training)
    if base.world.is_first:
        drop_unknown(attempt.folder, training.snapshots, attempt.hold)
    _train(attempt, training)
    _check_weights(training)
    _save(attempt, training)
    attempt.stop.world = base.world.leave()
    _serve(attempt, training)


def _read(attempt: Attempt) -> tuple[Base, Meter]:
    """The data, checked and tokenized; from here on counts what the method and its base take."""
    spec = attempt.spec
    torch.set_num_threads(spec.threads)
    attempt.phase("load", step=0, steps=spec.total_steps)
    attempt.record.environment = environment.describe(attempt.device)
    meter = Meter(attempt.device, spec.total_steps)
    with meter.clock("load"):
        base = Base.read(spec, attempt.device, attempt.stop.world)
        meter.set_baseline()
    base.spread(attempt.sharding)
    attempt.stop.world = base.world
    return base, meter


def _attach(attempt: Attempt, base: Base, meter: Meter) -> Training:
    """Load the base, attach the method, and count; with an optimizer, ready for the first step."""
    spec, record = attempt.spec, attempt.record

    def make() -> Training:
        with meter.clock("load"), meter.phase("load"):
            model = base.load()
        base_model.check_length(spec, base_model.max_length(model))
        record.provenance |= remarks(spec, model)
        num_base = weights.count(model)
        torch.manual_seed(method_seed(spec))
        model = spec.method.attach(model, spec)
        skeleton = bookkeeping.skeleton_of(model)
        if spec.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        record.measures |= bookkeeping.counts_of(model, num_base, base.stages)
        model = sharding.shard(model, base.world, base.device, spec.method.trains_base)
        optimizer = make_optimizer(spec, model)
        return Training(spec=spec, base=base, model=model, optimizer=optimizer, meter=meter, skeleton=skeleton)

    training = sharding.in_turn(base.world, make)
    record.environment |= base.world.describe() | base.fingerprints
    _compare_ranks(training)
    _seed_rank(training)
    return training


def _resume(attempt: Attempt, training: Training) -> None:
    """Go on from the checkpoint, if there is one; one that is of no use is set aside, and the run begins anew."""
    file, world = attempt.checkpoint, training.world
    if not world.from_first(file.exists):
        return
    try:
        training.load(file)
        attempt.record.resumed_from_step = training.step
    except ValueError as error:
        if world.is_first:
            remove(file.with_suffix(".unusable"))
            os.replace(file, file.with_suffix(".unusable"))
        print(f"checkpoint {error}; it is set aside, and the run begins anew")


def _train(attempt: Attempt, training: Training) -> None:
    """Everything that a stop can interrupt, task after task; the checkpoint is written whenever one does."""
    meter, stop, hold = training.meter, attempt.stop, attempt.hold

    def checkpoint() -> None:
        hold.check()
        log.flush()
        training.save(attempt.checkpoint)

    log_file = attempt.folder / STEPS_FILE if training.world.is_first else None
    log = StepLog(log_file, training.log, attempt.checkpoint_seconds)
    saves = Saves(checkpoint=checkpoint, snapshot=lambda: keep_snapshot(training, attempt.folder, hold))
    for stage in range(training.stage, len(training.base.stages)):
        if stage > training.stage:
            training.next_task()
        attempt.phase("train", step=training.step)
        meter.start_training()
        with meter.clock("train"):
            train(training, log, stop, saves, hold)
        meter.end_training()
        attempt.phase("evaluate")
        try:
            with meter.clock("evaluate"):
                evaluate_task(training, stop)
        except Stopped:
            checkpoint()
            raise


def _save(attempt: Attempt, training: Training) -> None:
    """What was learned, the log of the steps, and all that was measured."""
    spec, record, hold = attempt.spec, attempt.record, attempt.hold
    attempt.phase("save")
    with _kept_if_it_fails(attempt, training):
        if spec.keep != "none":
            record.files = write_update(training, training.base.untouched, attempt.folder, "updates", hold)
            record.files |= training.snapshots
        if training.world.is_first:
            record.steps_sha256 = write_steps(attempt.folder / STEPS_FILE, training.log)
        bookkeeping.fill(record, training, attempt.folder)


@contextlib.contextmanager
def _kept_if_it_fails(attempt: Attempt, training: Training) -> Iterator[None]:
    """A checkpoint of the end where what comes after training fails, so that another version can go on from there.

    Where several ranks compute the run it is written beforehand: a rank that fails cannot have the others write it.
    """

    def save() -> None:
        attempt.hold.check()
        rows = training.rows
        training.rows = rows[:-1]  # whoever goes on evaluates again
        training.save(attempt.checkpoint)
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


def _serve(attempt: Attempt, training: Training) -> None:
    """What using the model takes, measured when all else is saved: the run is done even if this fails."""
    spec, record, world = attempt.spec, attempt.record, training.world
    if spec.serving and world.is_sharded:
        record.provenance["serving"] = "not measured: no process has the whole model (fsdp)"
    if not spec.serving or world.is_sharded or not world.is_first:
        return
    note = {"serving": "not measured: the process was killed meanwhile"}
    attempt.hold.check()
    attempt.store.write(replace(record, status=Status.DONE, finished=now(), provenance=record.provenance | note))
    attempt.phase("serve")
    with training.meter.clock("serve"):
        training.model.zero_grad(set_to_none=True)
        del training.optimizer
        subject = serving.Subject(
            spec=spec,
            model=training.model,
            load_base=training.base.untouched,
            examples=training.base.stages[-1],
            folder=attempt.folder / "updates",
            device=training.base.device,
        )
        measures, notes = serving.measure(subject, attempt.stop.check)
    record.measures |= measures | training.meter.wall_time()
    record.provenance |= notes


def _compare_ranks(training: Training) -> None:
    """Raises RuntimeError where ranks begin with other data or weights, which each has read or made by itself."""
    world = training.world
    if world.size > 1:
        if strange := ranks.strangers(world, training.base.content):
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
