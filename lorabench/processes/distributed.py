"""One run on several processes: the place of each, called a rank, and what the ranks tell one another.

The batch is global. Each rank computes its share of it, and losses and gradients are summed, so that the numbers are
those of one process but for the order in which they are added: after some steps in float32, losses are the same to a
relative 1e-5 and ΔW to 3e-5 of its norm, and in bfloat16, whose last bit is 4e-3, to 1e-2 and 5e-2
(`tests/training/test_ranks.py`). Dropout, the method's or the base's own, is another
draw for each rank but the first, so with it the numbers differ as those of two seeds do. With as many ranks as before,
a resumed run has the bits of one that was never stopped. Rank 0 holds the claim and writes what the run leaves behind;
the others only compute.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lorabench.config.decode import InputError
from lorabench.config.quote import clip

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Sharding = Literal["auto", "ddp", "fsdp"]
"""Over ranks: `ddp` gives each the whole model, `fsdp` a share of every base weight (`lorabench.training.sharding`)."""
MEET_SECONDS = 300.0
"""In which all ranks must have come together, after all of them were started."""
PEER_SECONDS = 86400.0
"""After which a rank that answers nothing is taken for gone: longer than anything takes that the first does alone, such
as the SVD of every ΔW. One that has died is noticed at once: its connections close, or whoever has started it ends the
others."""
BUCKET_BYTES = 64 * 2**20
"""Gradients that are summed in one message."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process's place among those that compute one run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of its machine."""
    local_size: int = 1
    meeting: str = ""
    """Where the ranks find one another, for one attempt at one run: `file:PATH`, which is not there yet, for ranks of
    one machine, or `tcp:HOST:PORT:PREFIX`, where a store is listening."""

    @property
    def num_nodes(self) -> int:
        return -(-self.size // self.local_size)

    @classmethod
    def from_environment(cls) -> Place:
        """By RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun and submitit set them; alone without."""
        given = {key: int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
                 if key in os.environ}  # fmt: skip
        rank, size = given.get("RANK", 0), given.get("WORLD_SIZE", 1)
        local_rank, local_size = given.get("LOCAL_RANK", rank), given.get("LOCAL_WORLD_SIZE", size)
        return cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


class RankFailed(Exception):
    """This rank cannot go on. Whoever has started the ranks says in the record why, once all have ended.

    `status` and `error` are what the record would say of this rank alone; `by_peer`: it only missed another one.
    """

    def __init__(self, status: str, error: str, by_peer: bool):
        super().__init__(error)
        self.status, self.error, self.by_peer = status, error, by_peer


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of a run, as one of them sees them. Alone, every call gives back what it was given, at no cost.

    Each call is made by all ranks, in the same order.
    """

    place: Place = Place()
    sharding: Literal["none", "ddp", "fsdp"] = "none"
    store: Any = None
    """torch.distributed's, in which the ranks of this attempt have met."""
    mesh: Any = None
    """torch.distributed's DeviceMesh of all ranks where the model is shared out."""

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @property
    def is_first(self) -> bool:
        return self.place.rank == 0

    @property
    def is_sharded(self) -> bool:
        return self.sharding == "fsdp"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share, of equal size to within one item; it may be empty."""
        count = len(items)
        return items[count * self.rank // self.size : count * (self.rank + 1) // self.size]

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the ranks, in double precision."""
        if self.size == 1 or not numbers:
            return list(numbers)
        import torch

        total = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        return flag if self.size == 1 else self.sum([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order."""
        if self.size == 1:
            return [value]
        import torch

        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, where alone it is called; a ValueError or OSError is raised on all ranks."""
        if self.size == 1:
            return make()
        import torch

        found: list[Any] = [None]
        if self.is_first:
            try:
                found = [make()]
            except (ValueError, OSError) as error:
                found = [error]
        torch.distributed.broadcast_object_list(found, src=0)
        if isinstance(found[0], (ValueError, OSError)):
            raise found[0]
        return found[0]

    def leave(self) -> World:
        """Part from the other ranks, who may end; this one goes on alone."""
        if self.size > 1:
            import torch

            self.any(False)
            torch.distributed.destroy_process_group()
        return World()

    def spread(self, choice: Literal["ddp", "fsdp"], device: torch.device) -> World:
        """The same ranks, with the model shared out over them if one of them has chosen so.

        The mesh of their devices is made here, for to make one may take all ranks at once.
        """
        if not self.any(choice == "fsdp"):
            return replace(self, sharding="ddp")
        from torch.distributed.device_mesh import init_device_mesh

        return replace(self, sharding="fsdp", mesh=init_device_mesh(device.type, (self.size,)))

    def describe(self) -> dict[str, Any]:
        """For the record's environment."""
        return {"ranks": self.size, "nodes": self.place.num_nodes, "sharding": self.sharding}


ALONE = World()


@contextlib.contextmanager
def joined(place: Place, store: Any, device: torch.device) -> Iterator[World]:
    """The world of this process; entered by all its ranks.

    Numbers on the CPU go by gloo, tensors of a GPU by NCCL. Ends with the ranks parted, or torn apart by an exception.
    """
    if place.size == 1:
        yield World(place=place)
        return
    import torch.distributed as dist

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=datetime.timedelta(seconds=PEER_SECONDS),
    )
    yield World(place=place, sharding="ddp", store=store)
    if dist.is_initialized():
        dist.destroy_process_group()


def rendezvous(place: Place) -> Any:
    """The store in which the ranks of `place.meeting` leave word for one another; None for a run of one process."""
    if place.size == 1:
        return None
    import torch.distributed as dist

    kind, _, where = place.meeting.partition(":")
    if kind == "file":
        store: Any = dist.FileStore(where, place.size)
        store.set_timeout(datetime.timedelta(seconds=MEET_SECONDS))
        return store
    host, port, prefix = where.rsplit(":", 2)
    timeout = datetime.timedelta(seconds=MEET_SECONDS)
    return dist.PrefixStore(prefix, dist.TCPStore(host, int(port), is_master=False, timeout=timeout))


def broadcast(place: Place, store: Any, make: Callable[[], str]) -> str:
    """A word of rank 0 to all, before they have joined: what `make` gives there."""
    if place.size == 1:
        return make()
    if place.rank == 0:
        word = make()
        store.set("told", word)
        return word
    return store.get("told").decode()


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def use_device(name: str, place: Place) -> torch.device:
    """This process's device, made the current one: of several GPUs that a rank sees, that of its place on its machine.

    InputError where several ranks are to use one.
    """
    import torch

    device = pick_device(name)
    if device.index is not None and place.size > 1:
        raise InputError(f"device = {clip(name)}: {place.size} processes take a GPU each; use cuda")
    if device.type == "cuda":
        if place.size > 1:
            device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def log_name(rank: int) -> str:
    """Where a rank's output goes, in the run's folder."""
    return f"log.{rank}.txt" if rank else "log.txt"


class Gradients:
    """Sums the gradients of what each rank holds whole; those of sharded weights FSDP has summed already."""

    def __init__(self, parameters: Iterable[nn.Parameter], world: World):
        self.world = world
        self.parameters = [p for p in parameters if world.size > 1 and not is_sharded(p)]

    def sum(self) -> None:
        """Of those that have a gradient on some rank in this step; a rank whose share was empty has none at all."""
        if not self.parameters:
            return
        import torch
        from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

        flags = self.world.sum([float(p.grad is not None) for p in self.parameters])
        used = [p for p, flag in zip(self.parameters, flags, strict=True) if flag]
        for p in used:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for bucket in _buckets(p.grad for p in used if p.grad is not None):
            flat = _flatten_dense_tensors(bucket)
            torch.distributed.all_reduce(flat)
            torch._foreach_copy_(bucket, _unflatten_dense_tensors(flat, bucket))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, those of one dtype side by side."""
    buckets: dict[Any, list[Tensor]] = {}
    held: dict[Any, int] = {}
    for tensor in tensors:
        kind = tensor.dtype
        buckets.setdefault(kind, []).append(tensor)
        held[kind] = held.get(kind, 0) + tensor.nbytes
        if held[kind] >= BUCKET_BYTES:
            del held[kind]
            yield buckets.pop(kind)
    yield from buckets.values()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a rank holds only its share of it (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All of a tensor that may be sharded, on every rank; called by all of them."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a tensor that may be sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_peer_loss(error: BaseException) -> bool:
    """Whether an error only says that another rank does not answer."""
    import torch.distributed as dist

    kinds = (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL", "Timed out waiting")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
