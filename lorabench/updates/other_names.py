"""What diffusers calls the modules of a model whose first code has fused or named them otherwise: Flux and Z-Image.

Adapters name modules by that first code (also kohya's, with `_` for `.`), with the block of rows in brackets where it
is fused: `double_blocks_0_img_attn_qkv[q]`. Source: diffusers, `loaders/lora_conversion_utils.py`.
"""

from __future__ import annotations

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
