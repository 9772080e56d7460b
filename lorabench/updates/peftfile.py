"""An adapter in PEFT's format as lorabench writes it: factors with s = 1, and all that the source has beside them.

Each module keeps its own rank and, with the scale in B, `lora_alpha` is r, by module where ranks differ. What a source
has saved whole, and what its configuration says beside scale and targets, is carried over. Shapes: M out features, N in
features, r rank, E experts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.advice import exact_key
from lorabench.updates.formats import Adapter
from lorabench.updates.locate import adapter_path
from lorabench.updates.readers._entry import Source, read_json
from lorabench.updates.readers._names import PREFIX
from lorabench.updates.readers.peft_lora import ADAPTER_FILE, CONFIG_FILE
from lorabench.updates.tensorfile import disk_errors

RESOLVED = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "inference_mode", "peft_type",
)  # fmt: skip
"""Fields of PEFT's LoRA that stand in other words in what is written: each module by its own name, s = 1."""
OF_ADALORA = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
OF_TUNERS = ("alpha", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "init_weights",
             "decompose_both", "decompose_factor", "projection_prng_key", "save_projection", "vera_dropout",
             "d_initial", "feedforward_modules", "init_ia3_weights", "oft_block_size", "coft", "eps", "block_share",
             "use_cayley_neumann", "num_cayley_neumann_terms")  # fmt: skip
"""Fields of those of PEFT's other tuners that are read (`_peft_forms`): how ΔW was trained, or its form."""
NOT_EXACT = {"torchtune": "it permutes the rows of queries and keys for its rotary embedding, and the model that PEFT "
             "loads does not"}  # fmt: skip
"""Formats of which the names or rows are not those of the model that PEFT would attach to."""
_LORA_BIAS = ".lora_B.bias"


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One module to write: its name in the model, and what goes there."""

    module: str
    B: Tensor
    """(M, r), with the scale in it; of stacked experts (M, r E)."""
    A: Tensor
    """(r, N); of stacked experts (E r, N)."""
    rank: int
    kernel: tuple[int, ...] = ()
    """Of a convolution: (height, width)."""
    embedding: bool = False
    magnitude: Tensor | None = None
    """Of DoRA: m, one number an output."""
    parameter: str | None = None
    """Of stacked experts and routers (`target_parameters`): what patterns call it."""

    def tensors(self) -> dict[str, Tensor]:
        """By PEFT's names and in its shapes."""
        B, A = self.B, self.A
        if self.kernel:
            A = A.reshape(self.rank, -1, *self.kernel)
            B = B.reshape(*B.shape, *(1 for _ in self.kernel))
        ends = ("lora_embedding_B", "lora_embedding_A") if self.embedding else ("lora_B.weight", "lora_A.weight")
        found = dict(zip(ends, (B, A), strict=True))
        if self.magnitude is not None:
            m = self.magnitude.flatten()
            found["lora_magnitude_vector"] = m.reshape(1, -1, *(1 for _ in self.kernel)) if self.kernel else m
        return {f"{PREFIX}{self.module}.{end}": _own(tensor) for end, tensor in found.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Beside:
    """What an adapter holds beside the factors. `tensors` by the names that the untouched model has for them, `modules`
    those that were saved whole, by their full names; `config` is what is carried of the configuration."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    def named(self, targets: Iterable[Target]) -> dict[str, Tensor]:
        """By the names of PEFT's file: a module that has factors too is inside them."""
        inside = {target.module for target in targets}
        found = {}
        for name, tensor in self.tensors.items():
            module, _, leaf = name.rpartition(".")
            found[f"{PREFIX}{module}.base_layer.{leaf}" if module in inside else PREFIX + name] = _own(tensor)
        return found


def beside(adapter: Adapter, renamed: Callable[[str], str] = lambda name: name) -> Beside:
    """Of an adapter, by the names that `renamed` gives a parameter. InputError where a lost configuration is missed.

    PEFT takes each module whose name ends with one of `modules_to_save`: all that were saved stand there in full.
    """
    saved = _told_saved(adapter)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, None] = {}
    for name, other in adapter.others.items():
        tensor = other.load()
        if name.endswith(_LORA_BIAS):
            tensor = tensor * _scale(adapter, name.removesuffix(_LORA_BIAS))
        now = renamed(name)
        tensors[now] = tensor
        module = _saved_module(name, saved)
        if module is not None:
            modules[now.removesuffix(name.removeprefix(module))] = None
    return Beside(tensors=tensors, modules=tuple(modules), config=carried(adapter.config) | _told_by_tensors(adapter))


def _told_saved(adapter: Adapter) -> tuple[str, ...]:
    """`modules_to_save`; where there is no configuration, the modules of which a weight was."""
    told = adapter.config.get("modules_to_save") or ()
    if not adapter.config:
        told = [name.removesuffix(".weight") for name in adapter.others if name.endswith(".weight")]
    return tuple(name for name in told if isinstance(name, str))


def _told_by_tensors(adapter: Adapter) -> dict[str, Any]:
    """Fields of a lost configuration without which PEFT would leave out tensors that it has saved."""
    if adapter.config:
        return {}
    if rows := [name for name in adapter.others if ".token_adapter." in name]:
        raise InputError(
            f"{adapter.source}: {rows[0]}: of which tokens these are the rows, only {CONFIG_FILE} can tell"
        )
    biases = [name for name in adapter.others if name.endswith(".bias")]
    of_factors = any(name.endswith(_LORA_BIAS) for name in biases)
    return {"lora_bias": of_factors, "bias": "none" if of_factors or not biases else "all"}


def check_whole(adapter: Adapter) -> None:
    """InputError for what has no whole ΔW, or one of another model than that which PEFT would load."""
    file = Source(path=adapter_path(adapter.source)).folder / CONFIG_FILE
    if method := (read_json(file) if file.is_file() else {}).get("lorabench_method"):
        raise InputError(f"{adapter.source}: {clip(method)} adds computation that no ΔW stands for")
    if reason := NOT_EXACT.get(adapter.format):
        raise InputError(f"{adapter.source}: {adapter.format} cannot be written as PEFT exactly: {reason}")


def _scale(adapter: Adapter, module: str) -> float:
    """By which PEFT multiplies what B adds, its bias too."""
    names = (name for name in adapter.entries if re.sub(r"\[\w+\]", "", name) == f"{module}.weight")
    scale = getattr(adapter.entries.get(next(names, "")), "scale", None)
    if not isinstance(scale, (int, float)):
        raise InputError(f"{adapter.source}: {module}{_LORA_BIAS}: has no factors beside it")
    return scale


def _saved_module(name: str, saved: tuple[str, ...]) -> str | None:
    """The outermost module around a tensor that PEFT takes for one of `modules_to_save`."""
    parts = name.split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((module for module in modules if saved and module.endswith(saved)), None)


def carried(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a source's configuration that hold for what is written of it too, unknown ones included."""
    kind = config.get("peft_type")
    left = (*RESOLVED, *(OF_ADALORA if kind == "ADALORA" else OF_TUNERS if kind != "LORA" else ()))
    return {key: value for key, value in config.items() if key not in left}


def configuration(targets: Collection[Target], beside: Beside, usual: int | None = None) -> dict[str, Any]:
    """PEFT's, with s = 1 everywhere: as `r` the most frequent rank, or `usual`, and patterns for the others."""
    rank = usual or Counter(target.rank for target in targets).most_common(1)[0][0]
    names = {target.parameter or target.module: target.rank for target in targets}
    others = {exact_key(name): rank_here for name, rank_here in names.items() if rank_here != rank}
    defaults: dict[str, Any] = {"base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
                                "lora_dropout": 0.0, "task_type": None}  # fmt: skip
    return defaults | beside.config | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(target.module for target in targets if target.parameter is None),
        "modules_to_save": sorted(beside.modules) or None,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": any(target.magnitude is not None for target in targets),
        "use_rslora": False,
    }  # fmt: skip


def save_adapter(folder: Path, targets: Collection[Target], beside: Beside, config: dict[str, Any]) -> None:
    """Write the files into a folder that is there."""
    from safetensors.torch import save_file

    tensors = {name: tensor for target in targets for name, tensor in target.tensors().items()}
    with disk_errors(folder / ADAPTER_FILE):
        save_file(tensors | beside.named(targets), folder / ADAPTER_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when all is written."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def padded(target: Target, rank: int) -> Target:
    """The same product with factors of a higher rank: the rest is zero."""
    more = rank - target.rank
    return replace(target, rank=rank, B=pad(target.B, (0, more)), A=pad(target.A, (0, 0, 0, more)))


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
