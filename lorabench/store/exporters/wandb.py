"""Weights & Biases, offline: a folder `wandb/offline-run-…` a run below OUTPUT; `wandb sync` uploads them.

The project is the sweep, config the flat spec, history the curves, and the summary the measures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.store.record import Status

if TYPE_CHECKING:
    from lorabench.store.export import Exported

LIBRARY = PACKAGE = "wandb"


def write(runs: Iterable[Exported], folder: Path) -> None:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        mode="offline", root_dir=str(folder), silent=True, console="off", disable_git=True, save_code=False,
        x_disable_stats=True, x_disable_meta=True, x_save_requirements=False,
    )  # fmt: skip
    for run in runs:
        for before in folder.glob(f"wandb/offline-run-*-{run.run_id}"):
            shutil.rmtree(before)
        theirs = wandb.init(
            id=run.run_id, name=run.run_id, project=run.project, config=run.config, tags=[str(run.status)],
            settings=settings, reinit="create_new",
        )  # fmt: skip
        for row in run.rows:  # a row that is not committed would come after the summary, and into it
            values = {key: value for key, value in row.items() if key != "step"}
            theirs.log(values, step=int(row["step"]), commit=True)
        theirs.summary.update(run.measures)
        theirs.finish(exit_code=0 if run.status == Status.DONE else 1)
    wandb.teardown()  # `finish` may come back before the last of a file is written
