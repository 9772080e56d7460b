"""Supervised fine-tuning: a prompt and its response, with the loss on the response only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorabench.decode import InputError
from lorabench.task import IGNORE, Example, LanguageModeling


@dataclass(frozen=True, kw_only=True)
class Completion(LanguageModeling):
    """Templates are written with column names in braces. An end-of-sequence token ends the response.

    A prompt that leaves too little room is cut from the left, a response that is too long from the right.
    """

    prompt: str = "{prompt}"
    response: str = "{response}"
    columns: str | None = None
    """Column names of a csv or tsv without a header line, separated by commas."""
    retain: str | None = None
    """Running text (column `text`) on which forgetting is measured: its loss before and after."""

    def examples(
        self, rows: list[dict[str, Any]], tokenizer: Any, seq_len: int, options: dict[str, Any]
    ) -> list[Example]:
        return [self._example(row, tokenizer, seq_len) for row in rows]

    def _example(self, row: dict[str, Any], tokenizer: Any, seq_len: int) -> Example:
        prompt = tokenizer(self._fill("prompt", row), add_special_tokens=True)["input_ids"]
        response = tokenizer(self._fill("response", row), add_special_tokens=False)["input_ids"]
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        response = [*response, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else response
        response = response[: seq_len - 1]
        prompt = prompt[-(seq_len - len(response)) :]
        return {"input_ids": prompt + response, "labels": [IGNORE] * len(prompt) + response}

    def _fill(self, key: str, row: dict[str, Any]) -> str:
        template = getattr(self, key)
        try:
            return template.format_map(row)
        except (KeyError, ValueError, IndexError) as error:
            choices = ", ".join(row)
            raise InputError(f'task.{key} = "{template}": no such column: {error}. Choices: {choices}') from None


EXAMPLE = Completion(prompt="{source}\n", response="{text}", max_train=8, max_eval=4)
