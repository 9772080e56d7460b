"""What the ranks of a run have measured, as one result. Every function is called by all ranks."""

from __future__ import annotations

from lorabench.distributed import World
from lorabench.meter import Meter


def memory(meter: Meter, world: World) -> tuple[dict[str, float], str]:
    """The peaks by their names in MEASURES, each the highest of any rank's, and how they were made."""
    own, source = meter.memory()
    ranks = world.gather(own)
    highest = {name: max(each.get(name, 0.0) for each in ranks) for each in ranks for name in each}
    if world.size == 1:
        return highest, source
    total = sum(each["peak_gib"] for each in ranks)
    return highest | {"all_ranks_peak_gib": total}, f"{source}; the highest of {world.size} ranks"


def energy(meter: Meter, world: World) -> tuple[float, str] | None:
    """Joules of training and their source; None where some rank cannot tell.

    NVML counts each rank's own GPU. RAPL counts a whole machine, so one rank of each machine tells.
    """
    found = world.gather((meter.energy(), meter.device.type == "cuda" or world.place.local_rank == 0))
    told = [each for each, counts in found if counts and each is not None]
    if len(told) < sum(counts for _, counts in found):
        return None
    return sum(joules for joules, _ in told), told[0][1]
