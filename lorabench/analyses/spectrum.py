"""How the energy of ΔW spreads over its singular values: ranks, norms, power-law tail, beside a random update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.layer import LayerSVD

ROUNDING = (3 / 4 / math.log(4) / 12) ** 0.5
"""Root-mean-square error of rounding numbers, relative to their own root-mean-square and to eps: 0.212.

w = m · 2^e with m in [1, 2) lies between floats eps · 2^e apart, so its error is uniform with variance
(eps · w / m)² / 12. For weights on no particular scale ln m is uniform: E 1 / m² = (3 / 4) / ln 4 = 0.541.
"""


@dataclass(frozen=True, kw_only=True)
class Spectrum(Analysis):
    """Rows {metric, value, null, null_std}: `null` is of a random update of the same form and Frobenius norm.

    That is i.i.d. Gaussian for a dense ΔW (Marchenko-Pastur law), B A of Gaussian factors for a factored one, of which
    16 are drawn. It is None for metrics that the form does not fix. `null_std` is the standard deviation of one such
    update, from 16 draws of either; the mean of dense ones is that of large matrices, up to 1.4 of it off.

    `noise_floor`² is the share of Σσ² that is rounding alone: a rank_q whose 1 - q it reaches counts noise.
    """

    needs: ClassVar[Literal["layer", "pair"]] = "layer"
    version: ClassVar[int] = 3
    metrics: ClassVar[dict[str, str]] = {
        "rank_50": "fewest singular values with 50% of the sum of squares",
        "rank_90": "fewest singular values with 90% of the sum of squares",
        "rank_95": "fewest singular values with 95% of the sum of squares",
        "rank_99": "fewest singular values with 99% of the sum of squares",
        "effective_rank_entropy": "exp of the entropy of the singular values over their sum",
        "stable_rank": "squared Frobenius norm over squared spectral norm",
        "participation_ratio": "(sum of σ²)² over the sum of σ⁴",
        "nuclear_norm": "sum of the singular values",
        "frobenius_norm": "root of the sum of squared singular values",
        "spectral_norm": "largest singular value",
        "relative_norm": "Frobenius norm of ΔW over that of the base weight",
        "powerlaw_alpha": "tail exponent of the eigenvalues of ΔWᵀΔW",
        "powerlaw_ks": "Kolmogorov-Smirnov distance of the power-law fit",
        "noise_floor": "dense ΔW: norm of rounding W once over that of ΔW; its square is noise's share of Σσ²",
    }

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        from lorabench.linalg.decompose import spectrum_metrics
        from lorabench.linalg.nulls import null_metrics

        (layer,) = layers
        values = spectrum_metrics(layer.svd.S.numpy(), layer.svd.numerical_rank)
        norm = float(layer.svd.S.norm())
        nulls = {
            key: [_scaled(key, number, norm) for number in numbers]
            for key, numbers in null_metrics(*layer.shape, layer.rank).items()
        }
        if layer.base_norm:
            values["relative_norm"] = norm / layer.base_norm
        if layer.precision and layer.base_norm and norm:
            values["noise_floor"] = rounding_norm(layer.base_norm, layer.precision) / norm
        rows = [(key, value, *nulls.get(key, (None, None))) for key, value in values.items()]
        return [dict(zip(("metric", "value", "null", "null_std"), row, strict=True)) for row in rows]


def _scaled(key: str, null: float | None, norm: float) -> float | None:
    """The null model's metric at this Frobenius norm; it was made with norm 1."""
    if key == "frobenius_norm" or null is None:
        return None
    return null * norm if key in ("nuclear_norm", "spectral_norm") else null


def rounding_norm(norm: float, precision: str) -> float:
    """Frobenius norm of the error of rounding a matrix of this norm once to `precision`.

    Within 1% for Gaussian entries, 12% for uniform ones, which lie about a power of two (`ROUNDING`).
    A lower bound of the noise in a trained weight, which is rounded at every step: at most √steps times more.
    """
    import torch

    return ROUNDING * torch.finfo(getattr(torch, precision)).eps * norm


EXAMPLE = Spectrum()
