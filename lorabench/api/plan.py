"""`lorabench.plan(sweep)`: the runs of a sweep, which are done, and what each will take."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd

    from lorabench.spec.source import Source
    from lorabench.spec.sweep import Sweep
    from lorabench.store.record import Status
    from lorabench.store.store import Store


def plan(
    sweep: Source,
    results: str | os.PathLike[str] = "results",
    *,
    changes: Mapping[str, Any] | None = None,
    limit: int | None = None,
    device: str = "auto",
    pack: int | Literal["auto", "off"] = "auto",
) -> Plan:
    """What a sweep will take: exact parameter counts, estimated memory and time of each run, and what these rest on.

        lorabench.plan("sweeps/quickstart.toml", changes={"steps": 20}).runs

    `sweep` is a file, a TOML text or a dict; `changes` are keys that its runs are to have instead (a list is an axis);
    of `limit` only the first so many runs that are not done are planned; `pack` is `run`'s. Nothing is written. Raises
    `lorabench.InputError` with every problem of the sweep, also those that show only when a method meets its model.
    """
    from lorabench.launch.packs import Asked, most_in_pack
    from lorabench.processes.machine import visible_gpus
    from lorabench.spec.source import as_sweep
    from lorabench.store.store import Store
    from lorabench.terminal.hush import hushed

    wanted, store = as_sweep(sweep, changes), Store(Path(results))
    gpus = visible_gpus(device)  # says so where there is none
    part, left = first_runs(wanted, store, limit)
    with hushed():
        from lorabench.launch.plan import make_plan

        workers = default_workers(part, gpus)
        packing = Asked(size=most_in_pack(pack), device=device, workers=workers, alone=wanted.alone)
        return Plan(sweep=part, table=make_plan(part, store, device, packing=packing), left=left)


def default_workers(sweep: Sweep, gpus: tuple[str, ...], processes: int = 1) -> int:
    """Runs, or packs of runs, at a time: as many as there are GPUs for, or as the cores allow."""
    from lorabench.processes.machine import available_cores

    threads = max((spec.threads for spec in sweep.runs), default=1)
    return len(gpus) // processes or max(1, available_cores() // (threads * processes))


def first_runs(sweep: Sweep, store: Store, limit: int | None, retry: Collection[Status] = ()) -> tuple[Sweep, int]:
    """The sweep with the first `limit` of its runs that are still to do alone, and how many are left; all if None.

    What has failed is left alone, as `run` does, unless it is to be tried again.
    """
    from lorabench.config.decode import InputError
    from lorabench.launch.pool import REPEATABLE
    from lorabench.store.record import Status

    if limit is None:
        return sweep, 0
    if limit < 1:
        raise InputError(f"limit = {limit}: must be at least 1")
    settled = {Status.DONE, *REPEATABLE} - set(retry)
    states = zip(sweep.runs, store.states(list(sweep.runs)), strict=True)
    todo = [spec for spec, state in states if state.status not in settled]
    return replace(sweep, runs=tuple(todo[:limit])), len(todo[limit:])


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A sweep's plan; `runs` has a row a run, `table` is what `lorabench.launch.plan.make_plan` gives."""

    sweep: Sweep
    table: dict[str, Any]
    left: int = 0
    """Runs that are to do too, beyond the limit that was asked for."""

    @cached_property
    def runs(self) -> pd.DataFrame:
        """By run id: `status`, the sweep's keys, `num_trainable`, `num_parameters`, `peak_gib`, `seconds`, `basis`."""
        import pandas as pd

        from lorabench.spec.run_spec import UNNAMED, flatten, swept_keys

        flats = [flatten(run["spec"]) for run in self.table["runs"]]
        keys = ["method.name", *swept_keys(flats)]
        measures = ("num_trainable", "num_parameters", "peak_gib", "seconds", "basis")
        rows = [
            {"run_id": run["run_id"], "status": run["status"]}
            | {key: flat.get(key, UNNAMED.get(key)) for key in keys}
            | {name: run["estimate"][name] for name in measures}
            for run, flat in zip(self.table["runs"], flats, strict=True)
        ]
        return pd.DataFrame(rows, columns=["run_id", "status", *keys, *measures]).set_index("run_id")

    @property
    def totals(self) -> dict[str, Any]:
        """Of what is still to run: `num_to_run`, `seconds` one after another, `peak_gib` of the largest."""
        return self.table["totals"]

    @property
    def notes(self) -> list[str]:
        """What there is to say of models and data, and what the estimates rest on."""
        return [*self.table["notes"], *self.table["assumptions"]]

    def to_json(self) -> dict[str, Any]:
        """All of it, as `lorabench plan --json` has it."""
        return self.table | ({"left": self.left} if self.left else {})

    def __repr__(self) -> str:
        from lorabench.launch.plan import plan_text

        return "\n".join([plan_text(self.sweep, self.table), *left_text(self.left)])

    def _repr_html_(self) -> str:
        from html import escape

        _, _, below = repr(self).partition("\n\n")
        table = self.runs.to_html(max_rows=20, float_format="{:.3g}".format, border=0, na_rep="–")
        return f"{table}<p>{escape(below).replace(chr(10), '<br>')}</p>"


def left_text(left: int) -> list[str]:
    return [f"limit: {left} more to run are left"] if left else []
