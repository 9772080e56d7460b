"""The analyses beside W0 and between runs, of numpy matrices, in the engine's columns."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import numpy as np

EPSILONS = (0.1, 0.3, 0.5, 0.7, 0.9)
TOPS = (1, 2, 5, 10, 20)
DEPTH = 32
Row = dict[str, Any]


@cache
def base(n: int, size: int) -> np.ndarray:
    """W0 (size, size) of layer n, its singular values falling from 12."""
    U, V = (np.linalg.qr(np.random.default_rng([9, n, side]).normal(size=(size, size)))[0] for side in (0, 1))
    return 12 * (U * np.exp(-np.arange(size) / 24)) @ V.T


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, ...]:
    """Two analyses of a layer ask for the same."""
    return _decomposed(matrix.tobytes(), matrix.shape[1])


@lru_cache(maxsize=64)
def _decomposed(content: bytes, width: int) -> tuple[np.ndarray, ...]:
    return np.linalg.svd(np.frombuffer(content).reshape(-1, width))


def alignment(U: np.ndarray, S: np.ndarray, Vh: np.ndarray, W: np.ndarray) -> list[Row]:
    """Amplification with the top r directions of U S Vh."""
    rows = []
    for r in [1, 2, 4, len(S)] if len(S) > 4 else [*range(1, len(S) + 1)]:
        norm = np.linalg.norm(S)
        value = norm / np.linalg.norm(U[:, :r].T @ W @ Vh[:r].T)
        null = norm / (r * np.linalg.norm(W) / len(W))
        found = {"r": r, "value": value, "null": null}
        rows.append({"metric": "amplification_at"} | found)
        rows += [{"metric": "amplification"} | found] if r == len(S) else []
    return rows


def intruders(U: np.ndarray, S: np.ndarray, Vh: np.ndarray, W: np.ndarray) -> list[Row]:
    size = len(W)
    random = [np.linalg.qr(np.random.default_rng(side).normal(size=(size, len(S))))[0] for side in (7, 8)]
    left = _svd(W)[0]
    value, null = (
        np.abs(left.T @ _svd(W + (a * S) @ b)[0]).max(axis=0) for a, b in ((U, Vh), (random[0], random[1].T))
    )
    return [
        {"metric": metric, "epsilon": epsilon, "k": k, "value": float((value[:k] < epsilon).sum()),
         "null": float((null[:k] < epsilon).sum()), "num_degenerate": float((value[: k // 2] < epsilon).sum())}
        for epsilon in EPSILONS for k in TOPS
        for metric in (["count", "num_intruders"] if (epsilon, k) == (0.5, 10) else ["count"])
    ]  # fmt: skip


def survival(U: np.ndarray, S: np.ndarray, Vh: np.ndarray, W: np.ndarray) -> list[Row]:
    before, after = _svd(W), _svd(W + (U * S) @ Vh)
    sides = {"input": (before[2].T, after[2].T), "output": (before[0], after[0])}
    rows = []
    for side, (a, b) in sides.items():
        gram = ((a[:, :DEPTH].T @ b[:, :DEPTH]) ** 2).cumsum(0).cumsum(1).diagonal() / np.arange(1, DEPTH + 1)
        rows += [
            {"metric": "survival_at", "side": side, "k": k, "value": float(kept), "null": k / len(W)}
            for k, kept in enumerate(gram, 1)
        ]
        rows.append(rows[-1] | {"metric": "survival"})
    return rows


def overlap(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> list[Row]:
    """Energy shares of two thin SVDs in one another's subspaces."""
    rows = []
    for side in ("input", "output"):
        (P, S), (Q, T) = ((svd[2].T if side == "input" else svd[0], svd[1]) for svd in (a, b))
        shares = [np.sum(((P * S).T @ Q) ** 2) / np.sum(S**2), np.sum(((Q * T).T @ P) ** 2) / np.sum(T**2)]
        for metric, share, other in zip(("energy_a_in_b", "energy_b_in_a"), shares, (Q, P), strict=True):
            null = other.shape[1] / len(other)
            rows.append({"side": side, "metric": metric, "value": float(share), "null": null, "null_std": None})
    return rows
