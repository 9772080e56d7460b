"""What chance alone gives: the spectrum of a random update and the similarity of random subspaces.

Shapes: M out features, N in features, r rank, R = min(M, N, r) singular values; d the dimension of a space, p and
q of its subspaces. Draws have fixed seeds, so the same shapes always give the same numbers.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lorabench.linalg.decompose import spectrum_metrics

DRAWS = 16
_PERMUTED_ENTRIES = 2**22
"""Held at a time by the permutation test: 16 MiB of float32."""


@lru_cache(maxsize=4096)
def null_metrics(M: int, N: int, rank: int | None) -> dict[str, float | None]:
    """`spectrum_metrics` of a random update of this form and of Frobenius norm 1: the mean over draws."""
    draws = [spectrum_metrics(S) for S in null_spectra(M, N, rank)]
    return {key: None if draws[0][key] is None else float(np.mean([d[key] for d in draws])) for key in draws[0]}


@lru_cache(maxsize=256)
def null_spectra(M: int, N: int, rank: int | None) -> np.ndarray:
    """Singular values (draws, R) of random updates of Frobenius norm 1.

    With a rank: B A of i.i.d. Gaussian B (M, r) and A (r, N), in DRAWS draws. Without: i.i.d. Gaussian, the one
    spectrum of the Marchenko-Pastur law.
    """
    if rank is None:
        spectra = np.sqrt(marchenko_pastur_quantiles(M, N))[None]
    else:
        random = np.random.default_rng([M, N, rank])
        products = [_gaussian_r_factor(random, M, rank) @ _gaussian_r_factor(random, N, rank).T for _ in range(DRAWS)]
        spectra = np.array([np.linalg.svd(product, compute_uv=False) for product in products])
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)
    spectra.setflags(write=False)
    return spectra


def marchenko_pastur_quantiles(M: int, N: int) -> np.ndarray:
    """Eigenvalues (min(M, N),), descending, of X Xᵀ / max(M, N) for i.i.d. standard normal X (M, N), large-size limit.

    With y = min / max and x = 1 + y + 2√y cos t the density is 2 sin² t / (π x) dt on [0, π]
    (Marchenko and Pastur 1967); its integral from 0 is the share of larger eigenvalues.
    """
    short, long = sorted((M, N))
    y = short / long
    # Near t = π the density changes over a width of 1 - √y, so the grid is finer there.
    t = np.pi * (1 - (1 - np.linspace(0, 1, 40_001)) ** 2)
    x = (1 - np.sqrt(y)) ** 2 + 4 * np.sqrt(y) * np.cos(t / 2) ** 2
    with np.errstate(invalid="ignore"):
        density = 2 * np.sin(t) ** 2 / (np.pi * x)
    density = np.nan_to_num(density, nan=2 / np.pi)  # 0 / 0 at the end of the square case
    larger = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))])
    return np.interp((np.arange(short) + 0.5) / short, larger / larger[-1], x)


def _gaussian_r_factor(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """R (min(rows, columns), columns) of the QR of an i.i.d. Gaussian matrix, without the matrix.

    Bartlett 1933: above the diagonal standard normal, on it χ with rows, rows - 1, … degrees of freedom.
    """
    size = min(rows, columns)
    R = np.triu(random.standard_normal((size, columns)), 1)
    R[np.arange(size), np.arange(size)] = np.sqrt(random.chisquare(rows - np.arange(size)))
    return R


def similarity_chance(p: int, q: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (p, q) of φ(i, j) between independent uniformly random subspaces of R^d.

    For T = ‖UᵀV‖_F²: E T = i j / d, so E φ = max(i, j) / d; Var T = 2 i j (d-i)(d-j) / (d² (d-1)(d+2)), the variance
    of the trace of two random projections (i = 1: T is Beta(j/2, (d-j)/2)).
    """
    i, j = np.arange(1, p + 1)[:, None], np.arange(1, q + 1)[None, :]
    mean = np.maximum(i, j) / d
    variance = 2.0 * i * j * (d - i) * (d - j) / (d**2 * max(d - 1, 1) * (d + 2))
    return mean, np.sqrt(variance) / np.minimum(i, j)


def permutation_p_value(U: Tensor, V: Tensor, draws: int = 199, seed: int = 0) -> float:
    """Permutation test of whether the column spaces of `U` (d, p) and `V` (d, q) share directions, one-sided.

    Null hypothesis: the coordinates of one space have nothing to do with those of the other. The rows of `V` are
    permuted at random, which keeps the distribution of its entries: a few coordinates that are large in both, each
    for itself, make large overlaps likely, and are no evidence here. With T = ‖UᵀPV‖_F², p = (1 + #{T_draw ≥ T}) /
    (draws + 1), in [1 / (draws + 1), 1] (Phipson and Smyth 2010, SAGMB 9(1), equation 2).
    """
    observed = (U.mT @ V).square().sum()
    orders = _permutations(len(V), draws, seed)
    at_a_time = max(1, _PERMUTED_ENTRIES // V.numel())
    rows = V.contiguous()  # whole rows are copied, by `index_select`: a third of the time of indexing columns
    permuted = (rows.index_select(0, some.flatten()).view(-1, *rows.shape) for some in orders.split(at_a_time))
    drawn = torch.cat([(U.mT @ each).square().sum((-2, -1)) for each in permuted])
    as_large = drawn >= observed * (1 - 1e-5)  # ties count: of the whole space all draws are equal but for rounding
    return (1 + int(as_large.sum())) / (draws + 1)


@lru_cache(maxsize=4)
def _permutations(d: int, draws: int, seed: int) -> Tensor:
    """(draws, d), the same for all layers of a width: each layer's test stands for itself."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(draws, d, generator=generator, dtype=torch.float64).argsort(1)


@lru_cache(maxsize=1024)
def angle_chance(p: int, q: int, d: int) -> tuple[np.ndarray, float]:
    """Mean principal angles (min(p, q),), ascending, and mean Grassmann distance of random subspaces of R^d."""
    p, q = sorted((p, q))
    random = np.random.default_rng([p, q, d])
    draws = max(DRAWS, min(16 * DRAWS, 2**14 // (q * (p + q))))  # few angles vary more, and cost less
    angles = np.array([_random_angles(random, p, q, d) for _ in range(draws)])
    return angles.mean(0), float(np.sqrt(np.square(angles).sum(1)).mean())


def _random_angles(random: np.random.Generator, p: int, q: int, d: int) -> np.ndarray:
    """Angles between a random p-space and the span of the first q axes: only q of its d rows need be drawn."""
    top = random.standard_normal((q, p))
    rest = _gaussian_r_factor(random, d - q, p)
    Q, _ = np.linalg.qr(np.concatenate([top, rest]))
    return np.arccos(np.clip(np.linalg.svd(Q[:q], compute_uv=False), 0, 1))


def response_chance(S: np.ndarray, M: int, N: int, counts: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, for each of `counts`, of the root-mean-square response of a random update.

    The update is U diag(S) Vᵀ (M, N) with Haar-random U and V. Its response to a direction is ‖ΔW v_i‖ for `input`,
    ‖ΔWᵀ u_i‖ for `output`, |u_iᵀ ΔW v_i| for `both`; the mean square is over so many fixed orthonormal directions.
    Mean and variance of that mean square are exact, from the second and fourth moments of an orthogonal matrix; for
    its root it is taken to have a gamma distribution, for `both` to be the product of two: right to 2% from 20
    dimensions on.
    """
    n, energy, fourth = np.asarray(counts, float), float(np.square(S).sum()), float((S**4).sum())
    if side == "both":
        units = M * (M + 2.0) * N * (N + 2.0)
        own = 3 * (2 * fourth + energy**2) / units
        cross = ((M + 1) * (N + 1) + 2) * energy**2 + (2 - 2 * (M + N + 2)) * fourth
        cross /= units * max(M - 1, 1) * max(N - 1, 1)
        mean = energy / (M * N)
        spread = (own / n + (1 - 1 / n) * cross) / mean**2 - 1  # of the mean square, relative
        factors = [2 / n, (1 + spread) / (1 + 2 / n) - 1]
    else:
        d = N if side == "input" else M
        mean = energy / d
        factors = [2 * (d - n) * (d * fourth / energy**2 - 1) / (n * max(d - 1, 1) * (d + 2))]
    root = mean**0.5 * np.prod([_mean_root(factor) for factor in factors], axis=0)
    return root, np.sqrt(np.maximum(mean - np.square(root), 0.0))


def _mean_root(spread: np.ndarray) -> np.ndarray:
    """E √X of a gamma distribution with mean 1 and this variance."""
    from scipy.special import gammaln

    shape = 1 / np.maximum(spread, 1e-9)
    return np.exp(gammaln(shape + 0.5) - gammaln(shape)) / np.sqrt(shape)
