"""What files call weights that a library's models call otherwise: diffusers' Flux and Z-Image, transformers' ViTs.

Flux and Z-Image: adapters name modules by their first code (also kohya's, with `_` for `.`), with the block of rows in
brackets where it is fused: `double_blocks_0_img_attn_qkv[q]`. Source: diffusers, `loaders/lora_conversion_utils.py`.

ViT, DeiT, DINOv2 and Swin: transformers 5 loads and saves files with the names that its models had before. Source:
transformers 5.23, `conversion_mapping.py`.
"""

from __future__ import annotations

import itertools
import re

_PREFIX = r"(?:lora_unet_|lora_transformer_|transformer\.)?"
_FLUX = re.compile(
    rf"{_PREFIX}(?P<kind>double|single)_blocks[._](?P<block>\d+)[._](?P<leaf>[^\[]+(?:\[\w+\])?)\.weight"
)
_FUSED = re.compile(r"(?P<stem>.+(?:attn|attention)[._])qkv\[(?P<part>[qkv])\]\.weight")
_LEAVES = {
    "double": {
        **{f"img_attn_qkv[{x}]": f"attn.to_{x}" for x in "qkv"},
        **{f"txt_attn_qkv[{x}]": f"attn.add_{x}_proj" for x in "qkv"},
        "img_attn_proj": "attn.to_out.0", "txt_attn_proj": "attn.to_add_out",
        "img_mlp_0": "ff.net.0.proj", "img_mlp_2": "ff.net.2",
        "txt_mlp_0": "ff_context.net.0.proj", "txt_mlp_2": "ff_context.net.2",
        "img_mod_lin": "norm1.linear", "txt_mod_lin": "norm1_context.linear",
    },
    "single": {
        **{f"linear1[{x}]": f"attn.to_{x}" for x in "qkv"},
        "linear1[mlp]": "proj_mlp", "linear2": "proj_out", "modulation_lin": "norm.linear",
    },
}  # fmt: skip
_BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}


def diffusers_name(parameter: str) -> str | None:
    """That of the same weight, or of the same rows of a fused one; None where there is no other."""
    if match := _FLUX.fullmatch(parameter):
        leaf = _LEAVES[match["kind"]].get(match["leaf"].replace(".", "_"))
        return leaf and f"{_BLOCKS[match['kind']]}.{match['block']}.{leaf}.weight"
    match = _FUSED.fullmatch(parameter)
    return f"{match['stem']}to_{match['part']}.weight" if match else None


_OF_BLOCK = re.compile(
    r"(?P<stem>.*)\b(?P<block>(?:encoder\.layer|layers)(?:\.\d+)?(?:\.blocks)?\.\d+)\.(?P<leaf>.+)\.(?P<kind>weight|bias)"
)
_INSIDE = {
    **{f"attention.{x}_proj": [f"attention.{part}.{name}" for part in ("attention", "self")]
       for x, name in (("q", "query"), ("k", "key"), ("v", "value"))},
    "attention.o_proj": ["attention.output.dense"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
}  # fmt: skip
"""Within a block of a model of images: as transformers 5 has it -> as files have it."""


def old_image_names(parameter: str) -> list[str]:
    """What files may call a parameter of a block of a ViT or its kin: `vit.encoder.layer.0.intermediate.dense.weight`
    is `vit.layers.0.mlp.fc1.weight`. Empty for other parameters."""
    match = _OF_BLOCK.fullmatch(parameter)
    if not match:
        return []
    blocks = [match["block"]]
    if re.fullmatch(r"layers\.\d+", match["block"]):
        blocks.append(match["block"].replace("layers", "encoder.layer"))
    leaves = [match["leaf"], *_INSIDE.get(match["leaf"], [])]
    found = [f"{match['stem']}{block}.{leaf}.{match['kind']}" for block, leaf in itertools.product(blocks, leaves)]
    return [name for name in found if name != parameter]
