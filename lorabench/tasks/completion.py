"""Supervised fine-tuning: a prompt and its response, with the loss on the response only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import show
from lorabench.data.rows_file import Row
from lorabench.data.tokens import opening, prompt_and_response
from lorabench.data.values import Template
from lorabench.spec.task import IGNORE, Example, LanguageModeling


@dataclass(frozen=True, kw_only=True)
class Completion(LanguageModeling):
    """Templates are written with column names in braces. An end-of-sequence token ends the response.

    What the tokenizer puts before a text (a beginning-of-sequence token) stands before the prompt, once. A prompt that
    leaves too little room is cut behind it, from the left, a response that is too long from the right.
    """

    prompt: str = "{prompt}"
    response: str = "{response}"
    columns: str | None = None
    """Column names of a csv or tsv without a header line, separated by commas."""
    retain: str | None = None
    """Running text (column `text`) on which forgetting is measured: its loss before and after."""

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        self._filled(rows)
        return rows

    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> list[Example]:
        start = opening(tokenizer)
        if seq_len <= len(start):
            raise InputError(f"seq_len = {seq_len}: leaves no room behind the tokens that the tokenizer puts in front")
        pairs = zip(*self._filled(rows), strict=True)
        found = [self._example(prompt, response, tokenizer, seq_len, start) for prompt, response in pairs]
        for number, example in enumerate(found, 1):
            if len(example["input_ids"]) < 2 or set(example["labels"][1:]) == {IGNORE}:
                raise InputError(f"task.response = {show(self.response)}: row {number} leaves nothing to predict")
        return found

    def _filled(self, rows: list[Row]) -> tuple[list[str], list[str]]:
        """Prompts and responses. InputError with what is wrong of either."""
        found, problems = [], []
        for key in ("prompt", "response"):
            try:
                found.append(Template(f"task.{key}", getattr(self, key)).fill(rows))
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)
        return found[0], found[1]

    def _example(self, prompt: str, response: str, tokenizer: Any, seq_len: int, start: list[int]) -> Example:
        before, answer = prompt_and_response(tokenizer, prompt, response)
        if start and before[: len(start)] == start:  # a rendered chat template has it
            before = before[len(start) :]
        end = tokenizer.eos_token_id
        if end is not None and answer[-1:] != [end]:
            answer = [*answer, end]
        answer = answer[: seq_len - max(1, len(start))]
        room = seq_len - len(start) - len(answer)
        before = [*start, *before[max(0, len(before) - room) :]]
        return {"input_ids": before + answer, "labels": [IGNORE] * len(before) + answer}


EXAMPLE = Completion(prompt="{source}\n", response="{text}", max_train=8, max_eval=4)
