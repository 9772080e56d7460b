"""Which matrix of another base takes a ΔW: same names, wrappers, other names of a kind, other numbers of blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabench.adapters.moving.partners import Partners
from lorabench.updates.weightfile import WeightFiles

LLAMA = "model.layers.{}.self_attn.q_proj.weight"


def weights(folder: Path, *names: str, blocks: int = 2) -> WeightFiles:
    """Matrices of these names in each block."""
    folder.mkdir()
    found = {name.format(number) for name in names for number in range(blocks)}
    save_file({name: torch.zeros(4, 4) for name in found}, folder / "model.safetensors")
    return WeightFiles(folder)


@pytest.mark.parametrize(
    ("names", "blocks", "parameter", "partner"),
    [
        ([LLAMA], 2, LLAMA.format(1), LLAMA.format(1)),
        (["lm_head.weight", LLAMA], 2, "lm_head.weight", "lm_head.weight"),
        ([LLAMA], 6, LLAMA.format(1), LLAMA.format(4)),
        ([LLAMA], 1, LLAMA.format(1), LLAMA.format(0)),
        ([LLAMA], 1, LLAMA.format(0), None),
        ([LLAMA.removeprefix("model.")], 2, LLAMA.format(1), LLAMA.format(1)),
        ([f"text.{LLAMA}"], 4, LLAMA.format(1), f"text.{LLAMA.format(3)}"),
        (["decoder.blocks.{}.attention.q_proj.weight"], 4, LLAMA.format(1), "decoder.blocks.3.attention.q_proj.weight"),
        (["encoder.{}.q_proj.weight", "decoder.{}.q_proj.weight"], 2, LLAMA.format(1), None),
        (["model.layers.{}.self_attn.qkv_proj.weight"], 2, LLAMA.format(1), None),
        (["model.layers.{}.self_attn.q_proj.bias"], 2, LLAMA.format(1), None),
    ],
)
def test_the_partner_of_a_layer(
    names: list[str], blocks: int, parameter: str, partner: str | None, tmp_path: Path
) -> None:
    source = weights(tmp_path / "source", LLAMA, "lm_head.weight")
    assert Partners(source, weights(tmp_path / "target", *names, blocks=blocks)).find(parameter) == partner


def test_a_layer_that_begins_in_a_later_block(tmp_path: Path) -> None:
    """The first blocks of some mixtures of experts have no such matrix."""
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)]
    names += [f"model.layers.{n}.mlp.up_proj.weight" for n in (1, 2)]
    both = [weights(tmp_path / side, *names, blocks=1) for side in ("source", "target")]
    assert Partners(*both).find(names[-1]) == names[-1]
