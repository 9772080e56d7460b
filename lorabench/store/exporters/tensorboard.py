"""TensorBoard: a folder of event files a run, below OUTPUT; curves as scalars, measures as scalars `final/…`.

The flat spec stands in the HParams tab, beside the measures. Of an exported run all points bear the time at which it
began, for a log of steps has no times; of one that is shown live their own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorabench.store.export import Exported

LIBRARY = PACKAGE = "tensorboard"


def write(runs: Iterable[Exported], folder: Path) -> None:
    for run in runs:
        live = Live(folder / run.run_id)
        live.begin()
        live.add(run.rows, run.started)
        live.writer.add_hparams(run.plain, {f"final/{key}": value for key, value in run.measures.items()}, run_name=".")
        live.writer.close()


class Live:
    """The event files of one run, in a folder of its own; `begin` takes away what is there."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # so that a run's memory is counted from after its import

        self._folder, self._make = folder, SummaryWriter
        self.writer: Any = None

    def begin(self) -> None:
        if self.writer is not None:
            self.writer.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self.writer = self._make(str(self._folder))

    def add(self, rows: Iterable[dict[str, float]], time: float | None = None) -> None:
        for row in rows:
            for key in row.keys() - {"step"}:
                self.writer.add_scalar(key, row[key], int(row["step"]), walltime=time)
        self.writer.flush()
