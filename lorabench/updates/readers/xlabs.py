"""XLabs (x-flux): LoRA of Flux in its attention processors, one file, no configuration.

`double_blocks.N.processor.qkv_lora1` is on q, k and v of the image and `qkv_lora2` on those of the text, `proj_lora1`
and `proj_lora2` on the projections behind them; `single_blocks.N.processor` has one `qkv_lora` and one `proj_lora`.
ΔW = s up down, and α is not in the file: `--alpha`, else s = 1, as x-flux and diffusers have it. Each of q, k and v is
a layer of its own, and modules have diffusers' names. Source: x-flux, `src/flux/modules/layers.py`; diffusers,
`loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from lorabench.config.decode import InputError
from lorabench.updates.readers._entry import Found, Source, Tensors
from lorabench.updates.readers._factors import Layer, adapter_file, by_convention, found, rank_of

ASSUMED = "no alpha in the file: α = r is assumed, so that the scale is 1 (--alpha tells another)"
_DOWN = re.compile(
    r"(?P<stem>(?P<kind>double|single)_blocks\.(?P<block>\d+)\.processor\.(?P<leaf>(?:qkv|proj)_lora[12]?))\.down\.weight"
)
_PLACES = {
    ("double", "qkv_lora1"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("double", "qkv_lora2"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("double", "proj_lora1"): ("attn.to_out.0",),
    ("double", "proj_lora2"): ("attn.to_add_out",),
    ("single", "qkv_lora"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("single", "proj_lora"): ("proj_out",),
}
_BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}


def find(source: Source) -> Found | None:
    """The adapter of one file with such names; None where there is none."""
    tensors = adapter_file(source, lambda tensors: any(True for _ in _modules(tensors)))
    if tensors is None:
        return None
    modules = list(_modules(tensors))
    layers = [layer for match in modules for layer in _layers(tensors, match, source)]
    used = {f"{match['stem']}.{side}.weight" for match in modules for side in ("up", "down")}
    return found("xlabs", layers, assumed=ASSUMED, left_out=set(tensors.names) - used)


def _modules(tensors: Tensors) -> Iterator[re.Match[str]]:
    matches = map(_DOWN.fullmatch, tensors.names)
    return (match for match in matches if match and (match["kind"], match["leaf"]) in _PLACES)


def _layers(tensors: Tensors, match: re.Match[str], source: Source) -> Iterator[Layer]:
    down, places = match[0], _PLACES[match["kind"], match["leaf"]]
    block = f"transformer.{_BLOCKS[match['kind']]}.{match['block']}"
    whole = Layer(
        tensors=tensors,
        parameter=match["stem"],
        names={"B": f"{match['stem']}.up.weight", "A": down},
        scale=by_convention(source, rank_of(tensors, down)),
    )
    rows = whole.shape[0]
    if rows % len(places):
        raise InputError(f"{tensors.file}: {match['stem']}: {rows} rows cannot be split into {len(places)} equal parts")
    size = rows // len(places)
    for index, place in enumerate(places):
        yield replace(whole, parameter=f"{block}.{place}.weight", rows=range(index * size, (index + 1) * size))
