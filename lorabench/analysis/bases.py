"""The untouched weights W0 that runs have changed: read from the model's files one at a time, each SVD cached on disk.

    RESULTS/bases/<SHA-256 of W0>.safetensors     every singular value and left vector, the top right ones

What a run's ΔW counts from is in `provenance.update` of its record: the original weights, in the dtype in which they
were loaded, or the dequantized ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorabench.config import plugins
from lorabench.config.decode import InputError
from lorabench.linalg.decompose import ThinSVD
from lorabench.models import denoisers
from lorabench.models.base_model import local_files
from lorabench.store.record import RunRecord
from lorabench.updates.base import BaseLayer, Tuned, decompose, with_exact_top
from lorabench.updates.layer import LayerSVD
from lorabench.updates.old_experts import names_in_files
from lorabench.updates.other_names import old_image_names
from lorabench.updates.parts import Part, fused_name
from lorabench.updates.tensorfile import TensorFile
from lorabench.updates.weightfile import WeightFiles

FOLDER = "bases"
IMAGES = "AutoModelForImageClassification"
"""What transformers loads as such has other names in its files than in the model."""


@dataclass(frozen=True, kw_only=True)
class BaseKey:
    """What tells one base from another: the weights and what loading makes of them."""

    model: str
    revision: str | None
    dtype: str
    quantization: str
    auto_class: str
    """What transformers loads it as: its heads are not quantized."""

    @classmethod
    def of(cls, record: RunRecord) -> BaseKey:
        spec = record.spec
        task = spec["tasks"][0] if "tasks" in spec else spec["task"]
        trains_base = plugins.plugin_class("methods", spec["method"]["name"]).trains_base  # type: ignore[attr-defined]
        return cls(
            model=spec["model"],
            revision=record.environment.get("model_commit") or spec["revision"],
            dtype="float32" if trains_base else spec["dtype"],
            quantization=spec["quantization"],
            auto_class=plugins.plugin_class("tasks", task["name"]).auto_class,  # type: ignore[attr-defined]
        )


class Bases:
    """The bases of a store's runs, each opened once. One that cannot be opened is told once, by `note`."""

    def __init__(self, cache: Path, note: Callable[[str], None]):
        self._cache, self._note = cache, note
        self._found: dict[BaseKey, Base | None] = {}
        self._last: tuple[tuple[BaseKey, str, bool], BaseLayer | None] | None = None

    def find(self, record: RunRecord) -> Base | None:
        """The base of a run; None where its files are not on this machine, or damaged."""
        key = BaseKey.of(record)
        if key not in self._found:
            try:
                self._found[key] = Base(key, self._cache)
            except InputError as error:
                self._found[key] = None
                self._note(f"not analyzed beside its base: {error}")
        return self._found[key]

    def tuned(self, record: RunRecord, layer: LayerSVD, old_names: bool = False) -> Tuned | None:
        """A run's layer on its W0; None where the base has no such weight, or ΔW is not there as a whole.

        `old_names`: as in `Base.weight`.
        """
        base, place = self.find(record), (BaseKey.of(record), layer.parameter, old_names)
        if base is None or (layer.update is None and not layer.is_complete):
            return None
        if self._last is None or self._last[0] != place:  # the runs of a batch come layer by layer
            self._last = None
            part = layer.update.fused if layer.update else None
            self._last = place, base.layer(layer.parameter, part, old_names)
        found = self._last[1]
        if found is None or found.weight.shape != layer.shape:
            return None
        return Tuned(layer=layer, base=found)


class Base:
    """One base's weights by parameter. InputError where its files are not on this machine, or damaged."""

    def __init__(self, key: BaseKey, cache: Path):
        self.key, self.cache = key, cache
        self._weights = WeightFiles(local_files(key.model, key.revision))

    def weight(self, parameter: str, old_names: bool = False) -> Tensor | None:
        """W0 (M, N) in float32 as the run had it; None where the files have none (a new task head).

        With `old_names` also by what files call experts that they do not keep stacked, as transformers 5 has them.
        """
        names = [*names_in_files(parameter), parameter] if old_names else [parameter]
        if self.key.auto_class == IMAGES:
            names += old_image_names(parameter)
        stored = next((name for name in names if self._weights.find(name)), None)
        if stored is None:
            return None
        weight = self._weights.read(stored).to(getattr(torch, self.key.dtype))
        of_file = self._weights.stored_shape(stored)
        if len(of_file) == 3 and of_file[0] == 1:  # a ViT's position embeddings: their ΔW is (t, d)
            weight = weight.view(of_file[1:])
        if self.key.quantization != "none" and parameter.removesuffix(".weight") in self._quantized:
            weight = rounded(weight, self.key.quantization)
        return weight.float().contiguous()

    def layer(self, parameter: str, part: Part | None = None, old_names: bool = False) -> BaseLayer | None:
        """W0 with its SVD, from the cache where it is there; None where the files have no such weight.

        A part's are its rows of the fused weight, unless it is a weight of its own in the files, as experts' are.
        """
        weight = self.weight(parameter, old_names)
        if weight is None and part is not None:
            whole = self.weight(fused_name(parameter))
            weight = None if whole is None else part.rows(whole)
        if weight is None or weight.shape[1] < 2:
            return None
        return cached(weight, self.cache)

    @cached_property
    def _quantized(self) -> frozenset[str]:
        """The layers that bitsandbytes replaces."""
        import transformers

        from lorabench.models.targets import quantized_layers

        files = local_files(self.key.model, self.key.revision)
        if self.key.auto_class == denoisers.AUTO_CLASS:
            folder, source = files.parent, self.key.model
            config = denoisers.read_config(folder, source)
            return frozenset(quantized_layers(denoisers.from_config(folder, source, config, torch.device("meta"))))
        config = transformers.AutoConfig.from_pretrained(files)
        with torch.device("meta"):
            model = getattr(transformers, self.key.auto_class).from_config(config)
        return frozenset(quantized_layers(model))


def rounded(weight: Tensor, quantization: str) -> Tensor:
    """What is left of a weight (out, in) after quantization to `int8` or `nf4` as runs are quantized."""
    from bitsandbytes import functional

    if quantization == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return functional.int8_vectorwise_dequant(values, scales)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(packed, state)


def cached(weight: Tensor, cache: Path) -> BaseLayer:
    """W0 with its SVD, which is made once for all runs and processes that share the cache."""
    file = cache / f"{digest(weight)}.safetensors"
    found = _read(file, weight)
    if found is not None:
        return found
    with _locked(file):
        found = _read(file, weight)  # another process may have made it meanwhile
        if found is None:
            found = decompose(weight)
            _write(file, found)
    return found


def digest(weight: Tensor) -> str:
    """SHA-256 of a weight's shape and content."""
    content = hashlib.sha256(f"{tuple(weight.shape)}".encode())
    content.update(weight.contiguous().numpy().data)
    return content.hexdigest()


def _read(file: Path, weight: Tensor) -> BaseLayer | None:
    """None where it is not there, or not whole."""
    if not file.is_file():
        return None
    try:
        tensors = TensorFile(file)
        U, S, Vh, left = (tensors.read(name) for name in ("U", "S", "Vh", "left"))
    except InputError:
        return None
    return BaseLayer(weight=weight, svd=ThinSVD(U=U, S=S, Vh=Vh), left=with_exact_top(left, U))


def _write(file: Path, layer: BaseLayer) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    save_file({"U": layer.svd.U, "S": layer.svd.S, "Vh": layer.svd.Vh, "left": layer.left.half()}, temporary)
    os.replace(temporary, file)


@contextmanager
def _locked(file: Path) -> Iterator[Any]:
    """One process at a time; the lock goes with the process that holds it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be written: {error.strerror}") from None
    file.with_suffix(".lock").unlink(missing_ok=True)
