"""Moving one ΔW: against the papers' formulas with dense maps, planted rotations, the same base, widths, chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorabench.adapters.moving.cross_lora import cross_lora
from lorabench.adapters.moving.maps import top_vectors
from lorabench.adapters.moving.partners import partner_block
from lorabench.adapters.moving.project import project

WAYS = [project, cross_lora]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, size: float, seed: int) -> Tensor:
    """Near the identity for a small `size`."""
    X = normal(d, d, seed=seed)
    return torch.linalg.matrix_exp(size * (X - X.mT) / d**0.5)


def adapter(M: int, N: int, r: int = 3, seed: int = 9) -> tuple[Tensor, Tensor]:
    return normal(M, r, seed=seed), normal(r, N, seed=seed + 1)


def moved(way, W: Tensor, new: Tensor, B: Tensor, A: Tensor, rank: int = 320) -> Tensor:
    left, right = way(top_vectors(W, rank), top_vectors(new, rank))(B, A)
    assert left.shape[1] == right.shape[0] == B.shape[1]
    return left @ right


def dense_svd(W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], Vh[:k].mT


def least_squares(X: Tensor, Y: Tensor) -> Tensor:
    """argmin ‖P X − Y‖_F of least norm."""
    return torch.linalg.lstsq(X.mT, Y.mT, driver="gelsd").solution.mT


@pytest.mark.parametrize("shape", [(12, 12), (20, 12), (12, 20)])
def test_project_is_the_papers_projection(shape: tuple[int, int]) -> None:
    W, new, (B, A) = normal(*shape), normal(*shape, seed=1), adapter(*shape)
    U, V = dense_svd(new, 7)
    assert torch.allclose(moved(project, W, new, B, A, 7), U @ U.mT @ B @ A @ V @ V.mT, atol=1e-10)


def test_equation_7_of_cross_lora_is_a_projection() -> None:
    """Ũ = P̂ U is U' itself: the equation as printed is what `project` computes."""
    W, new, (B, A) = normal(16, 12), normal(16, 12, seed=1), adapter(16, 12)
    (U, V), (U_new, V_new) = dense_svd(W, 7), dense_svd(new, 7)
    U_tilde, V_tilde = least_squares(U, U_new) @ U, least_squares(V, V_new) @ V
    printed = U_tilde @ (U_tilde.mT @ B @ A @ V_tilde) @ V_tilde.mT
    assert torch.allclose(moved(project, W, new, B, A, 7), printed, atol=1e-10)


@pytest.mark.parametrize("new_shape", [(20, 12), (20, 15), (9, 30)])
@pytest.mark.parametrize("way", WAYS)
def test_widths_differ(way, new_shape: tuple[int, int]) -> None:
    """The maps are those of least squares, up to the signs of the pairs; projections where the width is the same."""
    W, new, (B, A) = normal(16, 12), normal(*new_shape, seed=1), adapter(16, 12)
    k = 8
    (U, V), (U_new, V_new) = dense_svd(W, k), dense_svd(new, k)
    P_out, P_in = least_squares(U, U_new), least_squares(V, V_new)
    got = moved(way, W, new, B, A, k)
    assert got.shape == new_shape
    if way is project and new_shape[1] == 12:
        assert torch.allclose(got @ V_new @ V_new.mT, got, atol=1e-10)
        wanted = P_out @ B @ A @ V_new @ V_new.mT
        assert torch.allclose((U_new.mT @ got).abs(), (U_new.mT @ wanted).abs(), atol=1e-10)
    else:
        inside = (U_new.mT @ (P_out @ B @ A @ P_in.mT) @ V_new).abs()
        assert torch.allclose((U_new.mT @ got @ V_new).abs(), inside, atol=1e-10)
    move = way(top_vectors(W, k), top_vectors(new, k))
    assert move.signs_known == (new_shape[1] == 12)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_base_gives_the_adapter_back(way) -> None:
    W, (B, A) = normal(12, 12), adapter(12, 12)
    assert torch.allclose(moved(way, W, W, B, A), B @ A, atol=1e-10)
    tall, (B, A) = normal(20, 12), adapter(20, 12)
    U, _ = dense_svd(tall, 12)
    assert torch.allclose(moved(way, tall, tall, B, A), U @ U.mT @ B @ A, atol=1e-10)  # outside of it W0 has nothing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rotated_base_takes_the_rotated_adapter(dtype: torch.dtype) -> None:
    """W0' = P W0 Qᵀ: ΔW' = P ΔW Qᵀ, where the rotation is small enough to tell the signs."""
    P, Q = rotation(16, 0.3, 3), rotation(16, 0.3, 4)
    W, (B, A) = normal(16, 16), adapter(16, 16)
    got = moved(cross_lora, W.to(dtype), (P @ W @ Q.mT).to(dtype), B.to(dtype), A.to(dtype))
    wanted = P @ B @ A @ Q.mT
    assert float((got - wanted).norm() / wanted.norm()) < (1e-10 if dtype == torch.float64 else 1e-4)
    assert float((moved(project, W, P @ W @ Q.mT, B, A) - wanted).norm() / wanted.norm()) > 0.1


def test_any_rotation_keeps_what_is_done_between_the_pairs() -> None:
    """Of a large rotation, signs apart: W0 alone does not tell (u, v) from (−u, −v)."""
    P, Q = (torch.linalg.qr(normal(16, 16, seed=seed)).Q for seed in (3, 4))
    W, (B, A) = normal(16, 16), adapter(16, 16)
    got, wanted = moved(cross_lora, W, P @ W @ Q.mT, B, A), P @ B @ A @ Q.mT
    U, V = dense_svd(P @ W @ Q.mT, 16)
    assert torch.allclose((U.mT @ got @ V).abs(), (U.mT @ wanted @ V).abs(), atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("new_shape", [(24, 16), (30, 16), (18, 20)])
def test_a_random_adapter_stands_at_chance(way, new_shape: tuple[int, int]) -> None:
    W, new = normal(24, 16), normal(*new_shape, seed=1)
    move = way(top_vectors(W, 6), top_vectors(new, 6))
    generator = torch.Generator().manual_seed(5)
    S = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    squares = []
    for _ in range(400):
        U, V = (torch.linalg.qr(torch.randn(d, 3, generator=generator, dtype=torch.float64)).Q for d in (24, 16))
        B, A = move(U * S, V.mT)
        squares.append(float((B @ A).square().sum() / S.square().sum()))
    shares = torch.tensor(squares)
    assert abs(float(shares.mean()) - move.chance**2) < 5 * float(shares.std()) / 20


@pytest.mark.parametrize("way", WAYS)
def test_a_base_of_less_than_full_rank_is_not_read_beyond_it(way) -> None:
    W, new = normal(12, 4) @ normal(4, 12, seed=2), normal(12, 12, seed=1)
    assert top_vectors(W, 320).U.shape[1] == 4
    B, A = adapter(12, 12)
    assert torch.linalg.matrix_rank(moved(way, new, W, B, A)) <= 3
    assert torch.equal(moved(way, W, new, 0 * B, A), torch.zeros(12, 12, dtype=torch.float64))


def test_blocks_at_the_same_relative_depth() -> None:
    assert [partner_block(i, 3, 3) for i in range(3)] == [0, 1, 2]
    assert [partner_block(i, 2, 6) for i in range(2)] == [1, 4]
    assert [partner_block(i, 6, 2) for i in range(6)] == [None, 0, None, None, 1, None]
    for of in range(1, 9):
        for new in range(1, 9):
            found = [partner_block(i, of, new) for i in range(of)]
            taken = [number for number in found if number is not None]
            assert taken == sorted(set(taken)) and len(taken) == min(of, new) and taken[-1] < new
    assert partner_block(3, 3, 5) is None
