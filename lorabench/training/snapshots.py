"""What was learned, on disk: at the end of a run, and after every so many steps of its training.

    results/runs/<run_id>/  updates/  snapshots/000010/  snapshots/000020/  …

Each folder holds what the method saves, in the form that `keep` asks for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.config.digests import file_digests
from lorabench.config.durable import make_folder, remove, sync, sync_tree
from lorabench.spec.method import LoadBase, Method
from lorabench.store.claim import Hold
from lorabench.training.state import Training, random_state, set_random_state
from lorabench.updates.formats import open_layers
from lorabench.updates.parts import write_parts
from lorabench.updates.update import stream_updates

if TYPE_CHECKING:
    from torch import nn

FOLDER = "snapshots"


def write_update(training: Training, load_base: LoadBase, folder: Path, name: str, hold: Hold) -> dict[str, str]:
    """Write what was learned so far to `name` in the run's folder, whole or not at all; its digests.

    Called by all ranks; the first one writes, and the others get no digests.
    """
    if not training.world.is_first:
        if training.world.is_sharded:
            take_part(training, load_base)
        return {}
    temporary, final = folder / f"{name}.{os.getpid()}.tmp", folder / name
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same pid
        make_folder(temporary)
        if is_streamed(training) and training.spec.keep == "updates":
            stream_updates(training.spec.method.updates(training.model, load_base), temporary)
        else:
            training.spec.method.save(training.model, load_base, temporary, training.spec.keep)
        if training.parts and training.spec.method.has_update:
            write_parts(training.parts, open_layers(temporary), temporary)
        sync_tree(temporary)
        hold.check()
        remove(final)
        os.replace(temporary, final)
        sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return file_digests(final, folder)


def take_part(training: Training, load_base: LoadBase) -> None:
    """What a rank beside the first does while shared-out weights are saved: each tensor is gathered by all of them.

    Whatever a method saves, it gathers in `updates` alone.
    """
    for _ in training.spec.method.updates(training.model, load_base):
        pass


def is_streamed(training: Training) -> bool:
    """Whether ΔW, shared out over the ranks, is saved as the `Method`'s default has it: parameter by parameter."""
    method = training.spec.method
    return training.world.is_sharded and method.trains_base and type(method).save is Method.save


def keep_snapshot(training: Training, folder: Path, hold: Hold) -> None:
    """Keep ΔW as it is after this step, and leave the training as if it had not been.

    To load the base seeds torch's generators anew, so they are put back; what is saved must not depend on dropout,
    so the model is left in evaluation mode.
    """
    meter, loads = training.meter, []

    def load() -> nn.Module:
        loads.append(training.step)
        return training.base.untouched()

    random = random_state(meter.device)
    with meter.pause_training("snapshot"):
        training.model.eval()
        training.snapshots |= write_update(training, load, folder, f"{FOLDER}/{training.step:06d}", hold)
        meter.release(collect=bool(loads))
    set_random_state(random, meter.device)


def drop_unknown(folder: Path, known: Collection[str], hold: Hold) -> None:
    """Remove the snapshots of a run that are not among its `known` files: those of steps that will be taken again."""
    hold.check()
    kept = folder / FOLDER
    if kept.is_symlink() or not kept.is_dir():
        remove(kept)
        return
    steps = {Path(path).parts[1] for path in known}
    for found in kept.iterdir():
        if found.name not in steps:
            remove(found)
