"""Experts of mixtures that had a module each before transformers 5 stacked them, and still have one in most files.

LoRA on such a module is written as PEFT loads it.

PEFT (0.21.2) stacks the factors too. It puts w1 and w3 (gate_proj, up_proj) together at twice `r`, whatever patterns
say, and all experts of a block in one tensor: all must have the same rank, what is lacking in it is zero.
"""

from __future__ import annotations

import re
from collections import defaultdict

from lorabench.config.decode import InputError
from lorabench.updates.peftfile import Target, padded

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>w[123]|(?:gate|up|down)_proj)")
_PAIRS = {"w1": "w3", "w3": "w1", "gate_proj": "up_proj", "up_proj": "gate_proj"}
"""What PEFT makes one matrix of."""
_OF_STACK = re.compile(r"(?P<stack>.+\.experts)\.(?P<leaf>\w+_proj(?:\[\w+\])?)\[(?P<index>\d+)\]\.weight")
_LEAVES = {
    "gate_up_proj[gate]": ("gate_proj", "w1"), "gate_up_proj[up]": ("up_proj", "w3"), "down_proj": ("down_proj", "w2"),
}  # fmt: skip


def is_single_expert(module: str) -> bool:
    return bool(_EXPERT.fullmatch(module))


def names_in_files(parameter: str) -> list[str]:
    """What a base's files may call a parameter of a mixture: `STACK.gate_up_proj[gate][3].weight` is that of
    `STACK.3.gate_proj` or `STACK.3.w1`, and Mixtral's blocks have `block_sparse_moe` where the model has `mlp`."""
    names = [parameter]
    if (match := _OF_STACK.fullmatch(parameter)) and match["leaf"] in _LEAVES:
        names = [f"{match['stack']}.{match['index']}.{leaf}.weight" for leaf in _LEAVES[match["leaf"]]]
    return [*names, *(name.replace(".mlp.", ".block_sparse_moe.") for name in names if ".mlp." in name)]


def of_one_rank(targets: list[Target]) -> tuple[list[Target], int | None]:
    """Modules of single experts as PEFT stacks them, and the rank that `r` must then be. InputError where some lack."""
    experts = {target.module: match for target in targets if (match := _EXPERT.fullmatch(target.module))}
    if not experts:
        return targets, None
    by_name = {target.module: target for target in targets}
    blocks: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for match in experts.values():
        blocks[match["stack"], match["leaf"]].add(int(match["index"]))
    missing = [
        f"{stack}.{index}.{leaf}"
        for (stack, leaf), there in blocks.items()
        for index in range(1 + max(max(blocks[stack, other]) for other in _leaves(blocks, stack)))
        if index not in there
    ]
    missing += [f"{stack}.0.{_PAIRS[leaf]}" for stack, leaf in blocks if leaf in _PAIRS
                and (stack, _PAIRS[leaf]) not in blocks]  # fmt: skip
    if missing:
        raise InputError(f"{missing[0]}: has no ΔW, and PEFT stacks either all experts of a block or none")
    rank = max(by_name[module].rank for module in experts)
    stacks = {match["stack"].removesuffix(".experts") for match in experts.values()}
    routers = {f"{stack}.gate" for stack in stacks} & by_name.keys()
    alike = experts.keys() | routers
    return [padded(target, rank) if target.module in alike else target for target in targets], rank


def _leaves(blocks: dict[tuple[str, str], set[int]], stack: str) -> list[str]:
    return [leaf for other, leaf in blocks if other == stack]
