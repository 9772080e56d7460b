"""A base whose weights are shared out over the ranks (FSDP2), and checkpoints of which each rank writes its part.

Every block of the model is a unit, and the rest another: its weights are gathered for the forward and the backward
pass and given up again; gradients and the optimizer's state are shared out like the weights. What a method trains
beside a frozen base is small, and stays whole on every rank.

A checkpoint of shares is a folder of torch.distributed.checkpoint beside the file that names it: the file is written
last, so there is a whole checkpoint or the one before. It is read again on any number of ranks.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lorabench.config.decode import InputError
from lorabench.config.durable import sync
from lorabench.models import base_model as models
from lorabench.processes.distributed import Sharding, World, is_sharded
from lorabench.spec.run_spec import RunSpec

FITS = 0.8
"""Share of a GPU's memory that the weights may take before they are shared out."""
FOLDER, METADATA = "shares-", ".metadata"
T = TypeVar("T")


def choose(spec: RunSpec, asked: Sharding, device: torch.device, options: dict[str, Any]) -> Literal["ddp", "fsdp"]:
    """How a run's model is spread over ranks. InputError where what is asked for cannot be had."""
    reason = _whole(spec)
    if asked == "fsdp" and reason:
        raise InputError(f"--sharding fsdp: {reason}; use ddp, which gives every rank the whole base")
    if asked != "auto":
        return asked
    needed = spec.method.trains_base or _is_too_large(spec, device, options)
    return "fsdp" if needed and not reason else "ddp"


def _whole(spec: RunSpec) -> str:
    """Why every rank needs the whole model; empty where it does not."""
    if spec.quantization != "none":
        return f'quantization = "{spec.quantization}": the weights of bitsandbytes cannot be shared out'
    if spec.method.merges_as_it_goes:
        return f"method {spec.method.name} merges into base weights as it trains"
    if not spec.optimizer.by_number:
        return f'optimizer = "{spec.optimizer.name}": its steps need whole matrices'
    return ""


def _is_too_large(spec: RunSpec, device: torch.device, options: dict[str, Any]) -> bool:
    if device.type != "cuda":
        return False
    numbers = sum(p.numel() for p in models.skeleton(spec, options).parameters())
    held = numbers * getattr(torch, spec.dtype).itemsize
    return held > FITS * torch.cuda.get_device_properties(device).total_memory


def loads_on(world: World, device: torch.device) -> torch.device:
    """Where a base is loaded: one that is to be shared out need not fit a GPU."""
    return torch.device("cpu") if world.is_sharded else device


def in_turn(world: World, make: Callable[[], T]) -> T:
    """What `make` gives: at once, or where it loads a whole base only to share it out, by one rank of a machine after
    the other, so that the machine holds one base at a time.

    A machine's memory has to have room for a whole base beside the shares: 4 bytes a parameter where the base is
    trained, 28 GB for 7B. To load takes as many times as long as a machine has ranks.
    """
    if not world.is_sharded:
        return make()
    for turn in range(world.place.local_size):
        if turn == world.place.local_rank:
            made = make()
        world.any(False)
    return made


def shard(model: nn.Module, world: World, device: torch.device, trains_base: bool) -> nn.Module:
    """Share a model's weights out, in place: all, or those that are not trained. It may be larger than `device`."""
    if not world.is_sharded:
        return model
    from torch.distributed.fsdp import FSDPModule, fully_shard

    kept = (
        set()
        if trains_base
        else {
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad or ".modules_to_save." in name or parameter.numel() == 1
        }
    )
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=world.mesh, ignored_params=kept)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # gradients are summed: the loss is over the global count already
            module.set_force_sum_reduction_for_comms(True)
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
    return model


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the model's outermost lists of modules: a transformer's blocks."""
    outermost: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost.append(name)
            yield from (block for block in module if any(True for _ in block.parameters()))


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor that every rank holds, shared out as `target` is."""
    if not is_sharded(target) or is_sharded(tensor) or tensor.ndim == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    assert isinstance(target, torch.distributed.tensor.DTensor)
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def write_shares(
    trained: dict[str, Tensor], optimizer: torch.optim.Optimizer, folder: Path, world: World
) -> dict[str, Any]:
    """Write this rank's share of the trained tensors and of the optimizer's state to a new folder below `folder`.

    What the checkpoint's file says of it. It stands once that file is there; `drop_shares` then removes the older ones.
    """
    from torch.distributed import checkpoint

    name = world.from_first(lambda: f"{FOLDER}{uuid.uuid4().hex[:8]}")
    state = optimizer.state_dict()
    checkpoint.save(_named(trained, state["state"]), checkpoint_id=folder / name)
    # Each rank looks at its own files: to see another machine's at once is more than NFS promises.
    own = [*(folder / name).glob(f"__{world.rank}_*"), *([folder / name / METADATA] if world.is_first else [])]
    sync(folder / name)
    sizes = world.gather({file.name: file.stat().st_size for file in own})
    return {
        "shares": name,
        "share_bytes": {k: v for each in sizes for k, v in each.items()},
        "moments": {number: list(kept) for number, kept in state["state"].items()},
        "optimizer": {"param_groups": state["param_groups"]},
    }


def drop_shares(folder: Path, keep: str | None) -> None:
    """Remove all shares but those of this name."""
    for found in folder.glob(f"{FOLDER}*"):
        if found.name != keep:
            shutil.rmtree(found, ignore_errors=True)  # what is left of them is in nobody's way


def read_shares(
    state: dict[str, Any], trained: dict[str, Tensor], optimizer: torch.optim.Optimizer, folder: Path, world: World
) -> dict[str, Any]:
    """The checkpoint's `state` with `model` and `optimizer`, laid out as the run has them now.

    ValueError, on all ranks, where the shares are damaged or are of other parameters.
    """
    from torch.distributed import checkpoint

    shares = folder / os.path.basename(state["shares"])
    if world.from_first(lambda: _sizes(shares, state["share_bytes"])) != state["share_bytes"]:
        raise ValueError("lacks a part of its shares, or has another one")
    groups = state["optimizer"]["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(numbers) != len(parameters):
        raise ValueError("holds other parameters than this version trains")
    named = dict(zip(numbers, parameters, strict=True))
    moments = {number: _moments(named[number], keys) for number, keys in state["moments"].items() if number in named}
    model = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    try:
        checkpoint.load(_named(model, moments), checkpoint_id=shares, no_dist=world.size == 1)
    except (checkpoint.CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[-1:]
        raise ValueError(f"cannot be read: {type(error).__name__}: {''.join(reason)}") from error
    return state | {"model": model, "optimizer": {"state": moments, "param_groups": groups}}


def share_out(state: dict[str, Any], trained: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A checkpoint's `state` of whole tensors, laid out as the run has them now."""
    if not any(map(is_sharded, trained.values())):
        return state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {key: like(value, parameters[number]) for key, value in kept.items()}
        for number, kept in state["optimizer"]["state"].items()
    }
    model = {name: like(tensor, trained.get(name, tensor)) for name, tensor in state["model"].items()}
    return state | {"model": model, "optimizer": state["optimizer"] | {"state": moments}}


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    files = [folder / os.path.basename(name) for name in names]
    return {file.name: file.stat().st_size for file in files if file.is_file()}


def _named(trained: dict[str, Tensor], moments: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    named = {f"model.{name}": tensor for name, tensor in trained.items()}
    return named | {f"optimizer.{n}.{key}": value for n, kept in moments.items() for key, value in kept.items()}


def _moments(parameter: Tensor, keys: Iterable[str]) -> dict[str, Tensor]:
    """An optimizer's state of one parameter, to be filled; a parameter that has had no gradient yet has none."""
    kept = parameter.detach()
    return {key: torch.zeros((), device=kept.device) if key == "step" else torch.zeros_like(kept) for key in keys}
