"""Language modelling on running text: documents joined, cut into blocks of seq_len tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorabench.datafile import Row
from lorabench.decode import InputError
from lorabench.task import Example, LanguageModeling
from lorabench.tokens import opening
from lorabench.values import texts


@dataclass(frozen=True, kw_only=True)
class Text(LanguageModeling):
    """Every token is predicted. Documents are separated by the tokenizer's end-of-sequence token.

    Where the tokenizer puts a beginning-of-sequence token before a text, each block begins with it.
    """

    text: str = "text"
    """Column that holds the text."""
    retain: str | None = None
    """A data set of the same kind on which forgetting is measured: its loss before and after."""

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        texts(rows, "task.text", self.text)
        return rows

    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> list[Example]:
        if not rows:  # which a tokenizer does not take
            return []
        encoded = tokenizer(texts(rows, "task.text", self.text), add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream = [token for ids in encoded for token in [*ids, *end]]
        start = opening(tokenizer)
        size = seq_len - len(start)
        if size < 1:
            raise InputError(f"seq_len = {seq_len}: leaves no room behind the tokens that the tokenizer puts in front")
        blocks = [[*start, *stream[i : i + size]] for i in range(0, len(stream) - size + 1, size)]
        if not blocks:
            raise InputError(f"seq_len = {seq_len}: is longer than the whole text ({len(stream)} tokens)")
        return [{"input_ids": block, "labels": block} for block in blocks]


EXAMPLE = Text(max_train=8, max_eval=4)
