"""What the tasks share that tell classes apart, of texts and of images: labels, loss and metrics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show
from lorabench.data.rows_file import Row, place
from lorabench.data.values import are_scores, as_class, in_order, number, shown
from lorabench.tasks._labelled import Labelled

if TYPE_CHECKING:
    from torch import Tensor


class Classes(Labelled):
    """Labels are compared as text, of which 0, "0" and 0.0 are one; classes are the sorted ones of the training split.

    Numbers with a fraction, and more than two different ones that all have a decimal point, are scores: these are
    refused, for they are the task `regression`'s.
    """

    reports: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "matthews", "majority")

    def stratified_by(self) -> str:
        return self.label

    def written(self, label: str) -> str:
        return as_class(label)

    def target(self, label: str, options: dict[str, Any]) -> int:
        return options["label2id"][label]

    def check_labels(self, split: str, found: list[tuple[str, Row]], options: dict[str, Any]) -> None:
        where = f"task.label = {show(self.label)}"
        written = [label for label, _ in found]
        if split == "train" and are_scores(written):
            example = next((label for label in written if not (number(label) or 0.0).is_integer()), written[0])
            hint = 'task.name = "regression" predicts scores; classes are written without a decimal point'
            raise InputError(f"{where}: holds scores, such as {clip(example)}, and no classes; {hint}")
        rows: dict[str, list[Row]] = {}
        for label, row in found:
            rows.setdefault(as_class(label), []).append(row)
        if split == "train" and len(rows) < 2:
            raise InputError(f"{where}: needs at least two classes, found {shown(in_order(rows))}")
        first = {as_class(label) for label in written[: self.max_train]}
        if split == "train" and len(first) < 2:  # as of a file that is sorted by its labels
            says = f"so many rows of train are all of the class {shown(*first)}: take more, or shuffle the file"
            raise InputError(f"task.max_train = {self.max_train}: {says}")
        known = options.get("label2id", rows)
        strange = [label for label in in_order(rows) if label not in known]
        if strange:
            raise InputError(f"{where}: {_unknown(strange[0], rows[strange[0]], list(known))}")

    def model_options(self, rows: list[Row]) -> dict[str, Any]:
        classes = self.classes(rows)
        return {
            "num_labels": len(classes),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: i for i, name in enumerate(classes)},
        }

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


def _unknown(label: str, rows: list[Row], known: list[str]) -> str:
    """That a class of some other split is not in train, how often it is there, and what can be done."""
    first, name = place(rows[0], 1), shown(label)
    count = (
        f"{first} has the class {name}" if len(rows) == 1 else f"{len(rows)} rows have the class {name} ({first}, …)"
    )
    way = "add some there, or leave it out by task.unlabelled"
    return f"{count}, which no row of the training split has: {way}. Its classes: {shown(known)}"


def _confusion(scores: list[Any]) -> list[list[int]]:
    """counts[true][predicted]."""
    size = scores[0][2]
    counts = [[0] * size for _ in range(size)]
    for predicted, true, _ in scores:
        for p, t in zip(predicted, true, strict=True):
            counts[t][p] += 1
    return counts


def _macro_f1(confusion: list[list[int]]) -> float:
    """Unweighted mean of 2 TP / (2 TP + FP + FN) over the classes that occur or are predicted: scikit-learn's."""
    scores = []
    for i, row in enumerate(confusion):
        both = sum(row) + sum(other[i] for other in confusion)
        if both:
            scores.append(2 * row[i] / both)
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
