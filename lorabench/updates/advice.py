"""Which rank each layer needs: the smallest that keeps a share of ΔW's energy, as PEFT's `r` and `rank_pattern`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def smallest_rank(S: np.ndarray, energy: float) -> int:
    """The fewest singular values, at least 1, that hold the share `energy` in (0, 1] of Σσ².

    `S` (R,) in float64, descending. By Eckart and Young 1936 no matrix of a lower rank is as near to ΔW.
    """
    import numpy as np

    if not S[0] > 0:
        return 1
    cumulative = np.square(S / S[0]).cumsum()  # of order 1, so that no square underflows
    wanted = energy * cumulative[-1] * (1 - 1e-12)  # as in `decompose.rank_energies`
    return min(int(np.searchsorted(cumulative, wanted)) + 1, len(S))


def rank_pattern_for(ranks: dict[str, int]) -> tuple[int, dict[str, int]]:
    """PEFT's `r`, the most frequent rank, and the `rank_pattern` that gives every layer of `ranks` its own.

    PEFT takes the first key with `re.match(r"(.*\\.)?(KEY)$", layer)`, so that order counts: of layers with one last
    name (`q_proj`) the exceptions come first, as their shortest unambiguous endings, those that differ in a number
    alone under one key (`(0|3).self_attn.q_proj`); then the last name, for all others. PEFT sorts the keys when it
    saves, so they hold in that order too: where they would not, exceptions stand in parentheses, which sort first. Of
    equally frequent ranks the smaller counts as the usual one.
    """
    usual = _most_frequent(ranks.values())
    pattern = _pattern(ranks, usual)
    kinds = {_escaped(layer.rpartition(".")[2]) for layer in ranks}
    in_front = {key if key in kinds else f"({key})": rank for key, rank in pattern.items()}
    readable = [{key.replace(r"\.", "."): rank for key, rank in each.items()} for each in (pattern, in_front)]
    candidates = [readable[0], pattern, readable[1], in_front]
    return usual, next((each for each in candidates if _gives(each, ranks, usual)), in_front)


def _pattern(ranks: dict[str, int], usual: int) -> dict[str, int]:
    meanings: dict[str, set[int]] = defaultdict(set)
    kinds: dict[str, dict[str, int]] = defaultdict(dict)
    for layer, rank in ranks.items():
        kinds[layer.rpartition(".")[2]][layer] = rank
        for ending in _endings(layer):
            meanings[ending].add(rank)
    pattern: dict[str, int] = {}
    for kind, layers in kinds.items():
        usual_here = _most_frequent(layers.values())
        exceptions = {_key(layer, meanings): rank for layer, rank in layers.items() if rank != usual_here}
        pattern |= _joined(exceptions)
        if usual_here != usual:
            pattern[_escaped(kind)] = usual_here
    return pattern


def _gives(pattern: dict[str, int], ranks: dict[str, int], usual: int) -> bool:
    """By PEFT's rule, in both orders; an unescaped dot, which reads better, stands for any character."""
    keys = [(key, re.compile(rf"(.*\.)?({key})$"), rank) for key, rank in pattern.items()]
    return all(
        next((r for _, key, r in order if key.match(layer)), usual) == rank
        for order in (keys, sorted(keys, key=lambda item: item[0]))
        for layer, rank in ranks.items()
    )


def _most_frequent(ranks: Iterable[int]) -> int:
    counts = Counter(ranks)
    return min(counts, key=lambda rank: (-counts[rank], rank))


def _endings(layer: str) -> list[str]:
    """`a.b.c` -> `c`, `b.c`, `a.b.c`."""
    parts = layer.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _key(layer: str, meanings: dict[str, set[int]]) -> str:
    """The shortest ending that only layers of one rank have; `^` before a whole name that is another one's ending."""
    return next((ending for ending in _endings(layer) if len(meanings[ending]) == 1), f"^{layer}")


def _joined(keys: dict[str, int]) -> dict[str, int]:
    """Regular expressions; keys of one rank that differ in their first number alone become one."""
    groups: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for key, rank in keys.items():
        found = _NUMBER.search(key)
        start, end = found.span() if found else (len(key), len(key))
        groups[key[:start], key[end:], rank].append(key[start:end])
    return {_expression(head, numbers, tail): rank for (head, tail, rank), numbers in groups.items()}


def _expression(head: str, numbers: list[str], tail: str) -> str:
    number = numbers[0] if len(numbers) == 1 else f"({'|'.join(sorted(numbers, key=int))})"
    anchor = "^" if head.startswith("^") else ""
    return anchor + _escaped(head.removeprefix("^")) + number + _escaped(tail)


def exact_key(layer: str) -> str:
    """A key of PEFT's `rank_pattern` or `alpha_pattern` that fits this layer alone, whichever is tried first."""
    return f"^{_escaped(layer)}$"


def _escaped(text: str) -> str:
    return re.escape(text).replace(r"\-", "-")
