"""Language modelling on running text: documents joined, cut into blocks of seq_len tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.config.decode import InputError
from lorabench.data.columns import are_texts, called, columns, longest
from lorabench.data.rows_file import Row
from lorabench.data.tokens import opening
from lorabench.data.values import texts
from lorabench.spec.task import Example, LanguageModeling


@dataclass(frozen=True, kw_only=True)
class Text(LanguageModeling):
    """Every token is predicted. Documents are separated by the tokenizer's end-of-sequence token.

    Where the tokenizer puts a beginning-of-sequence token before a text, each block begins with it.
    """

    text: str = "text"
    """Column that holds the text."""
    retain: str | dict[str, Any] | None = None
    """Running text on which forgetting is measured, its loss before and after; or several sets: name -> running text,
    or a table with the fields of another task."""

    is_running_text: ClassVar[bool] = True

    @classmethod
    def guess(cls, rows: list[Row], model: str) -> dict[str, Any]:
        names = columns(rows, are_texts)
        found = called(names, "text content document body code sentence") or longest(rows, names)
        return {"text": found} if found else {}

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        texts(rows, "task.text", self.text)
        return rows

    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> Iterator[Example]:
        if not rows:
            return
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        start = opening(tokenizer)
        size = seq_len - len(start)
        if size < 1:
            raise InputError(f"seq_len = {seq_len}: leaves no room behind the tokens that the tokenizer puts in front")
        stream: list[int] = []
        any_block = False
        for ids in _encoded(texts(rows, "task.text", self.text), tokenizer):
            stream += [*ids, *end]
            whole = len(stream) // size * size
            for i in range(0, whole, size):
                block = [*start, *stream[i : i + size]]
                yield {"input_ids": block, "labels": block}
            any_block |= whole > 0
            del stream[:whole]
        if not any_block:
            raise InputError(f"seq_len = {seq_len}: is longer than the whole text ({len(stream)} tokens)")


def _encoded(documents: list[str], tokenizer: Any) -> Iterator[list[int]]:
    """Tokens of each, of one and then of more and more at a time: often only the first ones are wanted."""
    place, many = 0, 1
    while place < len(documents):
        yield from tokenizer(documents[place : place + many], add_special_tokens=False)["input_ids"]
        place, many = place + many, min(2 * many, 1000)


EXAMPLE = Text(max_train=8, max_eval=4)
