"""One layer's ΔW as analyses see it: a thin SVD with its name.

Shapes: M out features, N in features, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from lorabench.linalg.decompose import ThinSVD
from lorabench.updates.gradients import Gradients
from lorabench.updates.update import Update
from lorabench.updates.weightfile import flat_name

_BLOCK = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_SHARED_NAMES = ("dense", "c_proj")
_PLACE = re.compile(r"(?:^|\.)(?P<place>down|mid|up)_block|(?:^|\.)(?P<single>single)_transformer_blocks\.")
_INSIDE = re.compile(r"(?:^|\.)(?P<part>attn\d|ff(?:_context)?)[._](?P<leaf>(?:to|add|net)[._].+)$")
"""Of a denoiser: which blocks, and self-attention (attn1), cross-attention (attn2) or feed-forward in them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerSVD:
    """The seam that every analysis consumes: ΔW of one matrix, whatever made it.

    `rank` is the number of columns of the factors, None for a dense ΔW; `base_norm` (‖W0‖_F), `precision`, `scale`
    and `scale_source` are as in `Update`. `update` is ΔW itself, where it was kept (`keep = "svd:K"` keeps its
    singular vectors alone); `step` the optimizer step after which it stood, None for the end of training.
    """

    parameter: str
    svd: ThinSVD
    rank: int | None = None
    base_norm: float | None = None
    precision: str | None = None
    scale: float | None = None
    scale_source: str | None = None
    update: Update | None = None
    step: int | None = None
    drift: Mapping[str, float] = field(default_factory=dict)
    """What its run has measured of it on data: `RunRecord.drift`."""
    movement: Mapping[str, float] = field(default_factory=dict)
    """How far its factors have moved: `RunRecord.movement`."""

    gradients: Gradients = field(default_factory=dict)
    """The loss's at W0, where its run keeps snapshots: `updates/gradients.py`."""

    @property
    def layer(self) -> str:
        """Name of the module."""
        return self.parameter.removesuffix(".weight")

    @property
    def kind(self) -> str:
        """Last module name, `q_proj`: what layers of one role share over the blocks."""
        return layer_kind(self.layer)

    @property
    def depth(self) -> int | None:
        """Index of the layer's block; None outside the blocks."""
        return _depth(self.layer)

    @property
    def is_complete(self) -> bool:
        """Whether there are vectors for every singular value above rounding."""
        return self.svd.U.shape[-1] >= self.svd.numerical_rank

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        return self.svd.U.shape[0], self.svd.Vh.shape[1]


@lru_cache(maxsize=4096)
def _depth(layer: str) -> int | None:
    block = _BLOCK.search(_dotted(layer))
    return int(block[1]) if block else None


@lru_cache(maxsize=4096)
def layer_kind(layer: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `q_proj`.

    Names that BERT and GPT-2 give to several layers of a block keep their path in it: `attn.c_proj`, `mlp.c_proj`.
    A number alone says nothing of its kind: `to_out.0` in diffusion models. Of kohya's names, which have `_` for `.`,
    it is all that follows the last number: `proj_in`. A part keeps its mark: `c_proj[q]`; the number of an expert
    (`gate_up_proj[3]`) is none. A denoiser's says where it is, and in what: `down.attn2.to_k`, `mid.conv1`,
    `single.to_q`.
    """
    layer = re.sub(r"\[\d+\]$", "", _dotted(layer))
    place, inside = _PLACE.search(layer), _INSIDE.search(layer)
    own = f"{inside['part']}.{inside['leaf']}" if inside else _own_kind(layer)
    return f"{place['place'] or place['single']}.{own}" if place else own


def _own_kind(layer: str) -> str:
    last = layer.rpartition(".")[2]
    stem = last.partition("[")[0]
    if stem.isdigit():
        return ".".join(layer.split(".")[-2:])
    block = _BLOCK.search(layer)
    return layer[block.end() :] if stem in _SHARED_NAMES and block else last


def _dotted(layer: str) -> str:
    """A name of kohya's with points around its numbers, and without its prefix; any other as it is."""
    flat = flat_name(f"{layer}.weight")
    return layer if flat is None else re.sub(r"(\.\d+)_", r"\1.", re.sub(r"_(\d+)(?=_|\[|$)", r".\1", flat))
