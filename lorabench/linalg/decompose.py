"""Pure tensor mathematics of weight updates; no models, no files.

Shapes: M out features, N in features, r rank, R = min(M, N, r) singular values, K <= R kept vectors; d the
dimension of a space, p and q of its subspaces. Leading dimensions are a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

ENERGIES = (50, 90, 95, 99)
MIN_EIGENVALUES = 50
"""Fewest for a power-law fit: below, its exponent is biased (Clauset et al. 2009, arXiv 0706.1062, section 3.2)."""
LARGE_GRAM = 512
"""Size of a Gram matrix from which on it is worth leaving vectors out."""
_CHUNK_ROWS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class ThinSVD:
    """ΔW = U diag(S) Vh: `U` (..., M, K), `S` (..., R), `Vh` (..., K, N).

    `S` is in float64 and descending; it may hold more values than there are kept vectors (K <= R).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @cached_property
    def numerical_rank(self) -> int:
        """How many singular values stand above rounding; 0 for ΔW = 0. Not for batches.

        The cut is σ₁ · eps · √(M + N + 1), twice the round-off expected of an M × N matrix (Press et al., Numerical
        Recipes, section 2.6.2), with eps of the vectors' dtype. Directions beyond it are arbitrary.
        """
        size = self.U.shape[-2] + self.Vh.shape[-1]
        cut = self.S[0] * torch.finfo(self.U.dtype).eps * (size + 1) ** 0.5
        return int((cut < self.S).sum())

    def __repr__(self) -> str:
        largest = f", σ₁ = {float(self.S[0]):.4g}" if self.S.ndim == 1 and len(self.S) else ""
        shape = " × ".join(map(str, (*self.U.shape[:-1], self.Vh.shape[-1])))
        return f"ThinSVD({shape}, {self.S.shape[-1]} values, {self.U.shape[-1]} vectors{largest})"

    def top(self, k: int) -> ThinSVD:
        """All singular values, and the first `k` vectors of each side."""
        return ThinSVD(U=self.U[..., :k], S=self.S, Vh=self.Vh[..., :k, :])


def thin_svd(B: Tensor, A: Tensor | None = None, *, keep: int | None = None) -> ThinSVD:
    """The exact thin SVD of `B @ A`, never formed; of `B` itself, which is dense, without `A`.

    `keep` bounds the vectors, not the values. Vectors are float32, or float64 where the input is. Error of the values:
    about 6e-7 · σ₁ for float32 factors (QR in float32, r x r core in float64), 1e-8 · σ₁ for a dense float32 ΔW.
    Raises ValueError for NaN or Inf and for factors that do not fit.
    """
    if A is None:
        return _dense_svd(B, keep)
    if B.shape[-1] != A.shape[-2]:
        raise ValueError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not fit: B's columns must be A's rows")
    dtype = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
    Q_left, R_left = torch.linalg.qr(B.to(dtype))
    Q_right, R_right = torch.linalg.qr(A.to(dtype).mT)
    core = R_left.double() @ R_right.double().mT
    _check_finite(core)  # every entry of a factor goes into its column's norm, so this sees them all
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return ThinSVD(U=Q_left @ U[..., :keep].to(dtype), S=S, Vh=Vh[..., :keep, :].to(dtype) @ Q_right.mT)


def _dense_svd(W: Tensor, keep: int | None) -> ThinSVD:
    """Through the float64 Gram matrix of the shorter side, of which only the kept vectors are computed.

    Squaring loses what lies below 1e-8 · σ₁, which is below the rounding of float32 data; float64 data go
    through `svd`. QR of X V makes the other side orthonormal also where σ = 0.
    """
    if W.dtype == torch.float64:
        _check_finite(W)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return ThinSVD(U=U, S=S, Vh=Vh).top(S.shape[-1] if keep is None else keep)
    wide = W.shape[-2] < W.shape[-1]
    X = W.mT if wide else W  # (..., long, short)
    gram = sum(chunk.double().mT @ chunk.double() for chunk in X.split(_CHUNK_ROWS, dim=-2))
    _check_finite(gram)
    values, V = _eigh(gram, keep)
    Q, R = torch.linalg.qr(torch.cat([chunk.double() @ V for chunk in X.split(_CHUNK_ROWS, dim=-2)], dim=-2))
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    long, short = (Q * signs[..., None, :]).float(), V.float()
    S = values.clamp_min(0).sqrt()
    return ThinSVD(U=short, S=S, Vh=long.mT) if wide else ThinSVD(U=long, S=S, Vh=short.mT)


def _eigh(gram: Tensor, keep: int | None) -> tuple[Tensor, Tensor]:
    """All eigenvalues, descending, and the vectors of the `keep` largest."""
    size = gram.shape[-1]
    if gram.ndim > 2 or gram.device.type != "cpu" or keep is None or size < LARGE_GRAM or 8 * keep > size:
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(-1), vectors.flip(-1)[..., :keep]
    return _top_eigh(gram, keep)


def _top_eigh(gram: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """LAPACK's steps one by one, since none of its drivers gives all values and some vectors.

    Measured at 4096², 64 vectors, two cores: 3.7 s; `torch.linalg.eigh` 10 s.
    """
    from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack

    size = gram.shape[0]
    work = int(lapack.dsytrd_lwork(size, lower=1)[0])
    reflectors, diagonal, below, tau, _ = lapack.dsytrd(gram.numpy().T, lower=1, lwork=work)
    values = eigvalsh_tridiagonal(diagonal, below, lapack_driver="sterf")
    _, vectors = eigh_tridiagonal(diagonal, below, select="i", select_range=(size - keep, size - 1))
    last = np.asfortranarray(vectors[1:])  # the first row is left as it is by Q = H₁ H₂ …
    _, work, _ = lapack.dormqr("L", "N", reflectors[1:, :-1], tau, last, -1)
    vectors[1:], _, _ = lapack.dormqr("L", "N", reflectors[1:, :-1], tau, last, int(work[0]))
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: small matrices gain nothing from more, and sums keep their order on any machine.

    Measured on two cores that another process used too: 2.8 s with one thread, 72 s with two (OpenMP's barriers).
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _check_finite(matrix: Tensor) -> None:
    if not matrix.isfinite().all():
        raise ValueError("the update holds NaN or Inf, or overflows")


def spectrum_metrics(S: np.ndarray, numerical_rank: int | None = None) -> dict[str, float | None]:
    """The metrics of singular values `S` (R,), float64, descending; each by the paper that named it.

    `rank_q`: fewest values with q% of Σσ² (Biderman et al. 2024, arXiv 2405.09673). `effective_rank_entropy`:
    exp of the entropy of σ / Σσ (Roy and Vetterli 2007). `stable_rank`: Σσ² / σ₁² (Rudelson and Vershynin 2007).
    `participation_ratio`: (Σσ²)² / Σσ⁴. All of these lie in [1, R] and are None for ΔW = 0, whose norms are 0.
    `powerlaw_alpha`, `powerlaw_ks`: see `powerlaw_fit`, of the first `numerical_rank` values.
    """
    nuclear, energy = float(S.sum()), float(np.square(S).sum())
    norms = {"nuclear_norm": nuclear, "frobenius_norm": energy**0.5, "spectral_norm": float(S[0])}
    if energy == 0:
        shapes = [*(f"rank_{q}" for q in ENERGIES), "effective_rank_entropy", "stable_rank", "participation_ratio"]
        return dict.fromkeys([*shapes, "powerlaw_alpha", "powerlaw_ks"]) | norms
    relative = S / S[0]  # of order 1, so that no square underflows
    squares = np.square(relative)
    share = relative[relative > 0] / relative.sum()
    alpha, distance = powerlaw_fit(squares[:numerical_rank])
    return {
        **rank_energies(squares),
        "effective_rank_entropy": float(np.exp(-(share * np.log(share)).sum())),
        "stable_rank": float(squares.sum()),
        "participation_ratio": float(squares.sum() ** 2 / np.square(squares).sum()),
        "powerlaw_alpha": alpha,
        "powerlaw_ks": distance,
        **norms,
    }


def rank_energies(squares: np.ndarray) -> dict[str, float | None]:
    """`rank_q` from squared singular values, descending: the fewest that hold q% of their sum."""
    cumulative = squares.cumsum()
    wanted = np.array(ENERGIES) / 100 * cumulative[-1] * (1 - 1e-12)  # 9 of 10 equal values hold 90%, rounding or not
    ranks = np.searchsorted(cumulative, wanted) + 1
    return {f"rank_{q}": float(rank) for q, rank in zip(ENERGIES, ranks, strict=True)}


def powerlaw_fit(eigenvalues: np.ndarray) -> tuple[float | None, float | None]:
    """Exponent α of the tail density x^-α and the Kolmogorov-Smirnov distance of the fit.

    Maximum likelihood above x_min, with the x_min of the smallest distance (Clauset et al. 2009, arXiv 0706.1062,
    equation 3.1 and section 3.3), on the eigenvalues of ΔWᵀΔW as in Martin and Mahoney 2021 (WeightWatcher). α does
    not depend on their scale. (None, None) below MIN_EIGENVALUES, or when all are equal.
    """
    logs = np.log(np.sort(eigenvalues[eigenvalues > 0]))
    size = len(logs)
    if size < MIN_EIGENVALUES or logs[0] == logs[-1]:
        return None, None
    counts = np.arange(size, 0, -1)
    excess = logs[::-1].cumsum()[::-1] - counts * logs
    candidates = np.flatnonzero(excess[:-1] > 1e-12 * counts[:-1])
    rates = counts[candidates] / excess[candidates]  # α - 1
    distances = np.empty(len(candidates))
    for start in range(0, len(candidates), 64):  # a block of candidates at a time: memory 64 · R
        block = slice(start, start + 64)
        first, rate = candidates[block, None], rates[block, None]
        columns = np.arange(candidates[start], size)
        fitted = 1 - np.exp(-rate * np.maximum(logs[columns] - logs[first], 0))
        observed = (columns - first) / (size - first)
        distances[block] = np.where(columns >= first, np.abs(fitted - observed), 0).max(1)
    best = distances.argmin()
    return float(1 + rates[best]), float(distances[best])


def inner_product(B: Tensor, A: Tensor | None, C: Tensor, D: Tensor | None) -> float:
    """⟨B A, C D⟩_F in float64, for `B` (M, r), `A` (r, N), `C` (M, q), `D` (q, N); no product (M, N) is formed.

    Without `A`, `B` (M, N) is the matrix itself; `C` without `D` likewise.
    """
    if A is None and D is not None:
        return inner_product(C, D, B, None)
    pairs = zip(B.split(_CHUNK_ROWS), C.split(_CHUNK_ROWS), strict=True)
    chunks = ((b.double(), c.double()) for b, c in pairs)  # one at a time: a dense ΔW is large
    if A is None:
        return float(sum((b * c).sum() for b, c in chunks))
    cross = sum(b.mT @ c for b, c in chunks)
    return float((cross * (A.double() if D is None else A.double() @ D.double().mT)).sum())


def subspace_similarity(U: Tensor, V: Tensor) -> Tensor:
    """φ (p, q) in [0, 1]: φ[i-1, j-1] = ‖U[:, :i]ᵀ V[:, :j]‖_F² / min(i, j), for all i and j at once.

    `U` (d, p) and `V` (d, q) are orthonormal columns. 1: the smaller subspace lies in the larger; 0: orthogonal.
    Hu et al. 2021, arXiv 2106.09685, section 7.2, equation 4; Gaussian chance: `nulls.similarity_chance`.
    """
    overlap = (U.mT @ V).double().square_().cumsum(-1).cumsum(-2)
    i = torch.arange(1, U.shape[-1] + 1, device=U.device)[:, None]
    j = torch.arange(1, V.shape[-1] + 1, device=U.device)
    return (overlap / torch.minimum(i, j)).clamp_max_(1)


def similarities_of_all(U: Tensor) -> Tensor:
    """φ (n, n, p, p) between every two of n subspaces, `U` (n, d, p) of orthonormal columns, from one Gram matrix."""
    n, d, p = U.shape
    columns = U.permute(1, 0, 2).reshape(d, n * p)
    gram = (columns.mT @ columns).view(n, p, n, p).permute(0, 2, 1, 3)
    overlap = gram.double().square_().cumsum(-1).cumsum(-2)
    k = torch.arange(1, p + 1, device=U.device)
    return (overlap / torch.minimum(k[:, None], k)).clamp_max_(1)


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """The min(p, q) principal angles between the column spaces of `U` (d, p) and `V` (d, q), ascending, in radians.

    Orthonormal columns; in [0, π/2]; all 0 where the smaller space lies in the larger. Angles below π/4 come from
    their sine, since the cosine of a small angle is 1 to half of the digits (Björck and Golub 1973, section 3).
    """
    if U.shape[-1] < V.shape[-1]:
        U, V = V, U
    U, V = U.double(), V.double()
    cross = U.mT @ V
    _, cosines, Zh = torch.linalg.svd(cross, full_matrices=False)
    angles = cosines.clamp(0, 1).arccos()
    small = int((cosines.square() >= 0.5).sum())
    if small:
        Z = Zh[:small].mT
        sines = torch.linalg.svdvals(V @ Z - U @ (cross @ Z)).flip(-1)
        angles[:small] = sines.clamp(0, 1).arcsin()
    return angles


def energy_in_subspace(W: Tensor, Q: Tensor) -> float:
    """Share of ‖W‖_F² that lies in the column space of `Q`, in [0, 1]: ‖QᵀW‖_F² / ‖W‖_F².

    `W` (d, n), not zero, and `Q` (d, q), orthonormal columns. Of ΔW on its output side; on its input side `W` is ΔWᵀ.
    U diag(S) gives the same as U diag(S) Vh, which is never formed. Chance: q / d, whatever `W` is.
    """
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    inside, whole = (torch.linalg.vector_norm(X, dtype=torch.float64) for X in (Q.to(W.dtype).mT @ W, W))
    return min(1.0, float((inside / whole).square()))


def grassmann_distance(angles: Tensor) -> float:
    """√Σθ², the geodesic distance; between subspaces of two dimensions as in Ye and Lim 2016, SIMAX 37(3)."""
    return float(angles.square().sum().sqrt())
