"""Which runs of a pack have rows of one length: as few groups as there can be, and little that is filled up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorabench.spec.method import Factor
from lorabench.training.packed.rows import _alike_in_size


def run(rank: int, layers: str = "a") -> dict[str, Factor]:
    A, B = (nn.Parameter(torch.zeros(shape)) for shape in ((rank, 4), (6, rank)))
    return {name: Factor(A=A, B=B, scale=1.0, dropout=0.0) for name in layers}


@pytest.mark.parametrize(
    ("runs", "ends"),
    [
        ([run(8)], [1]),
        ([run(8), run(8), run(2), run(2)], [2, 4]),
        ([run(8), run(6), run(5)], [3]),
        ([run(8), run(4), run(2), run(1)], [2, 4]),
        ([run(4, "a"), run(4, "b")], [1, 2]),
        ([run(4, "ab"), run(4, "a")], [2]),
        ([run(2), run(8), run(2)], [2, 3]),
    ],
)
def test_runs_side_by_side_of_about_one_size_are_a_group(runs: list[dict[str, Factor]], ends: list[int]) -> None:
    found = _alike_in_size(runs)
    assert [part.stop for part in found] == ends and [part.start for part in found] == [0, *ends[:-1]]
