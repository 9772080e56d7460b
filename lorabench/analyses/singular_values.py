"""The singular values of ΔW themselves, beside those of a random update of the same form and norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.layer import LayerSVD


@dataclass(frozen=True, kw_only=True)
class SingularValues(Analysis):
    """Rows {index, value, null}: σ_index, counted from 1, descending; `null` is the mean of random updates."""

    needs: ClassVar[Literal["layer", "pair"]] = "layer"

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        import numpy as np

        from lorabench.linalg.nulls import null_spectra

        (layer,) = layers
        S = layer.svd.S.numpy()
        null = null_spectra(*layer.shape, layer.rank).mean(0)[: len(S)] * np.linalg.norm(S)
        return [{"index": np.arange(1, len(S) + 1, dtype=np.int32), "value": S, "null": null}]


EXAMPLE = SingularValues()
