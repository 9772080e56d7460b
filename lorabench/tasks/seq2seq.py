"""Sequence to sequence: a source and its target, for models with an encoder and a decoder of their own (T5, BART)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge

from lorabench.config.decode import InputError
from lorabench.data.rows_file import Row
from lorabench.spec.task import Example, Prompt, Sets, Task
from lorabench.tasks._pairs import Pairs

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 16
"""Rows that the tokenizer is given together: of those behind the ones that a run asks for nothing is read."""


@dataclass(frozen=True, kw_only=True)
class Seq2seq(Pairs):
    """Templates are written with column names in braces; what a model wants before a text ("summarize: ") is theirs.

    The encoder is given the source as the tokenizer has a text, its special tokens included, of which at most seq_len
    tokens are kept. The decoder learns the target and the end-of-sequence token behind it; of a target that is too long
    the end is cut off, that token with it. What the decoder is given is made of that as the model itself makes it.
    """

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    sequences: ClassVar[tuple[str, ...]] = ("input_ids", "labels")
    parts: ClassVar[tuple[str, str]] = ("source", "target")
    words: ClassVar[tuple[str, str]] = (
        "source article document dialogue text input question prompt",
        "target summary highlights translation output answer response",
    )

    source: str = "{source}"
    target: str = "{target}"
    max_target: Annotated[int, Ge(1)] | None = None
    """At most this many tokens of a target, which is of a length of its own (None: `seq_len`, as of the source)."""
    retain: str | dict[str, Any] | None = None
    """Another set of pairs, read by the same templates, on which forgetting is measured, its loss before and after; or
    several sets: name -> such a set, or a table with the fields of another task."""

    def longest(self, seq_len: int) -> tuple[int, ...]:
        return seq_len, self.max_target or seq_len

    def retaining(self, data: str) -> Task:
        return dataclasses.replace(self, data=data, data_revision=None, tests=Sets(), retain=None, generate=None)

    def prompts(self, rows: list[Row], tokenizer: Any, seq_len: int) -> list[Prompt]:
        sources, targets = self.filled(rows)
        return [
            Prompt(ids=np.array(ids, np.int32), text=source, reference=target)
            for ids, source, target in zip(self._read(rows, sources, tokenizer, seq_len), sources, targets, strict=True)
        ]

    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> Iterator[Example]:
        (sources, targets), end = self.filled(rows), tokenizer.eos_token_id
        for first in range(0, len(rows), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            read = self._read(rows[part], sources[part], tokenizer, seq_len, first)
            written = tokenizer(text_target=targets[part])["input_ids"]
            for number, (row, ids, labels) in enumerate(zip(rows[part], read, written, strict=True), first + 1):
                if end is not None and labels[-1:] != [end]:
                    labels = [*labels, end]
                if not labels:
                    raise self.nothing(1, row, number, "leaves nothing to predict")
                yield {"input_ids": ids, "labels": labels[: self.max_target or seq_len]}

    def _read(
        self, rows: list[Row], sources: list[str], tokenizer: Any, seq_len: int, before: int = 0
    ) -> list[list[int]]:
        """The encoder's tokens. InputError where there is no room for any, or there are none; `before` these rows are
        so many others."""
        if seq_len <= tokenizer.num_special_tokens_to_add():
            raise InputError(f"seq_len = {seq_len}: leaves no room beside the tokens that the tokenizer puts around")
        found: list[list[int]] = tokenizer(sources, truncation=True, max_length=seq_len)["input_ids"] if rows else []
        if [] in found:
            place = found.index([])
            raise self.nothing(0, rows[place], before + place + 1, "leaves nothing to read")
        return found

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["labels"]


EXAMPLE = Seq2seq(data="builtin:python-code", source="{source}", target="{text}", max_train=8, max_eval=4)
