"""What a run leaves behind: its record, and the store that all sweeps share.

    results/runs/<run_id>/  spec.json  record.json  steps.jsonl  updates/  snapshots/  log.txt  claims/  checkpoint/

Of a run on several processes, log.1.txt, log.2.txt, … are those of the further ones.
Everything is written whole or not at all (temporary file, fsync, rename), so a reader never sees half a record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from lorabench.claim import Claim, current_claim
from lorabench.decode import InputError
from lorabench.durable import write_bytes as write_bytes
from lorabench.durable import write_json as write_json
from lorabench.quote import clip
from lorabench.spec import RunSpec, spec_id
from lorabench.stored import Unreadable, below, build, check_name, fit
from lorabench.stored import read_json as read_json


class Status(StrEnum):
    """How a run stands.

    `interrupted` is never written: it is a `running` record whose worker is gone. Nor are `pending`, which waits in a
    cluster's queue, and `lost`, whose job went away without a result and without a reason that is the run's own.
    """

    MISSING = "missing"
    PENDING = "pending"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    LOST = "lost"
    DONE = "done"
    OOM = "oom"
    TIMEOUT = "timeout"
    DIVERGED = "diverged"
    FAILED = "failed"
    CANCELLED = "cancelled"
    CORRUPT = "corrupt"


CANCEL_MARKER = "cancel"
STEPS_FILE = "steps.jsonl"
READ_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json")
"""Of the files of a folder of updates that readers look into."""

FAILURES = (Status.OOM, Status.TIMEOUT, Status.DIVERGED, Status.FAILED)
"""Ended without a result, and not tried again unless asked (`--retry`)."""


@dataclass(frozen=True)
class Measure:
    """One number of a record: its unit, whether more is better (None: neither), and what it is."""

    unit: str
    higher_is_better: bool | None
    text: str
    group: str


BATCH_SIZES = (1, 8)
"""At which inference is measured."""
NUM_RESIDENT = 4
"""Adapters that a model holds at once where mixed batches and swaps are measured."""


def _measures(group: str, *rows: tuple[str, str, bool | None, str]) -> dict[str, Measure]:
    return {name: Measure(unit, better, text, group) for name, unit, better, text in rows}


def _inference() -> Iterator[tuple[str, str, bool | None, str]]:
    """Latency and throughput of base, unmerged and merged model, and what the latter two add to the base's latency."""
    parts = {"prefill": "to the first token of a batch of prompts", "decode": "from one generated token to the next"}
    for size in BATCH_SIZES:
        batch = f"{size} at a time" if size > 1 else "one at a time"
        for part, what in parts.items():
            for model in ("base", "unmerged", "merged"):
                key, who = f"{part}_{model}_batch_{size}", f"{model} model, {batch}"
                yield f"{key}_seconds", "s", False, f"median time {what}: {who}"
                yield f"{key}_tokens_per_second", "tokens/s", True, f"tokens per second of {part}: {who}"
                if model != "base":
                    text = f"{part} time over the base's, less 1: {who}; median over pairs of calls"
                    yield f"added_{key}", "%", False, text


MEASURES: dict[str, Measure] = (
    _measures(
        "counts",
        ("num_parameters", "", None, "parameters of the model as it computes, the method's own included"),
        ("num_trainable", "", False, "parameters that are trained"),
        ("trainable_share", "%", False, "trained parameters as a percentage of the untouched base model's"),
        ("num_train_examples", "", None, "training examples"),
    )
    | _measures(
        "memory",
        ("peak_gib", "GiB", False, "highest of the training phases: CUDA allocated, or CPU above the baseline"),
        ("all_ranks_peak_gib", "GiB", False, "of a run on several ranks, the sum of their peak_gib"),
        ("load_peak_gib", "GiB", False, "peak while the base is loaded and quantized"),
        ("forward_backward_peak_gib", "GiB", False, "peak of forward and backward"),
        ("optimizer_peak_gib", "GiB", False, "peak of the optimizer step"),
        ("reserved_peak_gib", "GiB", False, "CUDA: peak that the allocator reserved"),
        ("tensor_peak_gib", "GiB", False, "CPU: most bytes of live tensors in a step, whatever the allocator keeps"),
        ("baseline_gib", "GiB", None, "CPU: resident before the base was loaded; not part of the peaks"),
        (
            "model_gib",
            "GiB",
            False,
            "bytes of the model's parameters and buffers, the scales of quantized weights included",
        ),
        ("optimizer_state_gib", "GiB", False, "bytes of the optimizer's state"),
    )
    | _measures(
        "throughput",
        ("tokens_per_second", "tokens/s", True, "non-padding tokens per second of training step, warm-up left out"),
        ("padded_tokens_per_second", "tokens/s", None, "the same with padding counted"),
        ("label_tokens_per_second", "tokens/s", None, "the same, only what the loss is taken over"),
        ("step_seconds_median", "s", False, "median time of an optimizer step"),
        ("step_seconds_p95", "s", False, "95th percentile of the time of an optimizer step"),
        (
            "flops_per_step",
            "FLOP",
            None,
            "model FLOPs of a step: matrix products, padding included and recomputation apart",
        ),
        (
            "model_flops_utilization",
            "%",
            True,
            "model FLOPs per second as a percentage of the highest rate known of the device",
        ),
        ("energy_joules", "J", False, "of training, where NVML or RAPL tells"),
    )
    | _measures(
        "storage",
        ("updates_bytes", "bytes", False, "size on disk of what was learned"),
    )
    | _measures(
        "seconds",
        ("load_seconds", "s", False, "wall time to load the base and the data"),
        ("train_seconds", "s", False, "wall time of the training steps"),
        ("evaluate_seconds", "s", False, "wall time of evaluation"),
        ("snapshot_seconds", "s", False, "wall time of keeping snapshots of ΔW while training"),
        ("serve_seconds", "s", False, "wall time of measuring inference, merging, loading and swapping"),
        ("total_seconds", "s", False, "wall time of the run"),
    )
    | _measures(
        "serving",
        *_inference(),
        ("merge_error", "", False, "largest difference of a merged and an unmerged logit over the logits' deviation"),
        ("storage_bytes", "bytes", False, "files that one more task needs: the adapter, or all of ΔW"),
        ("adapter_load_seconds", "s", False, "time from disk onto the resident base"),
        ("adapter_swap_seconds", "s", False, "time to switch the resident base from one task to another"),
        ("resident_adapter_gib", "GiB", False, "memory for each further task on the resident base"),
        ("mixed_batch_seconds", "s", False, f"a batch of 8 prompts for {NUM_RESIDENT} adapters in one pass"),
        ("swapped_batch_seconds", "s", False, "the same batch adapter by adapter, with a swap before each"),
    )
    | _measures(
        "metrics",
        ("train_loss", "nats", False, "mean training loss of the last tenth of the steps"),
        ("base_valid_loss", "nats", False, "validation loss of the untouched base"),
        ("valid_loss", "nats", False, "validation loss after training; of regression the mean squared error, no nats"),
        ("valid_perplexity", "", False, "exp(valid_loss)"),
        ("valid_token_accuracy", "%", True, "tokens predicted right, validation"),
        ("valid_accuracy", "%", True, "examples classified right, validation"),
        ("valid_macro_f1", "%", True, "mean F1 of the classes that occur or are predicted, unweighted, validation"),
        ("valid_matthews", "", True, "Matthews correlation coefficient, validation"),
        ("valid_pearson", "", True, "Pearson correlation of predictions and scores, validation"),
        ("valid_spearman", "", True, "Spearman rank correlation of predictions and scores, validation"),
        ("valid_majority", "%", None, "accuracy of always answering the most frequent class, validation"),
        ("test_loss", "nats", False, "test loss after training"),
        ("test_perplexity", "", False, "exp(test_loss)"),
        ("test_token_accuracy", "%", True, "tokens predicted right, test"),
        ("test_accuracy", "%", True, "examples classified right, test"),
        ("test_macro_f1", "%", True, "mean F1 of the classes that occur or are predicted, unweighted, test"),
        ("test_matthews", "", True, "Matthews correlation coefficient, test"),
        ("test_pearson", "", True, "Pearson correlation of predictions and scores, test"),
        ("test_spearman", "", True, "Spearman rank correlation of predictions and scores, test"),
        ("test_majority", "%", None, "accuracy of always answering the most frequent class, test"),
        ("retain_loss_before", "nats", False, "loss of the untouched base on the retention set"),
        ("retain_loss_after", "nats", False, "loss on the retention set after training"),
        ("forgetting", "nats", False, "retain_loss_after - retain_loss_before"),
    )
    | _measures(  # R[i][j]: accuracy on task j, or share of its tokens predicted right, after training on i of T tasks
        "sequence",
        ("average_final", "%", True, "mean over the tasks j of R[T][j], validation"),
        ("backward_transfer", "%", True, "mean over j < T of R[T][j] - R[j][j] (Lopez-Paz and Ranzato 2017)"),
        ("forward_transfer", "%", True, "mean over j > 1 of R[j-1][j] - R[0][j], 0 being the untouched base"),
        ("sequence_forgetting", "%", False, "mean over j < T of max R[l][j] (1 <= l < T) - R[T][j] (Chaudhry 2018)"),
    )
)
"""Every number that a record can hold. Percentages are kept as shares in [0, 1] and printed times 100."""


@dataclass(kw_only=True)
class RunRecord:
    """One run's result. `measures` holds the numbers by their names in MEASURES; what was not measured is absent."""

    run_id: str
    spec: dict[str, Any]
    status: Status
    error: str | None = None
    """The last line of what went wrong; the traceback is in `log.txt`."""
    started: str = ""
    """UTC, ISO 8601."""
    finished: str | None = None
    attempts: int = 1
    resumed_from_step: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    """Package versions, git commit and dirty flag, hardware, model and data fingerprints."""
    measures: dict[str, float] = field(default_factory=dict)
    sequence: dict[str, Any] = field(default_factory=dict)
    """Of a run over several tasks: `tasks`, their names, and `matrices`, metric -> [after i tasks][on task j]."""
    provenance: dict[str, str] = field(default_factory=dict)
    """How a measure was made where that can differ: `peak_gib: VmHWM, reset per phase`."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what was learned, by path below the run's folder: the analyses' cache key."""
    steps_sha256: str | None = None
    """Of the log of its steps; None of a run that did not end, or was made before this was kept."""

    @property
    def updates(self) -> dict[str, str]:
        """Those of `files` that hold what was learned at the end, snapshots apart."""
        return {path: digest for path, digest in self.files.items() if path.startswith("updates/")}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of all that the run has left, by path below its folder."""
        return self.files | ({STEPS_FILE: self.steps_sha256} if self.steps_sha256 else {})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> RunRecord:
        """Raises InputError with every problem. A measure that is not finite, as of a run that diverged, is NaN."""
        measures = table.get("measures")
        known = measures if isinstance(measures, dict) else {}
        infinite = [key for key, value in known.items() if _is_infinite(value)]
        finite = {key: value for key, value in known.items() if key not in infinite}
        record = build(cls, table | {"measures": finite} if infinite else table)
        record.measures |= dict.fromkeys(infinite, math.nan)
        if problems := [*record._problems()]:
            raise InputError(problems)
        return record

    def _problems(self) -> Iterator[str]:
        """What the fields' types do not tell: names that would stand for something else, parts of other types."""
        for name in self.measures:
            if not name.isidentifier() or name in COLUMNS or name in self.spec or len(name) > MAX_NAME:
                yield f"measures.{clip(name)}: is no name of a measure"
        for path in self.files:
            try:
                check_name(path)
            except InputError as error:
                yield f"files: {error.problems[0]}"
        for part, hints in (("environment", _ENVIRONMENT), ("sequence", _SEQUENCE)):
            for key, value in getattr(self, part).items():
                try:
                    fit(hints.get(key, Any), value, f"{part}.{clip(key)}")
                except InputError as error:
                    yield from error.problems


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


COLUMNS = ("run_id", "label", "status", "error", "attempts", "finished", "selected")
"""Of tables of runs, beside the spec's keys and the measures."""
MAX_NAME = 100
_ENVIRONMENT: dict[str, Any] = {
    **dict.fromkeys(("packages", "git", "hardware", "data", "data_notes"), dict[str, Any]),
    **dict.fromkeys(("model_commit", "model_sha256"), str | None),
}
_SEQUENCE: dict[str, Any] = {"tasks": list[str], "matrices": dict[str, list[list[float]]]}


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run as a reader sees it now: the record joined with its worker's claim."""

    run_id: str
    status: Status
    spec: dict[str, Any]
    record: RunRecord | None = None
    claim: Claim | None = None
    error: str | None = None
    unread: bool = False
    """Whether what the run holds could not be read: nothing is known of it, and nothing may be written over."""


class Store:
    """The runs below one results folder."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def folder(self, run_id: str) -> Path:
        return self.root / "runs" / run_id

    def cancel_marker(self, run_id: str) -> Path:
        """A file that `lorabench cancel` makes: a worker neither begins the run nor takes it past its next step.

        Whoever asks for the run again, with `run` or `submit`, takes it away.
        """
        return self.folder(run_id) / CANCEL_MARKER

    def run_ids(self) -> list[str]:
        """Every run that has a folder, sorted."""
        runs = self.root / "runs"
        if not runs.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(runs) if entry.is_dir() and entry.name[0] != ".")

    def write_spec(self, spec: RunSpec) -> None:
        file = self.folder(spec.id) / "spec.json"
        if not file.exists():
            write_json(file, spec.to_json())

    def write(self, record: RunRecord) -> None:
        write_json(self.folder(record.run_id) / "record.json", record.to_json())

    def read(self, run_id: str) -> RunRecord | None:
        """The record; None if there is none yet. InputError if it is cut short or not this run's."""
        file = self.folder(run_id) / "record.json"
        table = read_json(file)
        if table is None:
            return None
        try:
            record = RunRecord.from_json(table)
        except InputError as error:
            raise InputError(error.problems, str(file)) from None
        if record.run_id != run_id:
            raise InputError(f"{file}: run_id = {clip(record.run_id)}: is the record of another run")
        return record

    def read_spec(self, run_id: str) -> RunSpec:
        """The spec. InputError if it is missing, invalid, or its hash is not the run's id."""
        file = self.folder(run_id) / "spec.json"
        table = self._spec_table(run_id)
        if table is None:
            raise InputError(f"{file}: no such file")
        try:
            return RunSpec.from_json(table)
        except InputError as error:
            raise InputError(error.problems, str(file)) from None

    def _spec_table(self, run_id: str) -> dict[str, Any] | None:
        """The spec as it is on disk, its hash checked but not decoded: quick, and older versions' specs pass."""
        file = self.folder(run_id) / "spec.json"
        table = read_json(file)
        if table is None:
            return None
        _check_spec(table, run_id, str(file))
        return table

    def state(self, run_id: str, spec: RunSpec | None = None) -> RunState:
        """How the run stands now; never raises for a damaged run, which is `corrupt` with its reason.

        One that merely cannot be read may be whole: it has `failed` for this look.
        """
        table: dict[str, Any] = {}
        claim = current_claim(self.folder(run_id))
        alive = claim is not None and claim.is_alive()
        try:
            table = self._spec_table(run_id) or (spec.to_json() if spec else {})
            record = self.read(run_id)
            if record and (not table or record.spec != table):
                _check_spec(record.spec, run_id, f"{self.folder(run_id) / 'record.json'}: its spec is not the run's")
        except InputError as error:
            unread = isinstance(error, Unreadable)
            dead = Status.FAILED if unread else Status.CORRUPT
            return RunState(
                run_id=run_id,
                status=Status.RUNNING if alive else dead,  # a live worker writes its record anew
                spec=table or (spec.to_json() if spec else {}),
                claim=claim,
                error=str(error).splitlines()[0],
                unread=unread,
            )
        if record is None:
            status = Status.RUNNING if alive else Status.INTERRUPTED if claim else Status.MISSING
            return RunState(run_id=run_id, status=status, spec=table, claim=claim)
        status = record.status
        if alive and status != Status.DONE:
            status = Status.RUNNING
        elif status == Status.RUNNING:
            status = Status.INTERRUPTED
        return RunState(
            run_id=run_id, status=status, spec=record.spec, record=record, claim=claim, error=record.error
        )  # fmt: skip

    def verified(self, state: RunState) -> RunState:
        """The same, but `corrupt` where what the run has left is not what its record tells of. Reads all files."""
        if state.record is None or state.status == Status.RUNNING:
            return state
        try:
            check_whole(self.folder(state.run_id), state.record.digests)
        except InputError as error:
            unread = isinstance(error, Unreadable)
            status = Status.FAILED if unread else Status.CORRUPT
            return replace(state, status=status, error=error.problems[0], unread=unread)
        return state

    def set_aside(self, run_id: str) -> Path:
        """Move a damaged run's folder to `runs/.corrupt/`: the run can be made again, and nothing is lost."""
        shelf = self.root / "runs" / ".corrupt"
        shelf.mkdir(exist_ok=True)
        number = next(n for n in itertools.count(1) if not (shelf / f"{run_id}.{n}").exists())
        return self.folder(run_id).rename(shelf / f"{run_id}.{number}")

    def states(self, specs: list[RunSpec] | None = None) -> Iterator[RunState]:
        """The states of these runs, or of every run in the store."""
        if specs is None:
            yield from (self.state(run_id) for run_id in self.run_ids())
        else:
            yield from (self.state(spec.id, spec) for spec in specs)


def _check_spec(table: dict[str, Any], run_id: str, where: str) -> None:
    """InputError if a table is not the spec that gives this id. Not decoded: quick, and older versions' specs pass."""
    try:
        fit(dict[str, Any], table.get("method"), "method")
        for key, hint in _SPEC.items():
            fit(hint, table.get(key), key)
        actual = spec_id(table)
    except (InputError, KeyError, TypeError, ValueError):
        raise InputError(f"{where}: is not the spec of a run") from None
    if actual != run_id:
        raise InputError(f"{where}: its content hashes to {clip(actual)}, but the folder is {run_id}: it was edited")


_SPEC: dict[str, Any] = {
    **dict.fromkeys(("steps", "seed"), int | None),
    "lr": float | None,
    "model": str | None,
    "task": dict[str, Any] | None,
    "tasks": list[dict[str, Any]] | None,
}
"""What is read of a spec that is not decoded."""


@contextlib.contextmanager
def disk_errors(file: Path) -> Iterator[None]:
    """What safetensors raises for a full disk becomes the OSError that it is."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(file)) from None


def file_digests(folder: Path, below: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder`, by path relative to `below`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(below)): file_digest(file) for file in files}


def file_digest(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_whole(folder: Path, digests: dict[str, str]) -> None:
    """As `check_listing` and `check_files` do: where a run's files are not those of its record."""
    check_listing(folder, digests)
    check_files(folder, digests)


def check_updates(folder: Path, record: RunRecord, run: str) -> None:
    """InputError, which begins with `run`, where what the run has learned is not what it was when it ended."""
    try:
        check_whole(folder, record.updates)
        if not record.updates:
            raise InputError("it has none")
    except InputError as error:
        raise InputError(f"{run}: its files are not those that its record describes: {error}") from None


def check_listing(folder: Path, names: Collection[str]) -> None:
    """InputError names the first link, or other file that is read, which lies beside these below a run's folder.

    What is read of a folder is what lies there. No file is opened, and no link followed.
    """
    for part in sorted({name.rpartition("/")[0] for name in names} - {""}):
        top = below(folder, part)
        for path in sorted(top.iterdir()) if top.is_dir() else ():
            if path.is_symlink():
                raise InputError(f"{path}: is a link")
            if path.suffix in READ_SUFFIXES and str(path.relative_to(folder)) not in names and path.is_file():
                raise InputError(f"{path}: is no file of the run's record")


def check_files(folder: Path, digests: dict[str, str]) -> None:
    """InputError names the first of these files below a folder that is gone, or is not what it was.

    Unreadable where that cannot be told.
    """
    for path, digest in digests.items():
        file = below(folder, path)
        try:
            if not file.is_file():
                raise InputError(f"{file}: {'is no file' if file.exists() else 'is gone'}")
            found = file_digest(file)
        except OSError as error:
            raise Unreadable(f"{file}: cannot be read: {error.strerror}") from None
        if found != digest:
            raise InputError(f"{file}: has changed since it was written")
