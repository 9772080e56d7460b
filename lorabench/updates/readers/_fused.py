"""Fused linears of diffusion models, split by rows: each of its blocks is a layer of its own, unless the base is known
and has them as one weight.

`…attn_qkv` (also `attn.qkv`, Z-Image's `attention_qkv`) is q, k and v in three equal parts. Flux's
`single_blocks_N_linear1` is q, k and v of the hidden size, which is its number of in features (3072), and `mlp`, the
rest (12288).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from lorabench.config.decode import InputError
from lorabench.updates.readers._factors import Layer
from lorabench.updates.weightfile import WeightFiles

_FUSED = re.compile(r"(?:attn|attention)[_.]qkv$|single_blocks[_.]\d+[_.]linear1$")


def split_rows(layer: Layer, module: str, base: WeightFiles | None) -> Iterator[Layer]:
    """`MODULE[q].weight` and so on; any other layer as it is."""
    if not _FUSED.search(module) or (base is not None and base.find(f"{module}.weight")):
        yield layer
        return
    M, N = layer.shape
    with_mlp = module.endswith("linear1")
    width = N if with_mlp else M // 3
    if 3 * width > M or (M % 3 and not with_mlp):
        raise InputError(f"{layer.tensors.file}: {module}: {M} rows cannot be split into q, k and v of {width} each")
    starts = {"q": 0, "k": width, "v": 2 * width} | ({"mlp": 3 * width} if 3 * width < M else {})
    for part, start in starts.items():
        stop = M if part == "mlp" else start + width
        yield replace(layer, parameter=f"{module}[{part}].weight", rows=range(start, stop))
