"""What a task is: data turned into examples, a loss, and the field's metrics.

Shapes: n examples in a batch, t tokens, v vocabulary or classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from lorabench.config.plugins import Plugin
from lorabench.data.rows_file import Row

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.spec.run_spec import RunSpec

Example = dict[str, Any]
"""`input_ids` (t,) and `labels`: (t,) with IGNORE where nothing is predicted, or one class (int) or score (float).

`token_type_ids` (t,) where the tokenizer tells the texts of a pair apart by them.
"""
IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Task(Plugin, ABC):
    """Fields say where the data is and how to read it. Add a task by adding one file to `lorabench/tasks/`."""

    folder: ClassVar[str] = "tasks"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    """The transformers class that loads the base model."""
    reports: ClassVar[tuple[str, ...]] = ("loss",)
    """The names that `metrics` gives, for the sweep file's check."""

    data: str = "builtin:python-code"
    """`builtin:NAME`, a local file or folder, or a Hub data set (`name` or `name:config`)."""
    data_revision: str | None = None
    max_train: Annotated[int, Ge(1)] | None = None
    """At most this many training examples (None: all)."""
    max_eval: Annotated[int, Ge(1)] | None = None
    """At most this many validation, test and retention examples each (None: all)."""

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """Why this task cannot be run as `spec` asks: `key = value: reason`."""
        return iter(())

    def sources(self) -> dict[str, str]:
        """The data sets that this task reads: role (`task`, `retain`) -> source."""
        return {"task": self.data}

    def stratified_by(self) -> str | None:
        """The column whose values rows held out for validation have in the same shares as the rest."""
        return None

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        """The rows of `train`, `validation` or `test` that count; none of a test split that cannot be scored.

        InputError with what is wrong of them as far as it shows without a tokenizer: it is found before anything
        starts. `options` is what `model_options` has given of the training rows, empty where these are asked for.
        """
        return rows

    @abstractmethod
    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> Iterable[Example]:
        """Tokenized examples of the usable rows of one split, of at most `seq_len` tokens each.

        Only the first `max_train` or `max_eval` are taken: an iterator need not make the others.
        """

    def model_options(self, rows: list[Row]) -> dict[str, Any]:
        """Further arguments for loading the base model (`num_labels`), from the usable training rows."""
        return {}

    @abstractmethod
    def count(self, batch: dict[str, Tensor]) -> int:
        """Number of predictions in a batch: what the summed loss is divided by."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy summed over the batch's predictions, in nats."""

    @abstractmethod
    def score(self, logits: Tensor, batch: dict[str, Tensor]) -> Any:
        """What `metrics` needs of one batch, small enough to keep for all batches."""

    @abstractmethod
    def metrics(self, loss: float, scores: list[Any]) -> dict[str, float | None]:
        """The field's metrics of a whole split; `loss` is the mean over its predictions."""


class LanguageModeling(Task):
    """Next-token prediction: what `text` and `completion` share."""

    reports: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy")

    def sources(self) -> dict[str, str]:
        retain = getattr(self, "retain", None)
        return {"task": self.data} | ({"retain": retain} if retain else {})

    def count(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORE).sum())

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        from torch.nn.functional import cross_entropy, pad

        # The labels are shifted, not the logits: a slice of those is copied, and its gradient padded by a copy more.
        targets = pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:].flatten()
        return cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORE, reduction="sum")

    def score(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[int, int]:
        targets = batch["labels"][:, 1:]
        right = (logits[:, :-1].argmax(-1) == targets) & (targets != IGNORE)
        return int(right.sum()), int((targets != IGNORE).sum())

    def metrics(self, loss: float, scores: list[tuple[int, int]]) -> dict[str, float | None]:
        right, total = (sum(column) for column in zip(*scores, strict=True))
        perplexity = math.exp(loss) if loss < 700 else None  # exp overflows a float64 past 709
        return {"loss": loss, "perplexity": perplexity, "token_accuracy": right / total}
