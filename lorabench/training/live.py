"""Bytes of live tensors, exactly: what a step needs whatever the allocator keeps, and the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lorabench.processes.distributed import local_part


class LiveTensors(TorchDispatchMode):
    """Counts the storages of `held` and of every tensor that is made inside; `peak` is the most at one time (bytes).

    Sees what goes through torch's dispatcher: memory that a library takes for itself (oneDNN's scratch space, say) is
    not a tensor and not counted. Each operation costs some microseconds more, so it is meant for single steps.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = 0
        self._seen: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        for tensor in held:
            self._add(tensor)
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = local_part(tensor).untyped_storage()
        if storage not in self._seen:  # a view shares its storage
            self._seen[storage] = None
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.live -= size
