"""Any adapter that is factored, written as PEFT's LoRA: where the mapping is exact, and not otherwise.

Each module keeps its own rank and, with the scale in B, s = 1: `lora_alpha` is r, by module where ranks differ.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabench.decode import InputError
from lorabench.formats import Adapter
from lorabench.layer import LayerSVD
from lorabench.locate import adapter_path, weights_path
from lorabench.readers.peft_lora import ADAPTER_FILE, CONFIG_FILE
from lorabench.record import disk_errors
from lorabench.tensorfile import read_json
from lorabench.update import Update
from lorabench.weightfile import WeightFiles, flat_name, is_embedding

NOT_EXACT = {"torchtune": "it permutes the rows of queries and keys for its rotary embedding, and the model that PEFT "
             "loads does not"}  # fmt: skip
"""Formats of which the names or rows are not those of the model that PEFT would attach to."""
_COMPONENT = re.compile(r"(unet|transformer|text_encoder(?:_\d)?|prior|decoder)\.(?=.)")


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One module to write: its name in the model, and what goes there."""

    module: str
    B: Tensor
    """(M, r), with the scale in it."""
    A: Tensor
    """(r, N)"""
    kernel: tuple[int, ...] = ()
    """Of a convolution: (height, width)."""
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """By PEFT's names and in its shapes."""
        B, A = self.B, self.A
        if self.kernel:
            A = A.reshape(self.rank, -1, *self.kernel)
            B = B.reshape(*B.shape, *(1 for _ in self.kernel))
        ends = ("lora_embedding_B", "lora_embedding_A") if self.embedding else ("lora_B.weight", "lora_A.weight")
        return {
            f"base_model.model.{self.module}.{end}": tensor.clone(memory_format=torch.contiguous_format)
            for end, tensor in zip(ends, (B, A), strict=True)
        }


def convert(adapter: Adapter, folder: Path, base_model: str | None = None) -> list[str]:
    """Write `adapter` in PEFT's format into `folder`, new or empty, so that PEFT computes the same ΔW; returns notes
    beside the adapter's own.

    `base_model` (a folder, a file, a Hub id, `builtin:NAME`) is named in the configuration, and its weights say how
    the modules are really called and what they are. Without it, adapters of several models in one file (diffusers)
    are written into a sub-folder each. InputError, and nothing written, where ΔW is not exactly a product of two
    factors, or it is not known which module it belongs to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"OUTPUT = {folder}: is not empty; nothing is overwritten")
    if reason := NOT_EXACT.get(adapter.format):
        raise InputError(f"{adapter.source}: {adapter.format} cannot be written as PEFT exactly: {reason}")
    base = None if base_model is None else WeightFiles(weights_path(base_model))
    models = _models(adapter)
    if base is not None and len(models) > 1:
        raise InputError(
            f"{adapter.source}: holds adapters of several models ({', '.join(models)}): without --base, each is "
            "written into a folder of its own"
        )
    name = base_model or _base_of(adapter)
    found = {model: _targets(adapter, prefix, base) for model, prefix in models.items()}
    for model, targets in found.items():
        _write(targets, folder / model if len(found) > 1 else folder, name)
    several = [f"one folder a model: {', '.join(found)}"] if len(found) > 1 else []
    return [*several, *_notes(adapter, base, name)]


def _write(targets: list[Target], folder: Path, base_model: str | None) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for target in targets for name, tensor in target.tensors().items()}
    with disk_errors(folder / ADAPTER_FILE):
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(configuration(targets, base_model), indent=2, sort_keys=True) + "\n")


def configuration(targets: list[Target], base_model: str | None) -> dict[str, Any]:
    """PEFT's, with s = 1 everywhere: the most frequent rank as `r`, and patterns for the others."""
    rank = Counter(target.rank for target in targets).most_common(1)[0][0]
    # Anchored: of PEFT's patterns the first that fits a name's end counts.
    others = {f"^{re.escape(target.module)}": target.rank for target in targets if target.rank != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(target.module for target in targets),
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(adapter: Adapter, prefix: str, base: WeightFiles | None) -> list[Target]:
    """What is to be written of the names with a prefix. InputError with all that stands in the way."""
    problems: list[str] = []
    targets: dict[str, Target] = {}
    for parameter, entry in adapter.entries.items():
        if not parameter.startswith(prefix):
            continue
        try:
            update = _factored(entry.load(), parameter)
            if getattr(entry, "groups", 1) > 1:
                raise InputError(f"{parameter}: of a grouped convolution, whose B is a part of this one")
            target = _target(update, _module(parameter.removeprefix(prefix), base), base)
            if target.module in targets:
                raise InputError(f"{parameter}: belongs to {target.module}, as another does")
            targets[target.module] = target
        except InputError as error:
            problems += error.problems
    if problems:
        shown = problems[:4] + ([f"and so {len(problems) - 4} more"] if len(problems) > 4 else [])
        raise InputError([f"{adapter.source}: cannot be written as PEFT exactly: {problem}" for problem in shown])
    return list(targets.values())


def _factored(update: Update | LayerSVD, parameter: str) -> Update:
    if isinstance(update, LayerSVD):
        raise InputError(f"{parameter}: only singular values and vectors of ΔW were kept (svd:K)")
    if update.part:
        raise InputError(f"{parameter}: is DoRA's part {update.part}, and ΔW is not it alone")
    if update.A is None:
        raise InputError(f"{parameter}: ΔW is dense: two factors would not be exact")
    if not parameter.endswith(".weight"):
        raise InputError(f"{parameter}: is not the weight of a module")
    return update


def _module(parameter: str, base: WeightFiles | None) -> str:
    """The module's name in the model. InputError where it is not certain."""
    layer = parameter.removesuffix(".weight")
    if "[" in layer:
        raise InputError(f"{parameter}: is some rows of a fused layer, and no module of its own")
    if base is None:
        if flat_name(parameter):
            raise InputError(f"{parameter}: `_` may stand for `.`: which module it is, only --base can tell")
        return layer
    name = base.find(parameter)
    if name is None:
        raise InputError(f"{parameter}: the base {base.path} has no such weight, or several")
    return name.removesuffix(".weight")


def _target(update: Update, module: str, base: WeightFiles | None) -> Target:
    assert update.A is not None
    kernel = update.kernel
    if base is not None:
        shape = base.shape(f"{module}.weight")
        if shape != update.shape:
            raise InputError(f"{update.parameter}: ΔW {update.shape}, and the base's weight is {shape}")
        kernel = base.stored_shape(f"{module}.weight")[2:]
    return Target(module=module, B=update.B, A=update.A, kernel=kernel, embedding=is_embedding(f"{module}.weight"))


def _models(adapter: Adapter) -> dict[str, str]:
    """The models that a file is of, and what diffusers puts before the names of each: `unet.`."""
    if adapter.format != "diffusers":
        return {"": ""}
    found = {match[0] if (match := _COMPONENT.match(name)) else "" for name in adapter.entries}
    if "" in found:
        return {"": ""}
    return {prefix.removesuffix("."): prefix for prefix in sorted(found)}


def _base_of(adapter: Adapter) -> str | None:
    """The base that the source's own PEFT configuration names."""
    path = adapter_path(adapter.source)
    file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    name = read_json(file).get("base_model_name_or_path") if file.exists() else None
    return name if isinstance(name, str) else None


def _notes(adapter: Adapter, base: WeightFiles | None, name: str | None) -> Iterator[str]:
    if adapter.scale_source == "assumed":
        yield "the scale is assumed, and now stands in the file"
    if base is None:
        yield "names of modules are as in the source, not held against a base (--base)"
    if name is None:
        yield f"{CONFIG_FILE} names no base model (--base)"
