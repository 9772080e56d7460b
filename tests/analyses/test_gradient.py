"""ΔW beside the gradient at W0: where it lies in it, where it does not, as it turns to it, and by chance."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import subspace_angles

from lorabench.analyses.gradient import Gradient
from lorabench.linalg.decompose import ThinSVD, thin_svd
from lorabench.updates.layer import LayerSVD

M, N, K = 40, 30, 3


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TASK, RETAIN = thin_svd(random(0, M, N), keep=8), thin_svd(random(1, M, N), keep=8)


def at(step: int, delta: torch.Tensor, k: int = K, **gradients: ThinSVD) -> LayerSVD:
    svd = thin_svd(delta)
    cut = ThinSVD(U=svd.U[:, :k], S=svd.S[:k], Vh=svd.Vh[:k])
    return LayerSVD(parameter="layers.0.q_proj.weight", svd=cut, step=step, gradients=gradients)


def rank(svd: ThinSVD, first: int, last: int) -> torch.Tensor:
    return (svd.U[:, first:last] * torch.arange(9, 9 - (last - first), -1)) @ svd.Vh[first:last]


def values(rows: list[dict], metric: str, column: str = "value") -> list[float]:
    return [row[column] for row in rows if row["metric"] == metric]


def test_a_step_down_the_gradient_lies_in_it_and_one_along_its_other_directions_does_not() -> None:
    rows = Gradient().compute(at(1, rank(TASK, K, 2 * K), task=TASK), at(2, -rank(TASK, 0, K), task=TASK))
    assert values(rows, "phi_task_at") == pytest.approx([0, 0, 1, 1], abs=1e-9)
    assert values(rows, "sine_task_at") == pytest.approx([1, 1, 0, 0], abs=1e-6)
    assert values(rows, "phi_task") == pytest.approx([1, 1]) and values(rows, "sine_task") == pytest.approx([0, 0])
    assert values(rows, "phi_task", "null") == pytest.approx([K / N, K / M])
    assert not values(rows, "angle_task_retain")


def test_angles_are_scipys_and_random_subspaces_give_the_null() -> None:
    found = {"phi_task": [], "sine_task": []}
    for seed in range(2, 60):
        rows = Gradient().compute(at(1, random(seed, M, N), task=TASK, retain=RETAIN))
        for name, kept in found.items():
            kept.append(values(rows, name))
        nulls, stds = ({name: values(rows, name, column) for name in found} for column in ("null", "null_std"))
    for name, kept in found.items():
        draws = torch.tensor(kept, dtype=torch.float64)
        assert draws.mean(0).tolist() == pytest.approx(nulls[name], rel=0.15)
        rel = 0.5 if name == "phi_task" else 1.0  # a sine near 1 has a long tail
        assert draws.std(0).tolist() == pytest.approx(stds[name], rel=rel)
    own = at(1, random(2, M, N), task=TASK, retain=RETAIN)
    rows = Gradient().compute(own)
    wanted = subspace_angles(own.svd.Vh.numpy().T, TASK.Vh[:K].numpy().T)
    assert values(rows, "sine_task")[0] == pytest.approx(math.sin(wanted.max()))
    between = subspace_angles(TASK.U[:, :K].numpy(), RETAIN.U[:, :K].numpy())
    assert values(rows, "angle_task_retain")[1] == pytest.approx(between.min())


def test_no_gradient_and_no_change_have_no_rows_and_a_smaller_change_fewer_directions() -> None:
    assert Gradient().compute(at(1, random(3, M, N))) == []
    assert Gradient().compute(at(1, torch.zeros(M, N), task=TASK)) == []
    rows = Gradient().compute(at(1, rank(TASK, 0, 1), 1, task=TASK), at(2, random(3, M, N), task=TASK))
    assert values(rows, "phi_task_at")[:2] == pytest.approx([1, 1])
