"""`lorabench.run(sweep)`: run what is missing of a sweep on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorabench.api.plan import default_workers, first_runs, left_text
from lorabench.api.results import SweepResults

if TYPE_CHECKING:
    from lorabench.launch.pool import Outcome
    from lorabench.processes.distributed import Sharding
    from lorabench.spec.source import Source
    from lorabench.spec.sweep import Sweep


def run(
    sweep: Source,
    results: str | os.PathLike[str] = "results",
    *,
    workers: int | None = None,
    changes: Mapping[str, Any] | None = None,
    limit: int | None = None,
    retry: str | Iterable[str] = (),
    device: str = "auto",
    processes: int = 1,
    sharding: Sharding = "auto",
    timeout_minutes: float | None = None,
    checkpoint_seconds: float = 60.0,
    live: str | None = None,
    pack: int | Literal["auto", "off"] = "auto",
) -> Ran:
    """Run what is missing of a sweep, and wait for it; a second call goes on where the first was interrupted.

        ran = lorabench.run({"name": "mine", "base": {...}, "grid": [{...}]}, workers=2)
        ran.results.runs

    `sweep` is a file, a TOML text or a dict, and is kept as `RESULTS/NAME/sweep.toml` with its `changes`; `limit`: the
    first so many runs alone; `retry`: what has ended as `failed`, `oom`, ... or `all` is run again; `pack`: how many
    runs of one base at most share their passes. The others are those of `lorabench run`. Each run, or pack of runs, is
    a process of its own, whose start needs no `if __name__ == "__main__"`. Raises `lorabench.InputError`, before
    anything runs, for what is wrong; a run that fails raises nothing, and says so.
    """
    from lorabench.config.durable import write_bytes
    from lorabench.launch.packs import most_in_pack
    from lorabench.launch.pool import Pool, launch, repeatable
    from lorabench.launch.worker import Settings
    from lorabench.processes.machine import visible_gpus
    from lorabench.spec.source import as_sweep
    from lorabench.store.export import exporter
    from lorabench.store.store import Store

    again = repeatable(retry)
    if live:
        exporter(live, "--live")  # says so where it is not installed
    wanted, store = as_sweep(sweep, changes), Store(Path(results))
    part, left = first_runs(wanted, store, limit, again)
    gpus = visible_gpus(device)
    settings = Settings(
        device="cuda" if gpus else "cpu",
        checkpoint_seconds=checkpoint_seconds,
        timeout_seconds=None if timeout_minutes is None else 60 * timeout_minutes,
        sharding=sharding,
        live=live,
    )
    workers = _num_workers(part, workers, processes, gpus)
    pool = Pool(
        workers=workers, processes=processes, gpus=gpus, settings=settings, retry=again, pack=most_in_pack(pack),
        alone=wanted.alone,
    )  # fmt: skip

    def begin() -> None:
        write_bytes(store.root / wanted.name / "sweep.toml", wanted.text.encode())
        for spec in part.runs:
            store.uncancel(spec.id)

    outcome = launch(part, store, pool, begin=begin)
    return Ran(sweep=part, outcome=outcome, results=SweepResults(store, wanted), left=left)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ran:
    """How the runs have ended, and what they gave."""

    sweep: Sweep
    """Of the runs that were asked for."""
    outcome: Outcome
    """Each run's state, and the signal that stopped them."""
    results: SweepResults
    left: int = 0
    """Runs that are to do too, beyond the limit that was asked for."""

    def __repr__(self) -> str:
        """The counts by status, then a line for each run that did not end well."""
        from lorabench.launch.pool import summary

        return "\n".join([summary(self.sweep, self.outcome), *left_text(self.left)])


def _num_workers(sweep: Sweep, workers: int | None, processes: int, gpus: tuple[str, ...]) -> int:
    """As many as there are GPUs for, or as the cores allow, where none are asked for. InputError."""
    from lorabench.config.decode import InputError

    for name, value in {"workers": workers, "processes": processes}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} = {value}: must be at least 1")
    if gpus and processes > len(gpus):
        raise InputError(f"--processes {processes}: a GPU each, and only {len(gpus)} can be seen here")
    return workers or default_workers(sweep, gpus, processes)
