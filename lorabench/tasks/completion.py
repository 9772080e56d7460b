"""Supervised fine-tuning: a prompt and its response, with the loss on the response only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lorabench.config.decode import InputError
from lorabench.config.quote import show
from lorabench.data.rows_file import Row
from lorabench.data.tokens import opening, prompt_and_response
from lorabench.spec.task import IGNORE, Example, Prompt
from lorabench.tasks._pairs import Pairs


@dataclass(frozen=True, kw_only=True)
class Completion(Pairs):
    """Templates are written with column names in braces. An end-of-sequence token ends the response.

    What the tokenizer puts before a text (a beginning-of-sequence token) stands before the prompt, once. A prompt that
    leaves too little room is cut behind it, from the left, a response that is too long from the right.
    """

    parts: ClassVar[tuple[str, str]] = ("prompt", "response")
    words: ClassVar[tuple[str, str]] = (
        "prompt instruction question query input problem source",
        "response output completion answer solution target label",
    )
    end: ClassVar[str] = "\n"

    prompt: str = "{prompt}"
    response: str = "{response}"
    retain: str | dict[str, Any] | None = None
    """Running text (column `text`) on which forgetting is measured, its loss before and after; or several sets: name ->
    running text, or a table with the fields of another task."""

    def prompts(self, rows: list[Row], tokenizer: Any, seq_len: int) -> list[Prompt]:
        """Each as its example begins, cut from the left to `seq_len` tokens; an answer's room comes on top."""
        start = opening(tokenizer)
        return [
            self._prompt(prompt, response, tokenizer, seq_len, start)
            for prompt, response in zip(*self.filled(rows), strict=True)
        ]

    def _prompt(self, prompt: str, response: str, tokenizer: Any, seq_len: int, start: list[int]) -> Prompt:
        before, answer = prompt_and_response(tokenizer, prompt, response)
        if start and before[: len(start)] == start:
            before = before[len(start) :]
        before = [*start, *before[max(0, len(before) - (seq_len - len(start))) :]]
        if not before:
            raise InputError(f"task.prompt = {show(self.prompt)}: is empty, and leaves nothing to write to")
        written = tokenizer.decode(answer)
        tail = written.removesuffix(response) if written.endswith(response) else ""
        return Prompt(ids=np.array(before, np.int32), text=prompt, reference=response, tail=tail)

    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> list[Example]:
        start = opening(tokenizer)
        if seq_len <= len(start):
            raise InputError(f"seq_len = {seq_len}: leaves no room behind the tokens that the tokenizer puts in front")
        pairs = zip(*self.filled(rows), strict=True)
        found = [self._example(prompt, response, tokenizer, seq_len, start) for prompt, response in pairs]
        for number, (row, example) in enumerate(zip(rows, found, strict=True), 1):
            if len(example["input_ids"]) < 2 or set(example["labels"][1:]) == {IGNORE}:
                raise self.nothing(1, row, number, "leaves nothing to predict")
        return found

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
