"""What is wrong with the data of runs, found before anything starts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.data.fingerprints import named
from lorabench.data.rows_file import place
from lorabench.models.base_model import sequence_end
from lorabench.spec.run_spec import RunSpec, in_stage
from lorabench.spec.task import Example, Task
from lorabench.training.examples import Usable, read_usable, reader, tokenized

CHECKED_CHARACTERS = 200_000
"""Of each split as much is tokenized; what shows without a tokenizer is checked in all rows."""


def data_problems(spec: RunSpec) -> list[str]:
    """Why the run's tasks cannot use their data, as far as it shows without a tokenizer."""
    return [
        in_stage(problem, number, spec.tasks)
        for number, task in enumerate(spec.stages, 1)
        for problem in (*_looked_up(task).problems, *(_unanswered(task) if spec.objective.writes else ()))
    ]


def token_problems(spec: RunSpec) -> list[str]:
    """Why no examples could be made of the run's data."""
    return [
        in_stage(problem, number, spec.tasks)
        for number, task in enumerate(spec.stages, 1)
        for problem in _tokens(spec.model, spec.revision, task, spec.seq_len).problems
    ]


def data_notes(spec: RunSpec) -> list[str]:
    """How the run's data were cut, and what was left out of them."""
    return [
        f"{task.sources()[role]}: {text}"
        for task in spec.stages
        for role, text in _looked_up(task).notes.items()
        if text and role in task.sources()
    ]


def data_now(spec: RunSpec) -> dict[str, str]:
    """What the run's tasks call their data -> its fingerprint as it is now."""
    stages = [(f" {number}" if spec.tasks[1:] else "", task) for number, task in enumerate(spec.stages, 1)]
    found = {role + number: value for number, task in stages for role, value in _looked_up(task).fingerprints.items()}
    return named(spec.stages, found)


@dataclass(frozen=True, kw_only=True)
class _Looked:
    problems: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)


@cache
def _looked_up(task: Task) -> _Looked:
    """What is said of a task's data without its rows."""
    usable = usable_of(task)
    if isinstance(usable, InputError):
        return _Looked(problems=tuple(usable.problems))
    return _Looked(notes=usable.notes, fingerprints=usable.fingerprints)


@cache
def _unanswered(task: Task) -> tuple[str, ...]:
    """Why what a model writes to the training prompts could not be told right from wrong."""
    usable = usable_of(task)
    try:
        if not isinstance(usable, InputError):
            task.check_answers(usable.rows["train"])
    except InputError as error:
        return tuple(f"train split: {problem}" for problem in error.problems)
    return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Lengths:
    """How long the examples of a split are: of some, the tokens of each of the task's `sequences`; and how many there
    are, as far as these tell."""

    count: int
    sample: tuple[tuple[int, ...], ...]

    @cached_property
    def longest(self) -> tuple[int, ...]:
        """Of each sequence."""
        return tuple(map(max, zip(*self.sample, strict=True)))

    @cached_property
    def differ(self) -> bool:
        return len({*self.sample}) > 1

    @cache  # noqa: B019  # of a few splits, which are kept anyway
    def padded(self, size: int, shuffled: bool = False) -> tuple[float, ...]:
        """The mean length of batches of that size, each as long as its longest example; of each sequence."""
        rows = list(self.sample)
        if shuffled:
            random.Random(0).shuffle(rows)
        chunks = [rows[i : i + size] for i in range(0, max(1, len(rows) - size + 1), size)]
        longest = [tuple(map(max, zip(*chunk, strict=True))) for chunk in chunks]
        return tuple(sum(each) / len(each) for each in zip(*longest, strict=True))


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What is known of a task's examples without making all of them."""

    problems: tuple[str, ...] = ()
    splits: dict[str, Lengths] = field(default_factory=dict)
    characters: int = 0
    """Of all rows that a run reads."""


def tokens_of(spec: RunSpec) -> list[Tokens]:
    """Of each of the run's tasks."""
    return [_tokens(spec.model, spec.revision, task, spec.seq_len) for task in spec.stages]


@cache
def _tokens(model: str, revision: str | None, task: Task, seq_len: int) -> Tokens:
    usable = usable_of(task)
    try:
        if isinstance(usable, InputError):
            raise usable
        tokenizer = task.checks_with(model, revision)
        splits = tokenized(task, usable, tokenizer, seq_len, CHECKED_CHARACTERS)
        if task.auto_class.endswith("ForSequenceClassification"):
            _check_ends(model, sequence_end(model, revision), tokenizer, splits, usable)
    except InputError as error:
        return Tokens(problems=tuple(error.problems))
    sizes = {split: [*map(reader(task, split).size, rows)] for split, rows in usable.rows.items()}
    found = {split: _lengths(task, split, examples, sizes[split]) for split, examples in splits.items() if examples}
    return Tokens(splits=found, characters=sum(map(sum, sizes.values())))


def _lengths(task: Task, split: str, examples: list[Example], sizes: list[int]) -> Lengths:
    """Of a split of which as many rows were tokenized as hold CHECKED_CHARACTERS."""
    reads = reader(task, split)
    most = task.max_train if split == "train" else reads.max_eval
    share = max(1.0, sum(sizes) / CHECKED_CHARACTERS)
    count = len(examples) if most is not None and len(examples) >= most else round(share * len(examples))
    sample = [reads.lengths(example) for example in examples[:: max(1, len(examples) // 512)]]
    return Lengths(count=count if most is None else max(len(examples), min(count, most)), sample=tuple(sample))


def _check_ends(model: str, end: int | None, tokenizer: Any, splits: dict[str, list[Example]], usable: Usable) -> None:
    """InputError where an encoder-decoder, whose head reads its state at the last `end`, could not find that.

    transformers wants as many of them in each row of a batch, padding included.
    """
    if end is None:
        return
    why = f'model = "{show_path(model)}": an encoder-decoder classifies by the end-of-sequence token, number {end}'
    if tokenizer.pad_token_id == end:
        raise InputError(f"{why}, and its tokenizer pads with that")
    usual = None
    for split, examples in splits.items():
        for number, (row, example) in enumerate(zip(usable.rows[split], examples, strict=False), 1):
            found = example["input_ids"].count(end)
            usual = found if usual is None else usual
            if not found:
                where = f"{split} split: {place(row, number)}"
                raise InputError(f"{why}, and its tokenizer puts none at the end of a text ({where})")
            if found != usual:
                where = f"{split} split: {place(row, number)}"
                raise InputError(f"{why}: {where} has {found} of them, rows before it {usual}")


@lru_cache(maxsize=2)
def usable_of(task: Task) -> Usable | InputError:
    try:
        return read_usable(task)
    except InputError as error:
        return error
