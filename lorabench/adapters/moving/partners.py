"""Which matrix of a new base takes the ΔW of one of the old: by name, then by kind; of blocks that are not as many, the
one at the same relative depth."""

from __future__ import annotations

import re
from functools import cached_property

from lorabench.updates.layer import layer_kind
from lorabench.updates.weightfile import WeightFiles, is_embedding

_BLOCK = re.compile(r"(?P<stack>(?:^|.*?\.))(?P<number>\d+)(?P<rest>\..*)")


class Partners:
    """Of the matrices of one base in another."""

    def __init__(self, source: WeightFiles, target: WeightFiles):
        self.source, self.target = source, target

    def find(self, parameter: str) -> str | None:
        """The partner of one of the source's parameters, as the model calls it; None where there is none."""
        block = _BLOCK.fullmatch(parameter)
        if block is None:
            return self._named(parameter)
        kind = self._by_kind.get(layer_kind(parameter.removesuffix(".weight")), set())
        of = _num_blocks(self.source, block["stack"])
        for stack, rest in [(block["stack"], block["rest"]), *(kind if len(kind) == 1 else ())]:
            number = partner_block(int(block["number"]), of, _num_blocks(self.target, stack))
            if number is not None and (found := self._named(f"{stack}{number}{rest}")):
                return found
        return None

    @cached_property
    def _by_kind(self) -> dict[str, set[tuple[str, str]]]:
        """What stands before and after the number of a block in the target's names of each kind of matrix."""
        kinds: dict[str, set[tuple[str, str]]] = {}
        for name in self.target.names:
            if (block := _BLOCK.fullmatch(name)) and _is_linear(self.target, name):
                kind = layer_kind(name.removesuffix(".weight"))
                kinds.setdefault(kind, set()).add((block["stack"], block["rest"]))
        return kinds

    def _named(self, parameter: str) -> str | None:
        """Files may have been saved without the wrapper that a model has; they have no wrapper that it has not."""
        found = self.target.find(parameter)
        if found is None or not _is_linear(self.target, found):
            return None
        return parameter if parameter.endswith(f".{found}") else found


def _is_linear(weights: WeightFiles, name: str) -> bool:
    return name.endswith(".weight") and len(weights.stored_shape(name)) == 2 and not is_embedding(name)


def _num_blocks(weights: WeightFiles, stack: str) -> int:
    """Blocks of the stack of this name, with or without a wrapper before it."""
    blocks = [block for name in weights.names if (block := _BLOCK.fullmatch(name))]
    same = (block["number"] for block in blocks if f".{block['stack']}".endswith(f".{stack}")
            or f".{stack}".endswith(f".{block['stack']}"))  # fmt: skip
    return len(set(same))


def partner_block(number: int, of: int, new: int) -> int | None:
    """The block, of `new`, at the relative depth of block `number`, of `of`; each is the partner of at most one.

    Block i of n stands at (i + ½) / n, and each block of the fewer takes the one of the more that this falls into.
    """
    if of <= new:
        return (2 * number + 1) * new // (2 * of) if number < of else None
    return next((j for j in range(new) if (2 * j + 1) * of // (2 * new) == number), None)
