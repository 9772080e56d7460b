"""One run, from its spec to its record, in the order in which it happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lorabench.processes.distributed import Place, Sharding
from lorabench.spec.run_spec import RunSpec
from lorabench.store.claim import Hold, Lost
from lorabench.store.generations import write_generations
from lorabench.store.record import GENERATIONS_FILE, PICTURES_FILE, STEPS_FILE, RunRecord, Status
from lorabench.store.steps import Live, StepLog, write_steps
from lorabench.store.store import Store
from lorabench.training import bookkeeping, drift, environment, movement, ranks, serving
from lorabench.training.base import Base
from lorabench.training.evaluation import evaluate_base, evaluate_task, splits_after
from lorabench.training.loop import Saves, train
from lorabench.training.meter import Meter
from lorabench.training.snapshots import drop_unknown, keep_snapshot, write_update
from lorabench.training.state import Training
from lorabench.training.step import Asked, Own
from lorabench.training.stop import Stop, Stopped


@dataclass(frozen=True, kw_only=True)
class Company:
    """What a run has in common with those that are computed together with it; see `lorabench.training.packed`."""

    size: int
    base: Callable[[RunSpec], Base]
    """InputError as `Base.read` has it."""
    meter: Meter
    due: Callable[[], bool]
    """Whether all of them write a checkpoint now."""


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
    place: Place
    """Of this process among those that compute the run together."""
    checkpoint_seconds: float = 60.0
    live: Live | None = None
    sharding: Sharding = "auto"
    company: Company | None = None
    """None: the run is computed alone."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, of those that compute the run together."""
        return self.place.rank == 0

    @property
    def folder(self) -> Path:
        return self.store.folder(self.spec.id)

    @property
    def checkpoint(self) -> Path:
        return checkpoint_file(self.folder)

    def phase(self, name: str, **progress: float) -> None:
        """What the claim says of the run from now on."""
        self.hold.progress |= {"phase": name} | progress


def checkpoint_file(folder: Path) -> Path:
    """Where a run keeps the state that it goes on from."""
    return folder / "checkpoint" / "state.pt"


def run(attempt: Attempt) -> Asked:
    """Read the data, load the base, attach, count, evaluate, train, evaluate, save, record, look at it, serve."""
    training = _begin(attempt)
    if not training.rows and evaluate_base(training, attempt.stop, attempt.phase, attempt.store.root / "runs"):
        attempt.record.provenance["base_valid_loss"] = "as an earlier run of this store has measured it"
    yield from _train(attempt, training)
    _save(attempt, training)
    _drift(attempt, training)
    _draw(attempt, training)
    yield Own(training=training)
    _serve(attempt, training)


def _begin(attempt: Attempt) -> Training:
    """The data, checked and tokenized; the base, with the method on it, counted: ready for the first step, or for the
    one after the last that an earlier attempt has kept."""
    spec, record, is_first, checkpoint = attempt.spec, attempt.record, attempt.is_first, attempt.checkpoint
    torch.set_num_threads(spec.threads)
    attempt.phase("load")
    record.environment = environment.describe(attempt.device)
    company = attempt.company
    meter = company.meter if company else Meter.of_run(spec, attempt.device)
    with meter.reading():
        if company:
            base, record.environment["packed"] = company.base(spec), company.size
            attempt.hold.progress["packed"] = company.size
        else:
            base = Base.read(spec, attempt.device, attempt.stop.world, attempt.sharding)
    attempt.stop.world = base.world
    training = Training.attach(spec, base, meter)
    bookkeeping.begin(record, training)
    ranks.compare(training)
    ranks.seed(training)
    if is_first and not (checkpoint.exists() and (checkpoint.parent / movement.FILE).exists()):
        attempt.hold.check()
        movement.keep(training, checkpoint.parent)
    if training.resume(checkpoint):
        record.resumed_from_step = training.step
    if is_first:
        drop_unknown(attempt.folder, training.snapshots, attempt.hold)
    return training


def _train(attempt: Attempt, training: Training) -> Asked:
    """Everything that a stop can interrupt, task after task; the checkpoint is written whenever one does."""
    stop, hold = attempt.stop, attempt.hold

    def checkpoint() -> None:
        hold.check()
        log.flush()
        training.save(attempt.checkpoint)

    log_file = attempt.folder / STEPS_FILE if attempt.is_first else None
    log = StepLog(log_file, training.log, attempt.checkpoint_seconds, attempt.live)
    due = attempt.company.due if attempt.company else log.checkpoint_due
    saves = Saves(checkpoint=checkpoint, snapshot=lambda: keep_snapshot(training, attempt.folder, hold), due=due)
    for stage in range(training.stage, len(training.base.stages)):
        if stage > training.stage:
            training.next_task()
        evaluated = training.meter.wall_time().get("evaluate_seconds", 0.0)
        attempt.phase("train", step=training.step, evaluate_seconds=evaluated)
        yield from train(training, log, stop, saves, hold)
        with training.meter.clock("evaluate"):
            yield Own(training=training, splits=splits_after(training))
        try:
            evaluate_task(training, stop, attempt.phase)
        except Stopped:
            checkpoint()
            raise
    ranks.check_weights(training)


def _save(attempt: Attempt, training: Training) -> None:
    """What was learned, the log of the steps, and all that was measured; then the first rank goes on alone."""
    spec, record, hold = attempt.spec, attempt.record, attempt.hold
    attempt.phase("save")
    with _kept_if_it_fails(attempt, training):
        if spec.keep != "none":
            record.files = write_update(training, training.base.untouched, attempt.folder, "updates", hold)
            record.files |= training.snapshots
        if attempt.is_first:
            record.steps_sha256 = write_steps(attempt.folder / STEPS_FILE, training.log)
            if training.generations:
                record.generations_sha256 = write_generations(attempt.folder / GENERATIONS_FILE, training.generations)
        bookkeeping.fill(record, training, attempt.folder)
    attempt.stop.world = training.base.world.leave()


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

    is_alone = attempt.place.size == 1
    if not is_alone:
        save()
    try:
        yield
    except Lost:
        raise  # the folder is another worker's now
    except Exception:
        if is_alone:
            save()
        raise


def _drift(attempt: Attempt, training: Training) -> None:
    """How far the change has moved layers and predictions, when all else is saved: the run is done even if it fails."""
    record = attempt.record
    if attempt.is_first:
        try:
            record.movement = movement.measure(training, attempt.checkpoint.parent)
        except Exception as error:  # as for the drift: what was trained and saved stands
            record.provenance["movement"] = drift.why_not(error)
    if training.base.world.sharding == "fsdp":
        record.provenance["drift"] = "not measured: no process has the whole model (fsdp)"
    elif attempt.is_first:
        measures, notes, record.drift = drift.measure(training, attempt.store.root)
        record.measures |= measures | training.meter.wall_time()
        record.provenance |= notes


def _draw(attempt: Attempt, training: Training) -> None:
    """Pictures of a diffusion model, when all else is saved: the run is done even if this fails."""
    record, asked = attempt.record, getattr(training.base.stages[-1].task, "pictures", None)
    if asked is None or not attempt.is_first:
        return
    from lorabench.store.pictures import write_sheet
    from lorabench.training import pictures

    attempt.phase("draw")
    measures, notes, sheet = pictures.measure(training, attempt.stop.check)
    record.measures |= measures | training.meter.wall_time()
    record.provenance |= notes
    if sheet is not None:
        attempt.hold.check()
        record.pictures_sha256 = write_sheet(attempt.folder / PICTURES_FILE, sheet)


def _serve(attempt: Attempt, training: Training) -> None:
    """What using the model takes, measured when all else is saved: the run is done even if this fails."""
    spec, record, is_sharded = attempt.spec, attempt.record, training.base.world.sharding == "fsdp"
    if spec.serving and is_sharded:
        record.provenance["serving"] = "not measured: no process has the whole model (fsdp)"
    if not spec.serving or is_sharded or not attempt.is_first:
        return
    attempt.store.end(record, Status.DONE, attempt.hold, serving="not measured: the process was killed meanwhile")
    attempt.phase("serve")
    training.base.part(training.model)
    measures, notes = serving.measure(training, attempt.folder / "updates", attempt.stop.check)
    record.measures |= measures
    record.provenance |= notes
