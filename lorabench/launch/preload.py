"""The fork server's imports of other packages, all that a run or a plan needs of them, as quickly as they can be had.

None may start a thread or a CUDA context, which would not survive the fork.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lorabench.processes.machine import has_gpu_driver

MODULES = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "peft.utils.transformers_weight_conversion",
    "pandas",
    "lorabench.training.execute",
)
NO_GPU_MODULES = ("transformers.integrations.bitsandbytes",)
"""bitsandbytes asks a GPU for its capability when imported, so it is left to the runs where there is one."""


def _import_all() -> None:
    with _uncollected():
        if not has_gpu_driver():
            with _compiled_when_called():
                for name in NO_GPU_MODULES:
                    importlib.import_module(name)
        for name in MODULES:
            importlib.import_module(name)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Half a million objects are made, of which none is garbage: to look for some takes a sixth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _compiled_when_called() -> Iterator[None]:
    """bitsandbytes has some functions compiled when imported, which imports inductor: a quarter of all the time, and
    they are mostly never called. They are the same functions once they are."""
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *values, **named: compiled()(*values, **named))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


_import_all()
