"""Runs that several SLURM tasks compute together, one task a rank: all ranks go through a job's cells in one order.

Each task has a supervisor, the process that SLURM started, which does no arithmetic and forks a fresh child for every
cell. The supervisors meet in a store that rank 0's keeps for the whole job; a cell's children meet in the same store,
under a prefix of their own, so that no cell needs a port. Rank 0 decides which cells are computed and writes why one
has failed; the others follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorabench.distributed import Place
from lorabench.record import RunState, Status, Store
from lorabench.spec import RunSpec
from lorabench.worker import Settings, Target, execute_run


class Lockstep:
    """One rank's supervisor. `run` in every task of the job; `stop` from a signal handler, in any of them."""

    def __init__(
        self,
        specs: Sequence[RunSpec],
        store: Store,
        settings: Settings,
        place: Place,
        retry: frozenset[Status] = frozenset(),
        target: Target = execute_run,
    ):
        """`specs` and `store` are the same in all tasks; `place` is `Place.from_environment()`, where RANK, WORLD_SIZE,
        LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are as submitit's TorchDistributedEnvironment sets
        them. Failed runs are repeated where `retry` has their status."""
        raise NotImplementedError

    def run(self) -> list[RunState]:
        """Go through the cells, once; returns when each is settled, running elsewhere, or `stop` was called.

        How each stands then, in order, on rank 0; nothing on the other ranks. Raises distributed.RankFailed where the
        supervisor of another rank is gone: the job cannot go on, and the cell in hand is accounted for.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """The cell in hand writes its checkpoint and ends as `cancelled`, on all ranks; no further one begins. A second
        call kills it. Safe in a signal handler; returns at once."""
        raise NotImplementedError


def run_cells(
    specs: Sequence[RunSpec], store: Store, settings: Settings, place: Place, retry: frozenset[Status] = frozenset()
) -> list[RunState]:
    """`Lockstep(...).run()`."""
    return Lockstep(specs, store, settings, place, retry).run()
