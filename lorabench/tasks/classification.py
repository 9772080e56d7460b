"""Classification of a text, or of a pair of texts, by a linear head on the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.decode import InputError
from lorabench.task import Example, Task, check_column

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """The head starts from the same random weights in every run of one seed, and is always trained.

    Labels may be integers or strings; their classes are the sorted values of the training split. A test split
    without labels (-1, as the GLUE benchmark ships it) counts as none.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    reports: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "matthews", "majority")

    data: str
    text: str = "text"
    """Column of the (first) text."""
    text_pair: str | None = None
    """Column of the second text of a pair."""
    label: str = "label"
    columns: str | None = None
    """Column names of a csv or tsv without a header line, separated by commas."""

    def examples(
        self, rows: list[dict[str, Any]], tokenizer: Any, seq_len: int, options: dict[str, Any]
    ) -> list[Example]:
        keys = [self.text, *([self.text_pair] if self.text_pair else [])]
        self._check_columns(rows, [*keys, self.label])
        classes = options["label2id"]
        labels = [str(row[self.label]) for row in rows]
        if not rows or ("-1" not in classes and set(labels) == {"-1"}):
            return []
        strange = sorted(set(labels) - set(classes))
        if strange:
            raise InputError(
                f'task.label = "{self.label}": {strange[0]} is no label of the training split: {list(classes)}'
            )
        texts = [[str(row[key]) for row in rows] for key in keys]
        encoded = tokenizer(*texts, truncation=True, max_length=seq_len)["input_ids"]
        if [] in encoded:
            raise InputError(f'task.text = "{self.text}": row {encoded.index([]) + 1} has no tokens')
        return [{"input_ids": ids, "labels": classes[y]} for ids, y in zip(encoded, labels, strict=True)]

    def model_options(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self._check_columns(rows, [self.label])
        classes = sorted({row[self.label] for row in rows})
        if len(classes) < 2:
            raise InputError(f'task.label = "{self.label}": needs at least two classes, found {classes}')
        return {
            "num_labels": len(classes),
            "id2label": {i: str(value) for i, value in enumerate(classes)},
            "label2id": {str(value): i for i, value in enumerate(classes)},
        }

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.float(), batch["labels"], reduction="sum")

    def score(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[list[int], list[int], int]:
        return logits.argmax(-1).tolist(), batch["labels"].tolist(), logits.shape[-1]

    def metrics(self, loss: float, scores: list[Any]) -> dict[str, float | None]:
        confusion = _confusion(scores)
        total, right = sum(map(sum, confusion)), sum(row[i] for i, row in enumerate(confusion))
        return {
            "loss": loss,
            "accuracy": right / total,
            "macro_f1": _macro_f1(confusion),
            "matthews": _matthews(confusion),
            "majority": max(map(sum, confusion)) / total,
        }

    def problems(self, spec: RunSpec) -> Iterator[str]:
        if self.columns and self.label not in self.columns.split(","):
            yield f'task.label = "{self.label}": is not among task.columns = "{self.columns}"'

    def _check_columns(self, rows: list[dict[str, Any]], keys: list[str]) -> None:
        fields = {self.text: "text", self.text_pair: "text_pair", self.label: "label"}
        problems = []
        for key in keys:
            try:
                check_column(rows, f"task.{fields[key]}", key)
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)


def _confusion(scores: list[Any]) -> list[list[int]]:
    """counts[true][predicted]."""
    size = scores[0][2]
    counts = [[0] * size for _ in range(size)]
    for predicted, true, _ in scores:
        for p, t in zip(predicted, true, strict=True):
            counts[t][p] += 1
    return counts


def _macro_f1(confusion: list[list[int]]) -> float:
    """Unweighted mean over classes of 2 TP / (2 TP + FP + FN); 0 for a class that neither occurs nor is predicted."""
    scores = []
    for i, row in enumerate(confusion):
        both = sum(row) + sum(other[i] for other in confusion)
        scores.append(2 * row[i] / both if both else 0.0)
    return sum(scores) / len(scores)


def _matthews(confusion: list[list[int]]) -> float:
    """Multi-class Matthews correlation, R_K (Gorodkin 2004); 0 where either side has a single class."""
    total = sum(map(sum, confusion))
    right = sum(row[i] for i, row in enumerate(confusion))
    true = [sum(row) for row in confusion]
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    covariance = right * total - sum(t * p for t, p in zip(true, predicted, strict=True))
    spread = (total**2 - sum(p * p for p in predicted)) * (total**2 - sum(t * t for t in true))
    return covariance / math.sqrt(spread) if spread else 0.0


EXAMPLE = Classification(data="builtin:english-docs", text="text", label="label", max_train=8, max_eval=4)
