"""Examples -> batches: collation, and a data order that depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorabench.config.decode import InputError
from lorabench.data.dataset import SPLITS, Data, read_data
from lorabench.data.rows_file import Row
from lorabench.models.base_model import load_tokenizer
from lorabench.spec.run_spec import in_stage
from lorabench.spec.task import IGNORE, Example, Task
from lorabench.tasks.text import Text

if TYPE_CHECKING:
    from lorabench.spec.run_spec import RunSpec

Batch = dict[str, torch.Tensor]
RETAIN = Text()
"""How a retention set is read and scored."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Tokenized splits of one task (`train`, `validation`, `test`, `retain`) and where they come from."""

    task: Task
    splits: dict[str, list[Example]]
    model_options: dict[str, Any]
    padding: int
    fingerprints: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def prepare(spec: RunSpec) -> Examples:
    """Read, tokenize and cut down the data of a run; the same object for all runs of a process that share it."""
    return _prepare(spec.model, spec.revision, spec.task, spec.seq_len)


def prepare_stages(spec: RunSpec) -> list[Examples]:
    """The data of each of the run's tasks, in order. InputError where they cannot share one model."""
    stages = []
    for number, task in enumerate(spec.stages, 1):
        try:
            stages.append(_prepare(spec.model, spec.revision, task, spec.seq_len))
        except InputError as error:
            raise InputError([in_stage(problem, number, spec.tasks) for problem in error.problems]) from error
    shared_options([examples.model_options for examples in stages])
    return stages


def shared_options(options: list[dict[str, Any]]) -> dict[str, Any]:
    """What a model that does all tasks of a sequence is loaded with. InputError where their heads differ in size."""
    sizes = [each.get("num_labels") for each in options]
    if len(set(sizes)) > 1:
        counts = ", ".join(map(str, sizes))
        raise InputError(f"tasks: one head serves them all, so they need the same number of classes, and have {counts}")
    return options[0]


@lru_cache(maxsize=16)
def _prepare(model: str, revision: str | None, task: Task, seq_len: int) -> Examples:
    tokenizer = load_tokenizer(model, revision)
    usable = read_usable(task)
    splits = tokenized(task, usable, tokenizer, seq_len)
    return Examples(
        task=task,
        splits={name: [_compact(example) for example in examples] for name, examples in splits.items()},
        model_options=usable.options,
        padding=tokenizer.pad_token_id,
        fingerprints=usable.fingerprints,
        notes=usable.notes,
    )


@dataclass(frozen=True, kw_only=True)
class Usable:
    """The rows of a task that count, by split (`retain` too), and what they ask of the model."""

    rows: dict[str, list[Row]]
    options: dict[str, Any]
    fingerprints: dict[str, str]
    notes: dict[str, str]


def read_usable(task: Task) -> Usable:
    """Read a task's data and check every row. InputError with the problems of all splits, each with its split."""
    sources = {role: _read(role, source, task) for role, source in task.sources().items()}
    main, rows, problems = sources["task"].splits, {}, []
    options: dict[str, Any] = {}
    for split in SPLITS:
        try:
            with _named(split):
                rows[split] = task.usable(split, main[split], options)
                options = task.model_options(rows[split]) if split == "train" else options
        except InputError as error:
            problems += error.problems
    if "retain" in sources:  # running text whatever the task is, read as `text` reads it
        rows["retain"] = sources["retain"].splits["validation"]
        try:
            with _named("retain"):
                RETAIN.usable("validation", rows["retain"], {})
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    notes = {role: [data.note] if data.note else [] for role, data in sources.items()}
    for split in SPLITS:
        left_out = len(main[split]) - len(rows[split])
        notes["task"] += (
            [f"{left_out} of {len(main[split])} rows of {split} left out, without a label"] if left_out else []
        )
    return Usable(
        rows=rows,
        options=options,
        fingerprints={role: data.fingerprint for role, data in sources.items()},
        notes={role: "; ".join(texts) for role, texts in notes.items() if texts},
    )


def tokenized(
    task: Task, usable: Usable, tokenizer: Any, seq_len: int, most: int | None = None
) -> dict[str, list[Example]]:
    """The first examples of every split, as many as the task asks for; of its first rows alone where it holds more
    than `most` characters.

    InputError with the problems of all splits, each with its split.
    """
    splits, problems = {}, []
    for split, rows in usable.rows.items():
        reader = RETAIN if split == "retain" else task
        limit = task.max_train if split == "train" else task.max_eval
        try:
            with _named(split):
                found = reader.examples(_first(rows, most), tokenizer, seq_len, usable.options) if rows else []
                splits[split] = list(islice(found, limit))
        except InputError as error:
            problems += error.problems
    for split in ("train", "validation"):
        if splits.get(split) == []:
            problems.append(f"{split} split: gives no examples")
    if problems:
        raise InputError(problems)
    return splits


def _first(rows: list[Row], most: int | None) -> list[Row]:
    if most is None:
        return rows
    size = 0
    for place, row in enumerate(rows, 1):
        size += sum(len(value) for value in row.values() if isinstance(value, str))
        if size > most:
            return rows[:place]
    return rows


@contextmanager
def _named(split: str) -> Iterator[None]:
    """Says in InputErrors of what split they are."""
    try:
        yield
    except InputError as error:
        where = "task.retain" if split == "retain" else f"{split} split"
        raise InputError([f"{where}: {problem}" for problem in error.problems]) from error


def _compact(example: Example) -> Example:
    """Token lists as arrays: a tenth of the memory, and quick to copy into a batch."""
    return {key: np.array(v, dtype=np.int32) if isinstance(v, list) else v for key, v in example.items()}


def _read(role: str, source: str, task: Task) -> Data:
    if role == "task":
        label = task.stratified_by()
        return read_data(source, task.data_revision, getattr(task, "columns", None), label)
    try:
        return read_data(source)
    except InputError as error:
        problems = [problem.replace("task.data", f"task.{role}", 1) for problem in error.problems]
        raise InputError(problems) from error


def collate(examples: list[Example], padding: int, device: torch.device) -> Batch:
    """Tensors (n, longest) on `device`, padded on the right; no attention mask where nothing is padded."""
    lengths = [len(example["input_ids"]) for example in examples]
    longest = max(lengths)
    per_token = not isinstance(examples[0]["labels"], (int, float))
    arrays = {"input_ids": np.full((len(examples), longest), padding, np.int64)}
    if per_token:
        arrays["labels"] = np.full((len(examples), longest), IGNORE, np.int64)
    else:
        kind = np.int64 if isinstance(examples[0]["labels"], int) else np.float32
        arrays["labels"] = np.array([example["labels"] for example in examples], kind)
    if any("token_type_ids" in example for example in examples):
        arrays["token_type_ids"] = np.zeros((len(examples), longest), np.int64)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        arrays["input_ids"][row, :length] = example["input_ids"]
        if per_token:
            arrays["labels"][row, :length] = example["labels"]
        if "token_type_ids" in example:
            arrays["token_type_ids"][row, :length] = example["token_type_ids"]
    if min(lengths) < longest:
        arrays["attention_mask"] = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    return {key: torch.from_numpy(array).to(device, non_blocking=True) for key, array in arrays.items()}


class Order:
    """Which examples a step of a stage sees: each epoch is shuffled by a generator of (seed, stage, epoch) alone."""

    def __init__(self, size: int, batch_size: int, seed: int, stage: int = 0):
        self.size, self.batch_size, self.first_seed = size, batch_size, seed * 1_000_003 + stage * 10_007
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> list[int]:
        """The examples of step 0, 1, …; a batch may reach into the next epoch."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._at(*divmod(position, self.size)) for position in positions]

    def _at(self, epoch: int, offset: int) -> int:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.first_seed + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.size, generator=generator).numpy()
        return int(self._permutation[offset])
