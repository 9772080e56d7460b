"""Parts of fused matrices as layers of their own: q, k and v of `qkv_proj`, gate and up of `gate_up_proj`.

    updates/parts.json     {"MODULE.weight": {"q": {"groups": 1, "start": 0, "stop": 64, "base_norm": 3.1}, ...}, ...}

A part is some rows of the matrix, so its ΔW is those of B, times the same A: exactly, and ΔW is not formed. Shapes: M
out features of the fused matrix, m of the part, N in features, r rank.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.config.decode import InputError
from lorabench.updates.readers.svd import KeptSVD
from lorabench.updates.tensorfile import read_json
from lorabench.updates.update import DORA_PART, Update
from lorabench.updates.weightfile import INDEX_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.updates.readers._entry import Entry

PARTS_FILE = "parts.json"
_PART = re.compile(r"\[([a-z]+)\](?=(?:\[\d+\])?\.weight$)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows from `start` to `stop` of each of `groups` equal blocks of a fused matrix's rows.

    Heads may be such blocks, each with its own q, k and v. `base_norm` is ‖W0‖_F of these rows.
    """

    groups: int = 1
    start: int
    stop: int
    base_norm: float | None = None

    def rows(self, matrix: Tensor) -> Tensor:
        """(M, N) -> (m, N), in their order."""
        return matrix.unflatten(0, (self.groups, -1))[:, self.start : self.stop].flatten(0, 1)


def part_name(parameter: str, name: str) -> str:
    """`MODULE[q].weight`; of an expert `STACK[gate][3].weight`, of a part of DoRA's ΔW `MODULE[q][sBA].weight`."""
    return re.sub(r"((?:\[\w+\])?\.weight)$", rf"[{name}]\1", parameter)


def fused_name(parameter: str) -> str:
    """The matrix that a part is some rows of."""
    return _PART.sub("", parameter)


def name_of_part(parameter: str) -> str | None:
    """`q` of `MODULE[q].weight`; None of a whole matrix."""
    match = _PART.search(parameter)
    return match[1] if match else None


@dataclass(frozen=True, kw_only=True, eq=False)
class PartOf:
    """One part of a ΔW in a file, not read yet."""

    whole: Entry
    parameter: str
    part: Part

    @property
    def shape(self) -> tuple[int, int]:
        return self.part.groups * (self.part.stop - self.part.start), self.whole.shape[1]

    def load(self) -> Update:
        update = self.whole.load()
        assert isinstance(update, Update)  # of kept singular vectors no parts are told
        B, base_norm = self.part.rows(update.B), self.part.base_norm
        return replace(update, parameter=self.parameter, B=B, base_norm=base_norm, fused=self.part)


def split(entries: dict[str, Entry], folder: Path) -> dict[str, Entry]:
    """What a folder of lorabench's holds, each fused matrix as its parts where `write_parts` has told them there.

    Of a ΔW of which singular vectors alone were kept (`keep = "svd:K"`) nothing is told: it stays whole.
    """
    fused = read_parts(folder)
    found: dict[str, Entry] = {}
    for parameter, entry in entries.items():
        found |= part_entries(parameter, entry, fused) or {parameter: entry}
    return found


def part_entries(parameter: str, entry: Entry, fused: dict[str, dict[str, Part]]) -> dict[str, Entry]:
    """The parts of one ΔW by their names; none where it has none, or singular vectors alone were kept of it."""
    parts = {} if isinstance(entry, KeptSVD) else fused.get(parameter.replace(f"[{DORA_PART}]", ""), {})
    named = {part_name(parameter, name): part for name, part in parts.items()}
    return {own: PartOf(whole=entry, parameter=own, part=part) for own, part in named.items()}


def write_parts(fused: dict[str, dict[str, Part]], entries: dict[str, Entry], folder: Path) -> None:
    """Keep the parts of the fused matrices, by parameter, that have a ΔW in the folder.

    An empty table where none has: runs of before have no such file, and are analyzed as they were.
    """
    whole = {parameter for parameter, entry in entries.items() if not isinstance(entry, KeptSVD)}
    table = {
        parameter: {name: asdict(part) for name, part in parts.items()}
        for parameter, parts in fused.items()
        if parameter in whole
    }
    (folder / PARTS_FILE).write_text(json.dumps(table, separators=(",", ":")) + "\n")


def read_parts(folder: Path) -> dict[str, dict[str, Part]]:
    """What `write_parts` wrote there; nothing where it has not."""
    file = folder / PARTS_FILE
    if not file.exists():
        return {}
    table = read_json(file, limit_bytes=INDEX_BYTES)
    try:
        return {key: {name: Part(**part) for name, part in parts.items()} for key, parts in table.items()}
    except (AttributeError, TypeError):
        raise InputError(f"{file}: must be a table of parts by parameter, with groups, start and stop") from None
