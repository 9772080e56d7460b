"""All of a transfer: the adapter moved, written and, where a run says how, evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.adapters.compression.compressible import Subject
from lorabench.adapters.moving.distil import Distiller
from lorabench.adapters.moving.recovery import Recovery, can_evaluate, check_trained, table
from lorabench.adapters.moving.transfer import Transfer, check_empty
from lorabench.adapters.moving.transfer_text import by_kind
from lorabench.config.decode import InputError
from lorabench.processes.distributed import pick_device
from lorabench.spec.move import Distillation
from lorabench.terminal.text import tracked


@dataclass(frozen=True, kw_only=True)
class ByData:
    """How `trans-lora` is to distil, and the folder that keeps what is made on the way."""

    how: Distillation
    folder: Path


def move_adapter(
    transfer: Transfer,
    output: Path,
    trained: Subject | None,
    device: str,
    note: Callable[[str], None],
    by_data: ByData | None = None,
) -> dict[str, Any]:
    """What `lorabench transfer --json` prints; `losses` is empty where no run says how to evaluate.

    `by_data` belongs to `trans-lora`. InputError, and nothing written into `output`, where a layer, a base or the
    evaluation cannot be had.
    """
    check_empty(output)
    spec = transfer.subject.spec
    if trained is not None and spec is None:
        raise InputError("--trained: is evaluated with the task of a run, which --like has to name")
    if trained is not None:
        check_trained(trained, transfer)
    if spec is not None and not can_evaluate(spec):
        note(f"not evaluated: {spec.task.name} trains a head, which is not moved")
        spec = None
    recovery = Recovery(transfer, spec, pick_device(device)) if spec else None
    told: dict[str, Any] = {}
    if by_data is not None:
        made = Distiller(
            transfer=transfer, how=by_data.how, folder=by_data.folder, device=pick_device(device), note=note
        )
        moved, told = made.moved()
    else:
        moved = list(tracked(transfer.layers(), len(transfer.entries), "move"))
    rows = table(recovery.losses(moved, trained, note)) if recovery else []
    transfer.write(output, moved)
    return {
        "adapter": transfer.subject.name,
        "from": transfer.source_name,
        "to": transfer.to,
        "by": transfer.by,
        "rank": transfer.rank if by_data is None else None,
        "output": str(output),
        "kinds": by_kind([each.row for each in moved if each.row]),
        "layers": [each.row for each in moved if each.row],
        "distilled": told or None,
        "left_out": transfer.left_out,
        "losses": rows,
    }
