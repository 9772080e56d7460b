"""Language modelling on running text: documents joined, cut into blocks of seq_len tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorabench.decode import InputError
from lorabench.task import Example, LanguageModeling, check_column


@dataclass(frozen=True, kw_only=True)
class Text(LanguageModeling):
    """Every token is predicted. Documents are separated by the tokenizer's end-of-sequence token."""

    text: str = "text"
    """Column that holds the text."""
    retain: str | None = None
    """A data set of the same kind on which forgetting is measured: its loss before and after."""

    def examples(
        self, rows: list[dict[str, Any]], tokenizer: Any, seq_len: int, options: dict[str, Any]
    ) -> list[Example]:
        check_column(rows, "task.text", self.text)
        encoded = tokenizer([str(row[self.text]) for row in rows], add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream = [token for ids in encoded for token in [*ids, *end]]
        blocks = [stream[i : i + seq_len] for i in range(0, len(stream) - seq_len + 1, seq_len)]
        if rows and not blocks:
            raise InputError(f"seq_len = {seq_len}: is longer than the whole text ({len(stream)} tokens)")
        return [{"input_ids": block, "labels": block} for block in blocks]


EXAMPLE = Text(max_train=8, max_eval=4)
