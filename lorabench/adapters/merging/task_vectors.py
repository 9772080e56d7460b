"""Merges of the updates ΔW themselves, beside PEFT's combinations: each by its name, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lorabench.adapters.merging.bodies import Body
from lorabench.adapters.merging.entrywise import Layers, dare, ties
from lorabench.adapters.merging.spectral import aligned, iso_c, tsv
from lorabench.linalg.decompose import one_thread, thin_svd
from lorabench.linalg.joint import Pair


def merged_updates(layers: Layers, body: Body) -> Iterator[tuple[str, Pair]]:
    """Each layer's factors (M, k) and (k, N) of the merge, scale 1; `layers` without the weights, which are `body`'s.

    With `body.rank` the best approximation of that rank; otherwise k is the merge's own rank, min(M, N) where it is
    dense: its factors are then ΔW and the identity.
    """
    weights = body.weights or ()
    weighted = {
        name: [(weight * B, A) for weight, (B, A) in zip(weights, pairs, strict=True)] for name, pairs in layers.items()
    }
    with one_thread():
        for name, pair in _METHODS[body.by](weighted, body):
            yield name, _factors(pair) if body.rank is None else _cut(*pair, body.rank)


Found = Iterator[tuple[str, tuple[Tensor, Tensor | None]]]


def _mean(layers: Layers, body: Body) -> Found:
    """Σ w ΔW / Σ w, as the factors side by side."""
    total = sum(body.weights or ())
    for name, pairs in layers.items():
        yield name, (torch.cat([B for B, _ in pairs], 1) / total, torch.cat([A for _, A in pairs]))


def _iso_c(layers: Layers, body: Body) -> Found:
    return ((name, iso_c(pairs)) for name, pairs in layers.items())


def _tsv(layers: Layers, body: Body) -> Found:
    return ((name, tsv(pairs)) for name, pairs in layers.items())


def _knots_ties(layers: Layers, body: Body) -> Found:
    """TIES on Σ V_tᵀ, in the basis of KnOTS: of the rank of [ΔW_1 … ΔW_T]."""
    bases = {name: aligned(pairs) for name, pairs in layers.items()}
    rotated = {name: pairs for name, (_, pairs) in bases.items()}
    return ((name, (bases[name][0], rows)) for name, rows in ties(rotated, body.density or 1.0))


def _delta_ties(layers: Layers, body: Body) -> Found:
    return ((name, (W, None)) for name, W in ties(layers, body.density or 1.0))


def _delta_dare(layers: Layers, body: Body) -> Found:
    return ((name, (W, None)) for name, W in dare(layers, body.density or 1.0, body.seed or 0))


_METHODS: dict[str, Callable[[Layers, Body], Found]] = {
    "mean": _mean,
    "iso_c": _iso_c,
    "tsv": _tsv,
    "knots_ties": _knots_ties,
    "delta_ties": _delta_ties,
    "delta_dare": _delta_dare,
}


def _factors(pair: tuple[Tensor, Tensor | None]) -> Pair:
    B, A = pair
    if A is not None:
        return B, A
    M, N = B.shape
    return (torch.eye(M), B) if M < N else (B, torch.eye(N))


def _cut(B: Tensor, A: Tensor | None, rank: int) -> Pair:
    svd = thin_svd(B, A, keep=rank)
    kept = svd.U.shape[1]
    return svd.U * svd.S[:kept].to(svd.U), svd.Vh
