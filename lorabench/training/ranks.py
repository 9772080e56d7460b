"""What the ranks of a run hold, compared, and what they have measured, as one result. All ranks call each function."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lorabench.processes.distributed import World, is_sharded
from lorabench.training.meter import Meter


def memory(meter: Meter, world: World) -> tuple[dict[str, float], str]:
    """The peaks by their names in MEASURES, each the highest of any rank's, and how they were made."""
    own, source = meter.memory()
    ranks = world.gather(own)
    highest = {name: max(each.get(name, 0.0) for each in ranks) for each in ranks for name in each}
    if world.size == 1:
        return highest, source
    total = sum(each["peak_gib"] for each in ranks)
    return highest | {"all_ranks_peak_gib": total}, f"{source}; the highest of {world.size} ranks"


def strangers(world: World, *held: Any) -> list[int]:
    """The ranks that hold other than rank 0 does."""
    found = world.gather(held)
    return [rank for rank, each in enumerate(found) if each != found[0]]


def digest(trained: Iterable[Tensor]) -> str:
    """SHA-256 of what a rank holds whole; of a share it says nothing."""
    import torch

    content = hashlib.sha256()
    for tensor in trained:
        if not is_sharded(tensor):
            content.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return content.hexdigest()


def frozen_sums(model: nn.Module) -> list[int]:
    """Of each frozen weight that a rank holds whole, the sum of its bytes: exact, and made where the weight is."""
    import torch

    frozen = (p.detach() for p in model.parameters() if not p.requires_grad and not is_sharded(p))
    return [int(p.contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64)) for p in frozen]


def tells_energy(meter: Meter, world: World) -> bool:
    """Whether a rank's joules count. NVML counts each rank's own GPU; RAPL a whole machine, so one rank of it tells."""
    return meter.device.type == "cuda" or world.place.local_rank == 0


def energy(meter: Meter, world: World) -> tuple[float, str] | None:
    """Joules of training and their source; None where some rank cannot tell."""
    found = world.gather((meter.energy(), tells_energy(meter, world)))
    told = [each for each, counts in found if counts and each is not None]
    if len(told) < sum(counts for _, counts in found):
        return None
    return sum(joules for joules, _ in told), told[0][1]
