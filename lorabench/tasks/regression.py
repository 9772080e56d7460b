"""Regression: a score for a text, or for a pair of texts (STS-B), by a linear head with one output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show
from lorabench.data.columns import Holds, are_numbers
from lorabench.data.rows_file import Row, place
from lorabench.data.values import number, shown
from lorabench.tasks._labelled import LabelledText

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Regression(LabelledText):
    """Scores are finite numbers, taken as they are. The loss is the squared error, and their mean the reported one."""

    reports: ClassVar[tuple[str, ...]] = ("loss", "pearson", "spearman")
    loss_unit: ClassVar[Literal["nats", ""]] = ""

    holds: ClassVar[Holds] = are_numbers

    def written(self, label: str) -> str:
        return f"{value:.17g}" if (value := number(label)) is not None else label

    def target(self, label: str, options: dict[str, Any]) -> float:
        return float(label)

    def check_labels(self, split: str, found: list[tuple[str, Row]], options: dict[str, Any]) -> None:
        where = f"task.label = {show(self.label)}"
        for count, (label, row) in enumerate(found, 1):
            if number(label) is None:
                raise InputError(f"{where}: {place(row, count)} is no finite number: {shown(label)}")
        if split == "train" and len({float(label) for label, _ in found}) < 2:
            raise InputError(f"{where}: every row has the same score, {clip(found[0][0])}")

    def model_options(self, rows: list[Row]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Squared error, summed over the batch."""
        return (logits[:, 0].float() - batch["labels"]).square().sum()

    def score(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[list[float], list[float]]:
        return logits[:, 0].float().tolist(), batch["labels"].tolist()

    def metrics(self, loss: float, scores: list[Any]) -> dict[str, float | None]:
        """`pearson` and `spearman` are in [-1, 1], None where all predictions or all scores are one."""
        predicted, true = ([value for batch in column for value in batch] for column in zip(*scores, strict=True))
        return {
            "loss": loss,
            "pearson": _pearson(predicted, true),
            "spearman": _pearson(_ranks(predicted), _ranks(true)),
        }


def _pearson(a: Any, b: Any) -> float | None:
    import numpy as np

    a, b = (np.asarray(each, np.float64) - np.mean(each, dtype=np.float64) for each in (a, b))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return min(1.0, max(-1.0, float(a @ b) / norms)) if norms else None


def _ranks(values: list[float]) -> Any:
    """From 1; equal values share the mean of their ranks."""
    import numpy as np

    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


EXAMPLE = Regression(data="builtin:questions", text="question", label="score", max_train=8, max_eval=4)
