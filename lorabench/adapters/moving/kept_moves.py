"""Where moved adapters of a store are kept, and what of one they depend on.

results/transfers/<id>/record.json   what `lorabench transfer --json` prints of it
                       adapter/      the moved adapter, in PEFT's format
                       …             of `trans-lora`, what is made on the way
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lorabench.adapters.moving.transfer import Transfer
from lorabench.config.decode import encode
from lorabench.spec.move import Distillation
from lorabench.spec.run_spec import canonical_json
from lorabench.store.store import Store

VERSION = 1
"""Part of every id: raise it when a move or its evaluation changes."""
FOLDER = "transfers"


def moves_folder(store: Store, transfer: Transfer, how: Distillation) -> Path:
    digest = hashlib.sha256(canonical_json(move_key(transfer, how))).hexdigest()[:12]
    return store.root / FOLDER / f"{transfer.by}-{digest}"


def move_key(transfer: Transfer, how: Distillation) -> dict[str, Any]:
    """All that a moved adapter and its losses depend on."""
    subject = transfer.subject
    record = subject.record
    return {
        "version": VERSION,
        "adapter": subject.content,
        "run": record and {"run_id": record.run_id, "data": record.environment.get("data"), "own": subject.own},
        "from": [transfer.source_name, transfer.revision],
        "to": transfer.to,
        "by": transfer.by,
        "rank": None if transfer.by_data else transfer.rank,
        "distil": encode(how) if transfer.by_data else None,
    }
