"""Merges of ΔW itself against dense float64 from the papers' definitions, and cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorabench.adapters.merging.bodies import OF_UPDATES, Body, bodies
from lorabench.adapters.merging.task_vectors import merged_updates
from lorabench.config.decode import InputError
from lorabench.linalg.joint import join
from lorabench.updates import pair_interference

SHAPES = {"wide": (13, 29), "tall": (31, 12)}
WEIGHTS = (1.0, 0.5, 2.0)


def factors(ranks=(3, 2, 4), seed=0) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: [(torch.randn(M, r, generator=g), torch.randn(r, N, generator=g)) for r in ranks]
        for name, (M, N) in SHAPES.items()
    }


def dense(layers, weights=WEIGHTS) -> dict[str, np.ndarray]:
    """Layer -> (T, M, N), weights folded in."""
    return {
        name: np.stack([w * (B.double() @ A.double()).numpy() for w, (B, A) in zip(weights, pairs, strict=True)])
        for name, pairs in layers.items()
    }


def merged(by: str, layers, weights=WEIGHTS, density=0.3, rank=None, seed=0) -> dict[str, np.ndarray]:
    body = Body(by=by, weights=weights, density=density, rank=rank, seed=seed)
    found = merged_updates(layers, body)
    return {name: (B.double() @ A.double()).numpy() for name, (B, A) in found}


def isotropic(deltas):
    U, S, Vh = np.linalg.svd(deltas.sum(0), full_matrices=False)
    rank = (1e-6 * S[0] < S).sum()
    return S[:rank].mean() * U[:, :rank] @ Vh[:rank]


def task_singular_vectors(deltas):
    """With a polar factor by SciPy."""
    from scipy.linalg import polar

    most = min(deltas.shape[1:]) // len(deltas)
    parts = [np.linalg.svd(W, full_matrices=False) for W in deltas]
    kept = [min(most, (1e-6 * S[0] < S).sum()) for _, S, _ in parts]
    U, V = (np.concatenate(side, 1) for side in zip(*(
        (U[:, :k], Vh[:k].T) for (U, _, Vh), k in zip(parts, kept, strict=True)), strict=True))  # fmt: skip
    S = np.concatenate([S[:k] for (_, S, _), k in zip(parts, kept, strict=True)])
    return polar(U)[0] * S @ polar(V)[0].T


def ties_of(deltas: dict[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
    """Algorithm 1, entry by entry on one vector an adapter."""
    flat = np.concatenate([W.reshape(len(W), -1) for W in deltas.values()], 1)
    out = np.zeros(flat.shape[1])
    for row in flat:
        row[np.argsort(-np.abs(row))[int(density * len(row)) :]] = 0
    for p in range(flat.shape[1]):
        sign = np.sign(flat[:, p].sum())
        same = flat[np.sign(flat[:, p]) == sign, p]
        out[p] = same.mean() if sign else 0
    ends = np.cumsum([W[0].size for W in deltas.values()])[:-1]
    return {k: v.reshape(deltas[k].shape[1:]) for k, v in zip(deltas, np.split(out, ends), strict=True)}


def knots(deltas: dict[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
    bases, rows = {}, {}
    for name, W in deltas.items():
        U, S, Vh = np.linalg.svd(np.concatenate(list(W), 1), full_matrices=False)
        rank = (1e-6 * S[0] < S).sum()
        bases[name] = U[:, :rank]
        rows[name] = np.stack(np.split(S[:rank, None] * Vh[:rank], len(W), 1))
    return {name: bases[name] @ merge for name, merge in ties_of(rows, density).items()}


def each(function):
    return lambda deltas, _: {name: function(W) for name, W in deltas.items()}


ORACLES = {
    "mean": each(lambda W: W.sum(0) / sum(WEIGHTS)),
    "iso_c": each(isotropic),
    "tsv": each(task_singular_vectors),
    "delta_ties": ties_of,
    "knots_ties": knots,
}


@pytest.mark.parametrize("by", ORACLES)
def test_each_merge_is_what_its_paper_defines(by) -> None:
    layers = factors()
    expected = ORACLES[by](dense(layers), 0.3)
    found = merged(by, layers)
    assert found.keys() == expected.keys()
    for name, W in found.items():
        np.testing.assert_allclose(W, expected[name], atol=2e-5 * np.abs(expected[name]).max())


def test_every_merge_has_an_oracle() -> None:
    assert {*ORACLES, "delta_dare"} == {*OF_UPDATES}


def test_the_order_of_adapters_and_a_change_of_the_factors_basis_change_nothing() -> None:
    layers, g = factors(), torch.Generator().manual_seed(1)
    other = {}
    for name, pairs in layers.items():
        turned = [(B @ (M := torch.randn(B.shape[1], B.shape[1], generator=g)), torch.linalg.solve(M, A))
                  for B, A in pairs]  # fmt: skip
        other[name] = turned[::-1]
    for by in ORACLES:
        first, second = merged(by, layers), merged(by, other, WEIGHTS[::-1])
        for name, W in first.items():
            np.testing.assert_allclose(W, second[name], atol=1e-4 * np.abs(W).max())


@pytest.mark.parametrize("by", ["mean", "iso_c", "tsv", "knots_ties", "delta_ties"])
def test_one_adapter_thrice_is_itself_but_for_what_the_method_does_to_its_singular_values(by) -> None:
    layers = {name: pairs[:1] * 3 for name, pairs in factors().items()}
    for name, W in merged(by, layers, (1.0, 1.0, 1.0), density=1.0).items():
        delta = dense(layers, (1.0, 1.0, 1.0))[name][0]
        S = np.linalg.svd(delta, compute_uv=False)
        if by == "iso_c":
            np.testing.assert_allclose(np.linalg.svd(W, compute_uv=False)[:3], 3 * S[:3].mean(), rtol=1e-5)
        elif by == "tsv":  # the mean of three copies of each vector: 3 · σ / √3 / √3
            np.testing.assert_allclose(W, delta, atol=1e-5 * S[0])
        else:
            np.testing.assert_allclose(W, delta, atol=1e-5 * S[0])


def test_adapters_in_orthogonal_spaces_are_kept_whole_by_tsv() -> None:
    g = torch.Generator().manual_seed(0)
    Q, P = (torch.linalg.qr(torch.randn(d, 6, generator=g)).Q for d in (20, 30))
    layers = {"lin": [(Q[:, :3] * 2, P[:, :3].mT), (Q[:, 3:] * 5, P[:, 3:].mT)]}
    np.testing.assert_allclose(
        merged("tsv", layers, (1.0, 1.0))["lin"], dense(layers, (1.0, 1.0))["lin"].sum(0), atol=1e-5
    )
    assert np.linalg.svd(merged("iso_c", layers, (1.0, 1.0))["lin"], compute_uv=False)[:6] == pytest.approx(3.5)


def test_updates_that_cancel_merge_to_nothing() -> None:
    (B, A), *_ = factors()["wide"]
    for by in ("iso_c", "delta_ties", "mean"):
        W = merged(by, {"lin": [(B, A), (-B, A)]}, (1.0, 1.0), density=1.0)["lin"]
        assert np.abs(W).max() < 1e-5


def test_dare_keeps_the_mean_and_depends_on_its_seed_alone() -> None:
    layers = factors()
    draws = [merged("delta_dare", layers, density=0.5, seed=seed) for seed in range(400)]
    for name, W in dense(layers).items():
        total, spread = W.sum(0), np.sqrt(np.square(W).sum(0))  # the variance of an entry: Σ w² (1 - p) / p
        mean = np.mean([draw[name] for draw in draws], 0)
        assert np.abs((mean - total) / (spread / 20)).max() < 5
        kept = np.array([[draw[name]] for draw in draws])
        assert np.std(kept, 0).mean() == pytest.approx(spread.mean(), rel=0.1)
    np.testing.assert_array_equal(
        merged("delta_dare", layers, seed=3)["wide"], merged("delta_dare", layers, seed=3)["wide"]
    )
    full = merged("delta_dare", layers, density=1.0)
    np.testing.assert_allclose(full["tall"], dense(layers)["tall"].sum(0), atol=1e-5)


def test_blocks_of_rows_change_nothing(monkeypatch) -> None:
    layers = factors()
    whole = merged("delta_ties", layers)
    monkeypatch.setattr(pair_interference, "BLOCK_ENTRIES", 40)
    for name, W in merged("delta_ties", layers).items():
        np.testing.assert_allclose(W, whole[name], atol=1e-6)


@pytest.mark.parametrize("by", ["delta_ties", "tsv", "mean"])
def test_a_rank_gives_the_best_approximation(by) -> None:
    layers = factors()
    whole, cut = merged(by, layers), merged(by, layers, rank=2)
    for name, W in whole.items():
        U, S, Vh = np.linalg.svd(W)
        np.testing.assert_allclose(cut[name], U[:, :2] * S[:2] @ Vh[:2], atol=1e-4 * S[0])


def test_the_core_holds_every_update() -> None:
    pairs = factors()["tall"]
    joint = join(pairs)
    assert joint.Q.shape == (31, 9) and joint.P.shape == (12, 9)
    for core, (B, A) in zip(joint.cores(), pairs, strict=True):
        torch.testing.assert_close(
            joint.Q.double() @ core @ joint.P.double().mT, (B @ A).double(), atol=1e-5, rtol=1e-5
        )
    with pytest.raises(ValueError, match="NaN or Inf"):
        join([(pairs[0][0] * float("nan"), pairs[0][1])])
    with pytest.raises(ValueError, match="not of one layer"):
        join([pairs[0], factors()["wide"][0]])


def test_weights_without_a_mean_are_refused() -> None:
    with pytest.raises(InputError, match=r"--weights 1,-1: sum to 0"):
        bodies(["a", "b"], ["mean"], [1.0, -1.0], 0.5, None, [0])
