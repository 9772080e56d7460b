"""What a task has a model write, and how that is scored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt

from lorabench.config.quote import show

Metric = Literal["exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf"]
METRICS: tuple[str, ...] = get_args(Metric)
ENDS = ("", "_low", "_high")
"""Of the measures of a metric: its value, and the ends of its interval over the examples."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """After training a model answers each prompt, greedily unless told otherwise; the untouched base does too."""

    max_new_tokens: Annotated[int, Ge(1)] = 128
    """An answer ends at the tokenizer's end-of-sequence token, at the latest after so many tokens."""
    metrics: tuple[Metric, ...] = ("exact_match",)
    """What the answers are held against the reference by; see `lorabench.training.scoring`."""
    answer: str | None = None
    """Regular expression of what `exact_match` compares: its last match in a text, of that its first group if it has
    one (None: the whole text)."""
    splits: Literal["test", "validation", "both"] = "test"
    """Of the examples, of which `max_eval` are taken."""
    temperature: Annotated[float, Ge(0)] = 0.0
    """0: each token is the most probable one. Else tokens are drawn, by `seed`."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Drawn are those that hold this share of the probability together."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    batch_size: Annotated[int, Ge(1)] = 16
    """Prompts at a time. What is drawn depends on it: a batch has one generator."""

    def __post_init__(self) -> None:
        problems = [*self._problems()]
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        if not self.metrics:
            yield "metrics = []: needs at least one"
        if len(set(self.metrics)) < len(self.metrics):
            yield f"metrics = {show(list(self.metrics))}: names one twice"
        if self.answer is not None:
            if "exact_match" not in self.metrics:
                yield f'answer = {show(self.answer)}: is for metrics = ["exact_match"] alone'
            try:
                if re.match(self.answer, ""):
                    yield f"answer = {show(self.answer)}: matches an empty text, and so finds an answer anywhere"
            except (re.error, OverflowError, RecursionError) as error:
                yield f"answer = {show(self.answer)}: not a regular expression: {error}"
        if self.top_p < 1 and not self.temperature:
            yield f"top_p = {self.top_p:g}: is of use with a temperature above 0 only"

    @property
    def measured_splits(self) -> tuple[str, ...]:
        return ("validation", "test") if self.splits == "both" else (self.splits,)

    @property
    def reports(self) -> tuple[str, ...]:
        """The names of what is measured, without the split's."""
        return ("num_generated", *(metric + end for metric in self.metrics for end in ENDS))
