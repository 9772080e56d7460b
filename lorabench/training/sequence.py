"""What a sequence of tasks does to each of them: transfer and forgetting, from the matrix of accuracies.

T tasks, trained one after another. R, (T + 1, T): `R[i][j]` is the accuracy on task j after training on i tasks, so row
0 is the untouched base, and task j (1, …, T) has been learned in row j. Lopez-Paz and Ranzato 2017, arXiv 1706.08840,
section 2; Chaudhry et al. 2018, arXiv 1801.10112, the forgetting measure.
"""

from __future__ import annotations

Matrix = list[list[float]]
METRICS = ("accuracy", "token_accuracy", "loss")
"""The metrics of which a matrix is kept, where all tasks report them; transfer is taken of the first."""


def matrices(rows: list[list[dict[str, float]]]) -> dict[str, Matrix]:
    """Metric -> R, from the validation metrics (`valid_loss`, …) of each task in each row."""
    names = [name for name in METRICS if all(f"valid_{name}" in cell for row in rows for cell in row)]
    return {name: [[cell[f"valid_{name}"] for cell in row] for row in rows] for name in names}


def measures(found: dict[str, Matrix]) -> dict[str, float]:
    """By their names in MEASURES; those of transfer need two tasks or more, and all of them an accuracy."""
    R = next((found[name] for name in METRICS[:2] if name in found), None)
    if R is None:
        return {}
    if len(R[0]) < 2:
        return {"average_final": _mean(R[-1])}
    return {
        "average_final": _mean(R[-1]),
        "backward_transfer": backward_transfer(R),
        "forward_transfer": forward_transfer(R),
        "sequence_forgetting": forgetting(R),
    }


def backward_transfer(R: Matrix) -> float:
    """Mean over j < T of R[T][j] - R[j][j] (Lopez-Paz and Ranzato's BWT); in [-1, 1], below 0: forgetting."""
    last = len(R[0])
    return _mean([R[last][j - 1] - R[j][j - 1] for j in range(1, last)])


def forward_transfer(R: Matrix) -> float:
    """Mean over j > 1 of R[j-1][j] - R[0][j] (their FWT): what earlier tasks gave a task before it was trained.

    The paper's b is the accuracy at random initialization; here it is that of the untouched base.
    """
    return _mean([R[j - 1][j - 1] - R[0][j - 1] for j in range(2, len(R[0]) + 1)])


def forgetting(R: Matrix) -> float:
    """Mean over j < T of the maximum over 1 ≤ l < T of R[l][j], less R[T][j] (Chaudhry et al.'s F)."""
    last = len(R[0])
    return _mean([max(R[row][j] for row in range(1, last)) - R[last][j] for j in range(last - 1)])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
