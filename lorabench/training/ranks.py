"""What the ranks of a run hold, compared, and what they have measured, as one result. All ranks call each function."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorabench.processes.distributed import World, is_sharded, local_part
from lorabench.spec.run_spec import method_seed
from lorabench.training.meter import Meter
from lorabench.training.stop import Diverged

if TYPE_CHECKING:
    from lorabench.training.state import Training


def compare(training: Training) -> None:
    """Raises RuntimeError where ranks begin with other data or weights, which each has read or made by itself."""
    world = training.world
    if world.size > 1:
        if strange := strangers(world, training.base.content):
            raise RuntimeError(f"the ranks differ: {strange} have other data or another base than rank 0")
        trained = digest(training.spec.method.trained_state(training.model).values())
        if strange := strangers(world, trained, frozen_sums(training.model)):
            raise RuntimeError(f"the ranks differ: {strange} start from other weights than rank 0")


def seed(training: Training) -> None:
    """Dropout of its own for each rank but the first, which goes on as one process would."""
    if not training.world.is_first:
        import torch

        torch.manual_seed(method_seed(training.spec, process=training.world.rank))


def check_weights(training: Training) -> None:
    """Raises Diverged where trained weights are not finite, and RuntimeError where ranks differ in what all hold."""
    world, trained = training.world, training.spec.method.trained_state(training.model)
    if world.any(not all(local_part(tensor).isfinite().all() for tensor in trained.values())):
        raise Diverged(f"step {training.step}: trained weights are not finite")
    if world.size > 1:
        strange = strangers(world, digest(trained.values()))
        if strange:
            raise RuntimeError(f"the ranks have drifted apart: {strange} hold other trained weights than rank 0")


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
