"""The fork server's imports of other packages, all that a run or a plan needs of them, as quickly as they can be had.

None may start a thread or a CUDA context, which would not survive the fork.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from lorabench.launch.worker import ALONE_VARIABLE
from lorabench.processes.machine import has_gpu_driver

MODULES = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "peft.utils.transformers_weight_conversion",
    "lorabench.training.execute",
)
NO_GPU_MODULES = ("transformers.integrations.bitsandbytes",)
"""bitsandbytes asks a GPU for its capability when imported, so it is left to the runs where there is one."""


def _import_all() -> None:
    with _uncollected():
        if os.environ.pop(ALONE_VARIABLE, None):
            _undistributed()
        _compiler_when_asked()
        with _listed_once():
            importlib.import_module("transformers.models")
        with _imported_when_called("scipy.optimize", "linear_sum_assignment"):
            importlib.import_module("transformers.loss.loss_utils")
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
def _listed_once() -> Iterator[None]:
    """transformers looks through the sources of all its models for their names when it is imported, and again for
    `transformers.models`, for it keeps the names of 128 of its folders alone: a twelfth of all the time."""
    import transformers
    from transformers.utils import import_utils

    if not hasattr(import_utils, "create_import_structure_from_path"):  # another version: then it takes the time
        yield
        return
    list_names, folder = import_utils.create_import_structure_from_path, Path(transformers.__file__).parent / "models"
    all_names = list_names(folder)  # which is what it has looked through last
    known = {str(folder): all_names, str(folder / "__init__.py"): all_names}
    import_utils.create_import_structure_from_path = lambda path: known.get(str(path)) or list_names(path)  # type: ignore[assignment]
    try:
        yield
    finally:
        import_utils.create_import_structure_from_path = list_names


class _Compiler(ModuleType):
    """Stands for `torch._dynamo` until anything is asked of it but its marks for functions that it should not compile.

    Such marks are put on functions that are called and never compiled, by transformers and by torch itself (random
    numbers on the meta device, an optimizer's steps). They hold once the compiler is there.
    """

    def __init__(self, spec: ModuleSpec):
        super().__init__(spec.name)
        self.__spec__, self.__path__ = spec, list(spec.submodule_search_locations or ())
        self._marked: list[tuple[str, Callable[..., Any]]] = []
        self.trace_rules = _Rules(self)
        self._parts = _Parts(self)
        sys.modules[self.__name__] = self
        sys.meta_path.insert(0, self._parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what `inspect` asks of every module
            raise AttributeError(name)
        return getattr(self.compiler(), name)

    def compiler(self) -> ModuleType:
        if sys.modules[self.__name__] is self:
            sys.meta_path.remove(self._parts)
            del sys.modules[self.__name__]
            compiler = importlib.import_module(self.__name__)
            for mark, function in self._marked:
                getattr(compiler, mark)(function)
        return sys.modules[self.__name__]

    def disable(self, function: Callable[..., Any] | None = None, *values: Any, **named: Any) -> Callable[..., Any]:
        if function is None:
            return lambda function: self.disable(function, *values, **named)
        disabled = functools.cache(lambda: self.compiler().disable(function, *values, **named))

        @functools.wraps(function)
        def call(*arguments: Any, **more: Any) -> Any:
            return (function if sys.modules[self.__name__] is self else disabled())(*arguments, **more)

        return call

    def graph_break(self, *values: Any, **named: Any) -> None:
        """Nothing, where nothing is compiled: an optimizer asks for it before and after each step."""

    def assume_constant_result(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self._marked.append(("assume_constant_result", function))
        return function

    def allow_in_graph(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self._marked.append(("allow_in_graph", function))
        return function


class _Rules:
    """Stands for the compiler's `trace_rules`: when a group of processes begins, torch has them forget what they have
    kept of functions. Nothing is kept where there is no compiler, which takes a second of each process."""

    def __init__(self, stand_in: _Compiler):
        self._stand_in = stand_in

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stand_in.compiler().trace_rules, name)

    def clear_lru_cache(self) -> None:
        compiler = sys.modules[self._stand_in.__name__]
        if compiler is not self._stand_in:
            compiler.trace_rules.clear_lru_cache()


class _Parts(MetaPathFinder):
    """Has all of the compiler imported before a part of it, but for that of which transformers takes a class, and for
    the settings, which tensors without numbers look at (FSDP's have some, at a second of each process)."""

    APART = ("torch._dynamo._trace_wrapped_higher_order_op", "torch._dynamo.config")

    def __init__(self, stand_in: _Compiler):
        self.stand_in = stand_in

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name.startswith(f"{self.stand_in.__name__}.") and name not in self.APART:
            self.stand_in.compiler()
            if name in sys.modules:
                return spec_from_loader(name, _Imported(sys.modules[name]))
        return None


class _Imported(Loader):
    """Of a module that has been imported while it was looked for."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def _compiler_when_asked() -> None:
    """torch's compiler, a fifth of all the time, is there once it is needed: mostly never."""
    spec = importlib.util.find_spec("torch._dynamo")
    if spec and spec.name not in sys.modules:
        _Compiler(spec)


def _undistributed() -> None:
    """torch says that it was built without them, as some builds are: so transformers leaves out all that it has for
    sharded tensors, an eighth of all the time."""
    import torch

    torch.distributed.is_available = lambda: False


@contextlib.contextmanager
def _imported_when_called(module: str, function: str) -> Iterator[None]:
    """Whoever imports the function meanwhile has one that imports it when called: transformers imports SciPy, a seventh
    of all the time, for the loss of object detectors."""

    def call(*values: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*values, **named)

    if module in sys.modules:
        yield
        return
    sys.modules[module] = ModuleType(module)
    setattr(sys.modules[module], function, call)
    try:
        yield
    finally:
        del sys.modules[module]


@contextlib.contextmanager
def _compiled_when_called() -> Iterator[None]:
    """bitsandbytes has some functions compiled when imported, which imports inductor: a quarter of all the time, and
    they are mostly never called. They are the same functions once they are."""
    import torch

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


def _keep_bars_apart() -> None:
    """Progress bars share a semaphore with the processes of other runs, by tqdm's default: one that is killed while it
    draws would leave all others waiting for ever, in the bar of transformers' loading. And a thread watches them."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0


_import_all()
_keep_bars_apart()
