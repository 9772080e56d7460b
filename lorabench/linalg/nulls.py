"""What chance alone gives: the spectrum of a random update and the similarity of random subspaces.

Shapes: M out features, N in features, r rank, R = min(M, N, r) singular values; d the dimension of a space, p and
q of its subspaces. Draws have fixed seeds, so the same shapes always give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lorabench.linalg.decompose import spectrum_metrics

Traces = tuple[Any, Any]
"""Of a symmetric matrix: its trace, and the trace of its square."""

DRAWS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulated:
    """A number by chance, from random draws: its mean and standard deviation, and the standard error of that mean."""

    mean: np.ndarray
    std: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, draws: np.ndarray) -> Simulated:
        """`draws` (n, ...), n > 1."""
        std = draws.std(0, ddof=1)
        return cls(mean=draws.mean(0), std=std, error=std / len(draws) ** 0.5)


@lru_cache(maxsize=4096)
def null_metrics(M: int, N: int, rank: int | None) -> dict[str, tuple[float | None, float | None]]:
    """`spectrum_metrics` of a random update of this form and of Frobenius norm 1: mean and standard deviation.

    Over the draws; a dense update's law is one spectrum, and its metrics have no standard deviation (None).
    """
    draws = [spectrum_metrics(S) for S in null_spectra(M, N, rank)]
    return {key: _mean_and_std([draw[key] for draw in draws]) for key in draws[0]}


def _mean_and_std(values: list[float | None]) -> tuple[float | None, float | None]:
    numbers = np.array([value for value in values if value is not None])
    if len(numbers) < len(values):
        return None, None
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None


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


def trace_chance(A: Traces, B: Traces, d: int) -> tuple[Any, Any]:
    """Mean and standard deviation of tr(A Q B Qᵀ) for a uniformly random orthogonal Q (d, d).

    Of symmetric A and B (d, d) their trace and that of their square, numbers or arrays. The mean is tr A tr B / d.
    Their parts without trace lie in an irreducible representation of the rotations of dimension (d - 1)(d + 2) / 2, so
    the variance is 2 (d tr A² - tr² A)(d tr B² - tr² B) / (d² (d - 1)(d + 2)), exactly.
    """
    spread = (d * A[1] - np.square(A[0])) * (d * B[1] - np.square(B[0]))
    variance = 2.0 * spread / (d**2 * max(d - 1, 1) * (d + 2))
    return A[0] * B[0] / d, np.sqrt(np.maximum(variance, 0.0))


def similarity_chance(p: int, q: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (p, q) of φ(i, j) between independent uniformly random subspaces of R^d.

    φ min(i, j) is the trace of the product of two random projections, so E φ = max(i, j) / d (for i = 1 it is
    Beta(j/2, (d-j)/2)).
    """
    i, j = np.arange(1.0, p + 1)[:, None], np.arange(1.0, q + 1)[None, :]
    mean, std = trace_chance((i, i), (j, j), d)
    return mean / np.minimum(i, j), std / np.minimum(i, j)


def energy_chance(S: np.ndarray, q: int, d: int) -> tuple[float, float]:
    """Mean q / d and standard deviation of the share of ‖ΔW‖² in a random q-dimensional subspace of R^d, one side's
    space; `S` (R,) all singular values of ΔW, not all 0."""
    shares = np.square(S / S.max())
    shares /= shares.sum()
    mean, std = trace_chance((1.0, float(np.square(shares).sum())), (q, q), d)
    return float(mean), float(std)


def cosine_chance(d: int) -> tuple[float, float]:
    """Mean Γ(d/2) / (√π Γ((d+1)/2)) and standard deviation of |cos| between two random directions of R^d."""
    from scipy.special import gammaln

    mean = float(np.exp(gammaln(d / 2) - gammaln((d + 1) / 2)) / np.pi**0.5)
    return mean, max(0.0, 1 / d - mean**2) ** 0.5


@lru_cache(maxsize=1024)
def angle_chance(p: int, q: int, d: int) -> tuple[Simulated, Simulated]:
    """Principal angles (min(p, q),), ascending, and Grassmann distance of random subspaces of R^d, radians.

    From 16 to 256 draws.
    """
    p, q = sorted((p, q))
    random = np.random.default_rng([p, q, d])
    draws = max(DRAWS, min(16 * DRAWS, 2**14 // (q * (p + q))))  # few angles vary more, and cost less
    angles = np.array([_random_angles(random, p, q, d) for _ in range(draws)])
    return Simulated.of(angles), Simulated.of(np.sqrt(np.square(angles).sum(1)))


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
