"""The singular values of ΔW themselves, beside those of a random update of the same form and norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.layer import LayerSVD


@dataclass(frozen=True, kw_only=True)
class SingularValues(Analysis):
    """Rows {index, value, null, null_std}: σ_index, counted from 1, descending; beside it that of random updates of
    this form and norm, mean and standard deviation (see `spectrum`)."""

    needs: ClassVar[Literal["layer", "pair"]] = "layer"
    version: ClassVar[int] = 2

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        import numpy as np

        from lorabench.linalg.nulls import null_spectrum

        (layer,) = layers
        S = layer.svd.S.numpy()
        null, std = (each[: len(S)] * np.linalg.norm(S) for each in null_spectrum(*layer.shape, layer.rank))
        return [{"index": np.arange(1, len(S) + 1, dtype=np.int32), "value": S, "null": null, "null_std": std}]


EXAMPLE = SingularValues()
