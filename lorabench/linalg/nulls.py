"""What chance alone gives: the spectrum of a random update and the similarity of random subspaces.

Shapes: M out features, N in features, r rank, R = min(M, N, r) singular values; d the dimension of a space, p and
q of its subspaces. Draws have fixed seeds, so the same shapes always give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lorabench.linalg.decompose import spectrum_metrics

Traces = tuple[Any, Any]
"""Of a symmetric matrix: its trace, and the trace of its square."""

DRAWS = 16
SMALL = 1e-4
"""Relative variance of a square below which its root's is a quarter of that: a difference of gamma functions rounds."""


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


def over_draws(draws: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (...) of numbers (n, ...); one draw has no standard deviation: NaN."""
    draws = np.asarray(draws, float)
    return draws.mean(0), draws.std(0, ddof=1) if len(draws) > 1 else np.full(draws.shape[1:], np.nan)


@lru_cache(maxsize=4096)
def null_metrics(M: int, N: int, rank: int | None) -> dict[str, tuple[float | None, float | None]]:
    """`spectrum_metrics` of a random update of this form and of Frobenius norm 1: mean and standard deviation.

    Both of DRAWS draws, but for a dense update's mean: that of the law's one spectrum.
    """
    means, draws = (
        [spectrum_metrics(S) for S in spectra] for spectra in (null_spectra(M, N, rank), draws_of(M, N, rank))
    )
    return {
        key: (_of([draw[key] for draw in means], np.mean), _of([draw[key] for draw in draws], _std)) for key in draws[0]
    }


def _of(values: list[float | None], statistic: Callable[[Any], Any]) -> float | None:
    """None where a draw has no such number."""
    return None if None in values else float(statistic(values))


def _std(draws: Any) -> np.ndarray:
    return np.std(draws, axis=0, ddof=1)


def null_spectrum(M: int, N: int, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each singular value (R,) of a random update of Frobenius norm 1."""
    return null_spectra(M, N, rank).mean(0), _std(draws_of(M, N, rank))


@lru_cache(maxsize=256)
def null_spectra(M: int, N: int, rank: int | None) -> np.ndarray:
    """Singular values (draws, R) of random updates of Frobenius norm 1.

    With a rank: B A of i.i.d. Gaussian B (M, r) and A (r, N), in DRAWS draws. Without: i.i.d. Gaussian, the one
    spectrum of the Marchenko-Pastur law.
    """
    return draws_of(M, N, rank) if rank else _of_norm_1(np.sqrt(marchenko_pastur_quantiles(M, N))[None])


@lru_cache(maxsize=256)
def draws_of(M: int, N: int, rank: int | None) -> np.ndarray:
    """`null_spectra` (DRAWS, R), of a dense update too."""
    random = np.random.default_rng([M, N, rank or 0])
    if rank is None:
        return _of_norm_1(np.array([_gaussian_spectrum(random, *sorted((M, N))) for _ in range(DRAWS)]))
    products = [_gaussian_r_factor(random, M, rank) @ _gaussian_r_factor(random, N, rank).T for _ in range(DRAWS)]
    return _of_norm_1(np.array([np.linalg.svd(product, compute_uv=False) for product in products]))


def _of_norm_1(spectra: np.ndarray) -> np.ndarray:
    spectra = spectra / np.linalg.norm(spectra, axis=1, keepdims=True)
    spectra.setflags(write=False)
    return spectra


def _gaussian_spectrum(random: np.random.Generator, short: int, long: int) -> np.ndarray:
    """Singular values (short,), descending, of an i.i.d. Gaussian matrix (long, short), without the matrix.

    Reflections from both sides leave it bidiagonal: χ with long, long - 1, … degrees of freedom on the diagonal, with
    short - 1, …, 1 beside it, all independent (Dumitriu and Edelman 2002, section III). 0.2 s of 4096 x 4096.
    """
    from scipy.linalg import eigvalsh_tridiagonal

    diagonal = np.sqrt(random.chisquare(long - np.arange(short)))
    beside = np.sqrt(random.chisquare(np.arange(short - 1, 0, -1)))
    squares = np.square(diagonal)
    squares[1:] += np.square(beside)
    values = eigvalsh_tridiagonal(squares, diagonal[:-1] * beside, lapack_driver="sterf")
    return np.sqrt(np.maximum(values[::-1], 0))


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
    angles = _angle_draws(*sorted((p, q)), d)
    return Simulated.of(angles), Simulated.of(np.sqrt(np.square(angles).sum(1)))


def sine_chance(p: int, q: int, d: int) -> Simulated:
    """The sines (min(p, q),) of the angles of `angle_chance`, from the same draws."""
    return Simulated.of(np.sin(_angle_draws(*sorted((p, q)), d)))


@lru_cache(maxsize=1024)
def _angle_draws(p: int, q: int, d: int) -> np.ndarray:
    """(draws, p) for p <= q."""
    random = np.random.default_rng([p, q, d])
    draws = max(DRAWS, min(16 * DRAWS, 2**14 // (q * (p + q))))  # few angles vary more, and cost less
    return np.array([_random_angles(random, p, q, d) for _ in range(draws)])


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


def projection_chance(S: np.ndarray, r: int, M: int, N: int) -> tuple[float, float | None]:
    """Standard deviations of ‖Uᵀ W V‖_F and of 1 / ‖Uᵀ W V‖_F, of random orthonormal U (M, r) and V (N, r).

    `S` (min(M, N),): singular values of W (M, N), not all 0. With Q = V Vᵀ the square is tr(U Uᵀ W Q Wᵀ); its mean is
    r² ‖W‖² / (M N), and its variance that over U given V (`trace_chance`), on average over V, and that over V of its
    mean over U. From E Q⊗Q both are exact; the square is then taken to have a gamma distribution. None for the inverse
    where that has no variance: near W's own directions it grows without bound.
    """
    energy, fourth = float(np.square(S).sum()), float((S**4).sum())
    b = r * (N - r) / (N * max(N - 1, 1) * (N + 2))  # E Q_ij Q_kl = a δ_ij δ_kl + b (δ_ik δ_jl + δ_il δ_jk)
    a = (r**2 - 2 * b * N) / N**2
    squared_trace = a * energy**2 + 2 * b * fourth  # E tr²(W Q Wᵀ)
    trace_of_square = (a + b) * fourth + b * energy**2  # E tr (W Q Wᵀ)²
    over_U = 2 * (M * trace_of_square - squared_trace) * r * (M - r) / (M**2 * max(M - 1, 1) * (M + 2))
    over_V = (r / M) ** 2 * (squared_trace - (r * energy / N) ** 2)
    mean = r**2 * energy / (M * N)
    spread = max((over_U + over_V) / mean**2, 0.0)
    if spread < SMALL:
        return (mean * spread) ** 0.5 / 2, (spread / mean) ** 0.5 / 2
    shape = 1 / spread
    root = float(_mean_root(np.array(spread)))
    inverse = shape / (shape - 1) - (root * shape / (shape - 0.5)) ** 2 if spread < 1 else None
    return (mean * (1 - root**2)) ** 0.5, None if inverse is None else (inverse / mean) ** 0.5


def _mean_root(spread: np.ndarray) -> np.ndarray:
    """E √X of a gamma distribution with mean 1 and this variance."""
    from scipy.special import gammaln

    shape = 1 / np.maximum(spread, 1e-9)
    return np.exp(gammaln(shape + 0.5) - gammaln(shape)) / np.sqrt(shape)
