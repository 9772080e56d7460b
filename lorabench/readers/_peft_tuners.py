"""PEFT's other tuners of which the file (or file and W0) gives ΔW in closed form, and weights that were saved whole.

AdaLoRA: s B diag(E) A. LoHa: s (B1 A1) ⊙ (B2 A2). LoKr: s W1 ⊗ W2. VeRA: diag(b) B diag(d) A, of which the file must
hold the shared A and B (`save_projection`), and the base the shapes. IA3: W0 scaled by row or by column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabench.decode import InputError
from lorabench.products import hadamard, kronecker
from lorabench.readers._difference import Difference
from lorabench.readers._entry import Entry, Found, Source, Tensors
from lorabench.readers._peft_config import PREFIX, by_pattern, check_patterns
from lorabench.update import Update
from lorabench.weightfile import WeightFiles, some

_PARTS = re.compile(r"(?P<module>.+)\.(?P<part>lora_[ABE]|hada_\w+|lokr_\w+|vera_lambda_[bd]|ia3_l)(?:\.default)?")
_TRAINED = re.compile(r"\.(lora_|hada_|lokr_|vera_|ia3_|trainable_tokens_|base_layer\.)")
Factored = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Module:
    """The tensors of one module, and how they make ΔW."""

    tensors: Tensors
    names: dict[str, str]
    """Part (`lokr_w1_a`) -> name of the tensor."""
    parameter: str
    config: dict[str, Any]
    weights: WeightFiles | None
    form: Callable[[Module], Factored]
    outline: Callable[[Module], tuple[int, int]]

    @property
    def shape(self) -> tuple[int, int]:
        try:
            return self.outline(self)
        except (IndexError, KeyError) as error:
            raise InputError(f"{self.tensors.file}: {self.parameter}: its tensors do not fit: {error}") from None

    def load(self) -> Update:
        shape = self.shape
        try:
            B, A = self.form(self)
            B = B.reshape(shape) if A is None else B
            if (B.shape[0], (B if A is None else A).shape[1]) != shape:
                raise ValueError(f"{tuple(B.shape)} for {shape}")
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise InputError(f"{self.tensors.file}: {self.parameter}: its tensors do not fit: {error}") from None
        return Update(
            parameter=self.parameter,
            B=B.contiguous(),
            A=A,
            precision="float32" if A is None else None,
            scale_source="config" if A is not None else None,
        )

    def read(self, part: str) -> Tensor:
        tensor = self.tensors.read(self.names[part])
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def sizes(self, part: str) -> tuple[int, ...]:
        return self.tensors.shape(self.names[part])

    def base(self) -> WeightFiles:
        assert self.weights is not None  # `_check` has seen to it
        return self.weights


def find(config: dict[str, Any], file: Path, tensors: Tensors, source: Source) -> Found:
    """InputError for a tuner whose ΔW the file does not give."""
    kind = str(config["peft_type"])
    if kind not in FORMS:
        raise InputError(
            f"{file}: peft_type = {str(kind)[:40]}: its ΔW cannot be read from the file; these can: LORA, "
            f"{', '.join(FORMS)}"
        )
    _check(config, file, tensors, source)
    form, outline = FORMS[kind]
    modules: dict[str, dict[str, str]] = {}
    for name in tensors.names:
        if match := _PARTS.fullmatch(name):
            modules.setdefault(match["module"].removeprefix(PREFIX), {})[match["part"]] = name
    entries: dict[str, Entry] = {
        f"{module}.weight": Module(
            tensors=tensors, names=parts, parameter=f"{module}.weight", config=config, weights=source.weights,
            form=form, outline=outline,
        )
        for module, parts in modules.items()
    }  # fmt: skip
    if not entries:
        raise InputError(f"{tensors.file}: holds no tensors of {kind}: {some(tensors.names)}")
    notes = add_whole_weights(entries, tensors, source, own=False)
    if kind == "IA3":
        notes.append("IA3: biases of scaled outputs change too, which is not part of ΔW")
    return Found(format=f"peft {kind}", entries=entries, scale_source="config", notes=tuple(notes))


def _check(config: dict[str, Any], file: Path, tensors: Tensors, source: Source) -> None:
    kind = config["peft_type"]
    if kind == "ADALORA":
        config.pop("rank_pattern", None)  # says which directions are left, which the file holds alone
    keys = {"ADALORA": ("init_r", "lora_alpha"), "LOHA": ("r", "alpha"), "LOKR": ("r", "alpha")}.get(kind, ())
    check_patterns(config, file)
    for key in keys:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (key != "lora_alpha" and value <= 0):
            raise InputError(f"{file}: {key} = {str(value)[:40]}: must be a number above 0")
    if kind in ("IA3", "VERA") and source.weights is None:
        raise InputError(f"{file}: peft_type = {kind}: its ΔW needs the base: give --base")
    if kind == "VERA" and not any(name.startswith("base_model.vera_A") for name in tensors.names):
        raise InputError(f"{tensors.file}: holds no shared A and B (VeRA with save_projection = false)")


def _adalora(module: Module) -> Factored:
    """s = α / init_r, whatever is left of the directions, as in PEFT; of a matrix that has lost all, one of zero."""
    B, A, E = module.read("lora_B"), module.read("lora_A"), module.read("lora_E")
    alpha, start = module.config["lora_alpha"], float(module.config["init_r"])
    if not len(E):
        return B.new_zeros(B.shape[0], 1), A.new_zeros(1, A.shape[1])
    return B * ((alpha if alpha > 0 else start) / (start + 1e-5)), A * E.reshape(-1, 1)


def _adalora_shape(module: Module) -> tuple[int, int]:
    return module.sizes("lora_B")[0], module.sizes("lora_A")[1]


def _loha(module: Module) -> Factored:
    """A Tucker core t (r, r, height, width) of a convolution makes it dense."""
    scale = _scale(module)
    parts = [module.read(part) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")]
    if "hada_t1" not in module.names:
        B, A = hadamard(*parts)
        return B * scale, A
    first = _tucker(module.read("hada_t1"), *parts[:2])
    return (first * _tucker(module.read("hada_t2"), *parts[2:])).flatten(1) * scale, None


def _loha_shape(module: Module) -> tuple[int, int]:
    a, b = module.sizes("hada_w1_a"), module.sizes("hada_w1_b")
    return (a[1], b[1] * math.prod(module.sizes("hada_t1")[2:])) if "hada_t1" in module.names else (a[0], b[1])


def _lokr(module: Module) -> Factored:
    """W2 of a convolution is (b, d, height, width): the Kronecker product is over the first two."""
    scale = _scale(module)
    first = _whole_or_pair(module, "lokr_w1")
    if "lokr_t2" in module.names:
        second: Any = _tucker(module.read("lokr_t2"), module.read("lokr_w2_a"), module.read("lokr_w2_b")).flatten(1)
    else:
        second = _whole_or_pair(module, "lokr_w2")
    B, A = kronecker(first, second)
    return B * scale, A


def _lokr_shape(module: Module) -> tuple[int, int]:
    first, second = _kron_sizes(module, "lokr_w1"), _kron_sizes(module, "lokr_w2")
    if "lokr_t2" in module.names:
        a, b = module.sizes("lokr_w2_a"), module.sizes("lokr_w2_b")
        second = a[1], b[1] * math.prod(module.sizes("lokr_t2")[2:])
    return first[0] * second[0], first[1] * second[1]


def _kron_sizes(module: Module, part: str) -> tuple[int, int]:
    if part in module.names:
        sizes = module.sizes(part)
        return sizes[0], math.prod(sizes[1:])
    return module.sizes(f"{part}_a")[0], module.sizes(f"{part}_b")[1]


def _whole_or_pair(module: Module, part: str) -> Tensor | tuple[Tensor, Tensor]:
    if part in module.names:
        return module.read(part).flatten(1)
    return module.read(f"{part}_a"), module.read(f"{part}_b")


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(out, in, height, width)"""
    return torch.einsum("ijkl,ip,jr->prkl", core, a, b)


def _scale(module: Module) -> float:
    """α / r, by module where there are patterns."""
    layer, config, file = module.parameter.removesuffix(".weight"), module.config, module.tensors.file
    rank = by_pattern(config, "rank_pattern", layer, config["r"], file)
    return by_pattern(config, "alpha_pattern", layer, config["alpha"], file) / rank


def _vera(module: Module) -> Factored:
    """The shared A and B are cut to each module's size."""
    (M, N), names = module.shape, module.tensors.names
    A, B = (
        module.tensors.read(next(name for name in names if name.startswith(f"base_model.vera_{part}"))).float()
        for part in "AB"
    )
    return module.read("vera_lambda_b")[:, None] * B[:M], module.read("vera_lambda_d")[:, None] * A[:, :N]


def _ia3(module: Module) -> Factored:
    """l is (out, 1), or (1, in) where inputs are scaled."""
    sizes = module.sizes("ia3_l")
    if len(sizes) != 2:
        raise ValueError(f"l {sizes} of a convolution cannot be read")
    return module.base().read(module.parameter) * (module.read("ia3_l") - 1), None


def _shape_in_base(module: Module) -> tuple[int, int]:
    return module.base().shape(module.parameter)


FORMS: dict[str, tuple[Callable[[Module], Factored], Callable[[Module], tuple[int, int]]]] = {
    "ADALORA": (_adalora, _adalora_shape),
    "LOHA": (_loha, _loha_shape),
    "LOKR": (_lokr, _lokr_shape),
    "VERA": (_vera, _shape_in_base),
    "IA3": (_ia3, _shape_in_base),
}


def add_whole_weights(entries: dict[str, Entry], tensors: Tensors, source: Source, own: bool) -> list[str]:
    """Add ΔW of the weights that were saved whole, where the base has them; else say which they are."""
    whole = list(_whole(tensors))
    if own or not whole:
        return []
    if source.weights is None:
        return [f"saved whole, so that their ΔW needs the base (--base): {some(whole)}"]
    tuned = WeightFiles(tensors.file)
    tuned.has_conv1d = source.weights.has_conv1d
    missing = []
    for name in whole:
        parameter = source.weights.find(name.removeprefix(PREFIX))
        if parameter is None or source.weights.shape(parameter) != tuned.shape(name):
            missing.append(name)
        else:
            entries[parameter] = Difference(tuned, source.weights, name, parameter)
    return [f"saved whole, and not in the base: {some(missing)}"] if missing else []


def _whole(tensors: Tensors) -> Iterator[str]:
    for name in tensors.names:
        is_matrix = len(tensors.shape(name)) > 1 and name.endswith(".weight")
        if is_matrix and not _TRAINED.search(name) and not name.startswith("base_model.vera_"):
            yield name
