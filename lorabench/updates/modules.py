"""Which module of a model each ΔW of an adapter is of: by the file's names, or the base's where it is known."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lorabench.config.decode import InputError
from lorabench.config.quote import counted
from lorabench.updates.formats import Adapter
from lorabench.updates.parts import PartOf, fused_name
from lorabench.updates.readers._entry import Entry
from lorabench.updates.readers._peft_config import original_layers, original_name
from lorabench.updates.readers._peft_factors import Factors
from lorabench.updates.update import DORA_PART
from lorabench.updates.weightfile import WeightFiles, flat_name, is_embedding, llama_cpp_name

if TYPE_CHECKING:
    from torch import Tensor

_OF_DIFFUSERS = re.compile(r"(unet|transformer|text_encoder(?:_\d)?|prior|decoder)\.(?=.)")
_OF_KOHYA = re.compile(r"(lora_unet|lora_te\d?|lora_transformer|lycoris)_")
_COMPONENTS = {"diffusers": _OF_DIFFUSERS, "xlabs": _OF_DIFFUSERS, "kohya": _OF_KOHYA, "lycoris": _OF_KOHYA}
"""Format -> the model of a pipeline that a name begins with."""
SHOWN = 4
"""Problems that are told; a file may have one a layer."""
_OF_MODULE = re.compile(r"(?P<module>.+)(?P<leaf>\.(?:lora_B\.bias|token_adapter\..+))")


@dataclass(frozen=True, kw_only=True, eq=False)
class Modules:
    """Names in one model. `base` are its untouched weights, where they are known."""

    adapter: Adapter
    entries: dict[str, Entry]
    """Of this model: ΔW of matrices and vectors, by the file's names."""
    base: WeightFiles | None = None
    model: str = ""
    """`unet`, or as kohya has it `lora_unet`; empty where the file does not say of which it is."""

    @cached_property
    def whole(self) -> frozenset[str]:
        """Parameters that were saved whole, by the file's names and by the base's: their ΔW, where it is known, is no
        matter of factors."""
        others = self.adapter.others
        names = {name for name, other in others.items() if not other.name.endswith(".base_layer.weight")}
        names |= {name.replace(".lora_B.bias", ".bias") for name in names}
        found = (None if self.base is None else self.base.find(original_name(name, self._layers)) for name in names)
        return frozenset(names | {name for name in found if name})

    def module(self, parameter: str) -> str:
        """The module's name in the model. InputError where it is not certain, or has a weight of another shape."""
        layer = whole_name(parameter).removesuffix(".weight")
        if re.search(r"\[\d+\]$", layer):
            raise InputError(
                f"{parameter}: is one of stacked experts, and which LoRA of theirs PEFT would load is not known"
            )
        if llama_cpp_name(parameter):
            raise InputError(
                f"{parameter}: is llama.cpp's name, and not known to have the rows of a module of the model"
            )
        name = self._of_model(f"{layer}.weight")
        found = self._stored(name)
        if "[" in layer and found is None:
            raise InputError(f"{parameter}: is some rows of a fused layer, and no module of its own")
        if self.base is None:
            if flat_name(name):
                raise InputError(f"{parameter}: `_` may stand for `.`: which module it is, only --base can tell")
            return name.removesuffix(".weight")
        if found is None:
            raise InputError(f"{parameter}: the base {self.base.path} has no such weight, or several")
        self._check_shape(parameter, found)
        return self.named(name).removesuffix(".weight")

    def named(self, name: str) -> str:
        """The base's name of a parameter, of replicated blocks by their own numbers; as it is where the base has none.

        Also of PEFT's own that stand beside a module: `MODULE.lora_B.bias`.
        """
        if match := _OF_MODULE.fullmatch(name):
            return self.named(f"{match['module']}.weight").removesuffix(".weight") + match["leaf"]
        original, found = original_name(name, self._layers), self._stored(name)
        if found is None or original == name:
            return found or name
        if found.endswith(original):
            return found.removesuffix(original) + name
        return name.removeprefix(original.removesuffix(found))

    def kernel(self, parameter: str) -> tuple[int, ...]:
        """Of a convolution, (height, width): by the base where it is known, for a file may have its ΔW flattened."""
        found = self._stored(self._of_model(whole_name(parameter)))
        if self.base is None or found is None:
            return getattr(self.entries[parameter], "kernel", ())
        return self.base.stored_shape(found)[2:]

    def base_weight(self, parameter: str) -> Tensor | None:
        """W0 of a matrix ΔW, or its rows of a part: (M, N) in float32; None where the base has none of this shape, or
        a quantized one."""
        entry = self.entries[parameter]
        part, whole = (entry.part, entry.whole) if isinstance(entry, PartOf) else (None, entry)
        found = self._stored(self._of_model(fused_name(whole_name(parameter)) if part else whole_name(parameter)))
        if self.base is None or found is None or self.base.shape(found) != whole.shape:
            return None
        if self.base.dtype(found).startswith("float8"):  # whose scale stands in a tensor of its own
            return None
        with contextlib.suppress(InputError):
            weight = self.base.read(found)
            return part.rows(weight) if part else weight
        return None

    def embeds(self, parameter: str, module: str) -> bool:
        """Whether it is an embedding: PEFT's factors tell it, else its name."""
        entry = self.entries[parameter]
        return ".lora_embedding_A" in entry.A if isinstance(entry, Factors) else is_embedding(f"{module}.weight")

    @property
    def _layers(self) -> list[int]:
        return original_layers(self.adapter.config, self.adapter.source)

    def _of_model(self, parameter: str) -> str:
        return parameter if flat_name(parameter) else parameter.removeprefix(f"{self.model}.")

    def _stored(self, name: str) -> str | None:
        return None if self.base is None else self.base.find(original_name(name, self._layers))

    def _check_shape(self, parameter: str, found: str) -> None:
        assert self.base is not None
        shape, stored = self.entries[parameter].shape, self.base.shape(found)
        if self.embeds(parameter, found.removesuffix(".weight")) != is_embedding(found):
            stored = stored[::-1]
        if shape != stored:
            raise InputError(f"{parameter}: ΔW {shape}, and the base's weight is {stored}")

    @cached_property
    def problems(self) -> list[str]:
        """Of each matrix whose module is not certain."""
        found = []
        for parameter in self.entries.keys() & self.adapter.entries.keys() - self.whole:
            try:
                self.module(parameter)
            except InputError as error:
                found += error.problems
        return found


def refusal(problems: list[str], where: str) -> InputError:
    """The first of many, with `where` before each."""
    more = [f"and so {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return InputError([f"{where}: {problem}" for problem in problems[:SHOWN] + more])


def whole_name(parameter: str) -> str:
    """Of DoRA's part s B A, that of ΔW itself."""
    return parameter.replace(f"[{DORA_PART}]", "")


def all_models(adapter: Adapter, base: WeightFiles | None = None) -> list[Modules]:
    """The models that a file is of, sorted; one where some of its names begin with none."""
    component = _COMPONENTS.get(adapter.format)
    entries = adapter.entries | adapter.vectors
    matches = {name: component.match(name) if component else None for name in entries}
    several = all(matches.values())
    models: dict[str, dict[str, Entry]] = {}
    for name, match in matches.items():
        models.setdefault(match[1] if several and match else "", {})[name] = entries[name]
    return [Modules(adapter=adapter, entries=models[name], base=base, model=name) for name in sorted(models)]


def models_in(adapter: Adapter, base: WeightFiles | None) -> list[Modules]:
    """The models that a file is of; with a base, the one that this is. InputError where it is none of them, or might be
    each of several."""
    models = all_models(adapter, base)
    if base is None or len(models) == 1:
        return models
    fitting = [model for model in models if not model.problems]
    if len(fitting) == 1:
        return fitting
    nearest = min(models, key=lambda model: len(model.problems) / len(model.entries))
    if not fitting and len(nearest.problems) < len(nearest.entries):
        return [nearest]  # whose problems are told one by one
    which = "might be each" if fitting else "is none"
    raise InputError(
        f"{adapter.source}: holds adapters of several models ({', '.join(model.model for model in models)}), and the "
        f"base {base.path} {which} of them"
    )


def of_other_models(adapter: Adapter, models: Iterable[Modules]) -> Iterator[str]:
    """A note of each model of the file that is none of these."""
    known = {model.model for model in models}
    for other in all_models(adapter):
        if other.model not in known:
            some = next(iter(other.entries))
            yield f"{counted(len(other.entries), 'layer')} of {other.model} left out, such as {some}: not the base's"
