"""Examples -> batches: collation, and a data order that depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorabench.config.decode import InputError
from lorabench.config.quote import show
from lorabench.data.dataset import SPLITS, Data, read_data
from lorabench.data.rows_file import Row
from lorabench.spec.run_spec import in_stage
from lorabench.spec.task import IGNORE, Example, Prompt, Task

if TYPE_CHECKING:
    from lorabench.spec.run_spec import RunSpec

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Splits of one task (`train`, `validation`, `test`, and those of `Task.others`), tokenized or made ready for the
    model, and where they come from."""

    task: Task
    splits: dict[str, list[Example]]
    model_options: dict[str, Any]
    padding: int
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)
    """Of the splits on which a model is to write."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def reader(task: Task, split: str) -> Task:
    """What reads and scores a split: the task itself, or another."""
    return task.others.get(split) or task.beside.get(split, task)


def prepare(spec: RunSpec) -> Examples:
    """Read, tokenize and cut down the data of a run; the same object for all runs of a process that share it."""
    return _prepare(spec.model, spec.revision, spec.task, spec.seq_len, spec.objective.writes)


def prepare_stages(spec: RunSpec) -> list[Examples]:
    """The data of each of the run's tasks, in order. InputError where they cannot share one model."""
    stages = []
    for number, task in enumerate(spec.stages, 1):
        try:
            stages.append(_prepare(spec.model, spec.revision, task, spec.seq_len, spec.objective.writes))
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
def _prepare(model: str, revision: str | None, task: Task, seq_len: int, writes: bool) -> Examples:
    tokenizer = task.reads_with(model, revision)
    usable = read_usable(task)
    splits = tokenized(task, usable, tokenizer, seq_len)
    return Examples(
        task=task,
        splits={name: [_compact(example) for example in examples] for name, examples in splits.items()},
        model_options=usable.options,
        padding=getattr(tokenizer, "pad_token_id", 0),
        prompts=_prompts(task, usable, tokenizer, seq_len, writes),
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
    held_out: tuple[str, ...] = ()
    """The splits that are of the same files as `train`."""


def read_usable(task: Task) -> Usable:
    """Read a task's data and check every row. InputError with the problems of all splits, each with its split."""
    problems: list[str] = []
    sources: dict[str, Data] = {}
    for role in task.sources():
        try:
            sources[role] = _read(role, reader(task, role))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    main, rows = sources["task"].splits, {}
    options: dict[str, Any] = {}
    held_out = sources["task"].held_out
    for split in SPLITS:
        if problems and split in held_out:  # of a file of which it is told what is wrong
            continue
        with _collected(split, problems):
            rows[split] = task.usable(split, main[split], options)
            options = task.model_options(rows[split]) if split == "train" else options
    for split, other in task.beside.items():
        with _collected(split, problems):
            rows[split] = other.usable("train", sources[split].splits["train"], options)
    for split, other in task.others.items():
        own, its_split = _evaluated(split, sources[split])
        with _collected(split, problems):
            rows[split] = other.usable(its_split, own, options)
    if problems:
        raise InputError(problems)
    notes = {role: [data.note] if data.note and not _is_whole(role, data) else [] for role, data in sources.items()}
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
        held_out=held_out,
    )


def tokenized(
    task: Task, usable: Usable, tokenizer: Any, seq_len: int, most: int | None = None
) -> dict[str, list[Example]]:
    """The first examples of every split, as many as the task asks for; of its first rows alone where it holds more
    than `most` characters.

    InputError with the problems of all splits, each with its split.
    """
    splits: dict[str, list[Example]] = {}
    problems: list[str] = []
    for split, rows in usable.rows.items():
        if problems and split in usable.held_out:
            continue
        reads = reader(task, split)
        with _collected(split, problems):
            given = _first(reads, rows, most), tokenizer, seq_len, usable.options
            if split == "train" or split in task.beside:
                splits[split] = list(islice(reads.examples(*given), task.max_train)) if rows else []
            else:
                splits[split] = list(chain.from_iterable(islice(reads.scored(*given), reads.max_eval))) if rows else []
    needed = ("train", "validation", *task.others, *task.beside)
    problems += [f"{_where(split)}: gives no examples" for split in needed if splits.get(split) == []]
    if problems:
        raise InputError(problems)
    return splits


def _prompts(task: Task, usable: Usable, tokenizer: Any, seq_len: int, writes: bool) -> dict[str, list[Prompt]]:
    """What there is to write to: of the task's own splits those that it asks for, and where training `writes` that one
    too; of others all."""
    own = task.generation.measured_splits if task.generation else ()
    readers = dict.fromkeys(own, task) | {split: other for split, other in task.others.items() if other.generation}
    found = {
        split: reads.prompts(usable.rows[split][: reads.max_eval], tokenizer, seq_len)
        for split, reads in readers.items()
    }
    return found | (
        {"train": task.prompts(usable.rows["train"][: task.max_train], tokenizer, seq_len)} if writes else {}
    )


def _first(task: Task, rows: list[Row], most: int | None) -> list[Row]:
    if most is None:
        return rows
    size = 0
    for place, row in enumerate(rows, 1):
        size += task.size(row)
        if size > most:
            return rows[:place]
    return rows


@contextmanager
def _collected(split: str, problems: list[str]) -> Iterator[None]:
    """An InputError goes to the problems, and says of what split they are."""
    try:
        yield
    except InputError as error:
        problems += [f"{_where(split)}: {problem}" for problem in error.problems]


def _where(split: str) -> str:
    """`test split`, `task.retain`, `task.tests.boolq`."""
    kind, _, name = split.partition("_")
    if kind == "prior":
        return "task.prior"
    if kind == "retain":
        return f"task.retain.{name}" if name else "task.retain"
    return f"task.tests.{name}" if name else f"{split} split"


def _compact(example: Example) -> Example:
    """Token lists as arrays: a tenth of the memory, and quick to copy into a batch."""
    return {key: np.array(v, dtype=np.int32) if isinstance(v, list) else v for key, v in example.items()}


def _read(role: str, task: Task) -> Data:
    """The data of a task. `role` is what it is of the run's: `task`, or a key of `Task.others`."""
    columns, text = getattr(task, "columns", None), getattr(task, "text", "text")
    try:
        data = read_data(task.data, task.data_revision, columns, task.stratified_by(), task.is_running_text, text)
        if role == "task" and not data.splits["train"]:
            where = "a single split can be one of task.tests or task.retain; here it must be all of the data set"
            raise InputError(f"task.data = {show(task.data)}: {where}")
        return data
    except InputError as error:
        where = "task.data" if role == "task" else _where(role)
        problems = [problem.replace("task.data", where, 1) for problem in error.problems]
        raise InputError(problems) from error


def _is_whole(role: str, data: Data) -> bool:
    """Whether all rows of it are evaluated, however they were cut."""
    return role.startswith("test_") and {"validation", "test"} <= set(data.held_out)


def _evaluated(split: str, data: Data) -> tuple[list[Row], str]:
    """The rows of a set that is evaluated alone, and what split they are: of retention validation, of tests the test
    split, else validation; all rows of what has no splits."""
    if split.startswith("retain"):
        return data.splits["validation"], "validation"
    if data.splits["test"] and "test" not in data.held_out:
        return data.splits["test"], "test"
    if "validation" not in data.held_out:
        return data.splits["validation"], "validation"
    return [row for rows in data.splits.values() for row in rows], "validation"


def collate(examples: list[Example], padding: int, device: torch.device) -> Batch:
    """Tensors (n, longest) on `device`, padded on the right; no attention mask where nothing is padded. Of images
    (n, channels, height, width), as the model sees them."""
    if PIXELS in examples[0]:
        found = {PIXELS: np.stack([example[PIXELS].seen() for example in examples])} | {
            key: np.stack([np.asarray(example[key]) for example in examples])
            for key, first in examples[0].items()
            if isinstance(first, int | float | np.ndarray)
        }
        return {
            key: torch.from_numpy(each if each.dtype.kind == "i" else each.astype(np.float32, copy=False)).to(device)
            for key, each in found.items()
        }
    lengths = [len(example["input_ids"]) for example in examples]
    longest = max(lengths)
    per_token = not isinstance(examples[0]["labels"], (int, float))
    arrays = {"input_ids": np.full((len(examples), longest), padding, np.int64)}
    if per_token:
        longest_labels = max(len(example["labels"]) for example in examples)  # the input's, but of a decoder's own
        arrays["labels"] = np.full((len(examples), longest_labels), IGNORE, np.int64)
    else:
        kind = np.int64 if isinstance(examples[0]["labels"], int) else np.float32
        arrays["labels"] = np.array([example["labels"] for example in examples], kind)
    if any("token_type_ids" in example for example in examples):
        arrays["token_type_ids"] = np.zeros((len(examples), longest), np.int64)
    arrays |= {key: np.array([example[key] for example in examples]) for key in _numbers(examples[0]) - arrays.keys()}
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        arrays["input_ids"][row, :length] = example["input_ids"]
        if per_token:
            arrays["labels"][row, : len(example["labels"])] = example["labels"]
        if "token_type_ids" in example:
            arrays["token_type_ids"][row, :length] = example["token_type_ids"]
    if min(lengths) < longest:
        arrays["attention_mask"] = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    return {key: torch.from_numpy(array).to(device, non_blocking=True) for key, array in arrays.items()}


PIXELS = "pixel_values"
"""The key of an example that is an image, and of a batch of them."""
IMAGE_TOKENS = 32
"""Tokens of text for which an image counts where only so many of a split are looked at."""
LENGTHS = "lengths"
"""The key of a batch that is one row of examples laid end to end: the tokens of each, (n,), on the CPU wherever the
rest is, for to read them off a GPU would wait for it."""


def end_to_end(batch: Batch) -> Batch:
    """The examples of a batch of language modelling without its padding, in one row (1, all tokens), positions
    beginning anew with each; none predicts the next one's first token."""
    ids = batch["input_ids"]
    is_token = batch.get("attention_mask", torch.ones_like(ids)).bool()
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    labels = batch["labels"].masked_fill(positions == 0, IGNORE)
    row = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {key: each[is_token][None] for key, each in row.items()} | {LENGTHS: is_token.sum(1).cpu()}


def moved(batch: Batch, device: torch.device) -> Batch:
    """To a device; what tells the host how a batch is laid out stays."""
    return {key: each if key == LENGTHS else each.to(device, non_blocking=True) for key, each in batch.items()}


def _numbers(example: Example) -> set[str]:
    return {key for key, value in example.items() if isinstance(value, int)}


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


def few_batches(examples: Examples, split: str, tokens: int, device: torch.device) -> list[Batch]:
    """The first examples of a split, of about so many tokens in all and one at least; those of the same lengths
    together, so that nothing is padded. An image counts as IMAGE_TOKENS."""
    groups: dict[tuple[int, ...], list[Example]] = {}
    for row in examples.splits[split]:
        if tokens <= 0:
            break
        tokens -= IMAGE_TOKENS if PIXELS in row else len(row["input_ids"])
        lengths = tuple(len(row[key]) if np.ndim(row[key]) else 0 for key in ("input_ids", "labels") if key in row)
        groups.setdefault(lengths, []).append(row)
    return [collate(rows, examples.padding, device) for rows in groups.values()]
