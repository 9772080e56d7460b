"""What is wrong with the data of runs, found before anything starts."""

from __future__ import annotations

from functools import cache, lru_cache

from lorabench.decode import InputError
from lorabench.examples import Usable, read_usable, tokenized
from lorabench.model import load_tokenizer
from lorabench.spec import RunSpec, in_stage
from lorabench.task import Task

CHECKED_CHARACTERS = 2_000_000
"""Of each split as much is tokenized; what shows without a tokenizer is checked in all rows."""


def data_problems(spec: RunSpec) -> list[str]:
    """Why the run's tasks cannot use their data, as far as it shows without a tokenizer."""
    return [
        in_stage(problem, number, spec.tasks)
        for number, task in enumerate(spec.stages, 1)
        for problem in _data_problems(task)
    ]


def token_problems(spec: RunSpec) -> list[str]:
    """Why no examples could be made of the run's data."""
    return [
        in_stage(problem, number, spec.tasks)
        for number, task in enumerate(spec.stages, 1)
        for problem in _token_problems(spec.model, spec.revision, task, spec.seq_len)
    ]


@cache
def _data_problems(task: Task) -> tuple[str, ...]:
    usable = usable_of(task)
    return tuple(usable.problems) if isinstance(usable, InputError) else ()


@cache
def _token_problems(model: str, revision: str | None, task: Task, seq_len: int) -> tuple[str, ...]:
    usable = usable_of(task)
    try:
        if isinstance(usable, InputError):
            raise usable
        tokenized(task, usable, load_tokenizer(model, revision), seq_len, CHECKED_CHARACTERS)
    except InputError as error:
        return tuple(error.problems)
    return ()


@lru_cache(maxsize=2)
def usable_of(task: Task) -> Usable | InputError:
    try:
        return read_usable(task)
    except InputError as error:
        return error
