"""PEFT's other tuners of which the file (or file and W0) gives ΔW in closed form, and weights that were saved whole."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.readers._difference import Difference
from lorabench.updates.readers._entry import Entry, Found, Other, Source, Tensors
from lorabench.updates.readers._lycoris import KERNELS
from lorabench.updates.readers._names import PREFIX, Named
from lorabench.updates.readers._peft_config import check_patterns, original_name
from lorabench.updates.readers._peft_forms import FORMS, NEED_BASE, Form
from lorabench.updates.update import Update
from lorabench.updates.weightfile import WeightFiles, some

_PARTS = re.compile(r"(?P<module>.+)\.(?P<part>lora_[ABE]|hada_\w+|lokr_\w+|vera_lambda_[bd]|ia3_l|oft_R)(?:\.weight)?")
_MISFIT = (RuntimeError, ValueError, TypeError, KeyError, IndexError)
"""What a product of tensors raises that do not fit each other."""
_FOREIGN = re.compile(r"\.(lora_(?!B\.bias)|hada_|lokr_|vera_|ia3_|oft_|original_module\.)")


@dataclass(frozen=True, kw_only=True, eq=False)
class Module:
    """The tensors of one module, and how they make ΔW."""

    tensors: Tensors
    names: dict[str, str]
    """Part (`lokr_w1_a`) -> name of the tensor."""
    parameter: str
    config: dict[str, Any]
    weights: WeightFiles | None
    form: Form

    @property
    def shape(self) -> tuple[int, int]:
        try:
            return self.form.shape(self)
        except _MISFIT as error:
            raise InputError(f"{self.tensors.file}: {self.parameter}: its tensors do not fit: {error}") from None

    @property
    def kernel(self) -> tuple[int, ...]:
        """As in `Update`."""
        return next((self.sizes(part)[2:] for part in KERNELS if part in self.names), ())

    def load(self) -> Update:
        shape = self.shape
        try:
            B, A = self.form.product(self)
            scale = self.form.scale(self) if self.form.scale else None
            B = B.reshape(shape) if A is None else B
            if (B.shape[0], (B if A is None else A).shape[1]) != shape:
                raise ValueError(f"{tuple(B.shape)} for {shape}")
        except _MISFIT as error:
            raise InputError(f"{self.tensors.file}: {self.parameter}: its tensors do not fit: {error}") from None
        return Update(
            parameter=self.parameter,
            B=(B if scale is None else B * scale).contiguous(),
            A=A,
            precision="float32" if A is None else None,
            scale=scale,
            scale_source="config" if scale is not None else None,
            kernel=self.kernel,
        )

    def read(self, part: str) -> Tensor:
        tensor = self.tensors.read(self.names[part])
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def sizes(self, part: str) -> tuple[int, ...]:
        return self.tensors.shape(self.names[part])

    def base(self) -> WeightFiles:
        assert self.weights is not None  # `_check` has seen to it
        return self.weights


def find(config: dict[str, Any], file: Path, tensors: Named, source: Source) -> Found:
    """InputError for a tuner whose ΔW the file does not give."""
    kind = str(config["peft_type"])
    if kind not in FORMS:
        raise InputError(
            f"{file}: peft_type = {clip(kind)}: its ΔW cannot be read from the file; these can: LORA, "
            f"{', '.join(FORMS)}"
        )
    _check(config, file, tensors, source)
    modules: dict[str, dict[str, str]] = {}
    for name in tensors.names:
        if match := _PARTS.fullmatch(name):
            modules.setdefault(match["module"].removeprefix(PREFIX), {})[match["part"]] = name
    entries: dict[str, Entry] = {
        f"{module}.weight": Module(
            tensors=tensors, names=parts, parameter=f"{module}.weight", config=config, weights=source.weights,
            form=FORMS[kind],
        )
        for module, parts in modules.items()
    }  # fmt: skip
    if not entries:
        raise InputError(f"{tensors.file}: holds no tensors of {kind}: {some(tensors.names)}")
    used = {name for parts in modules.values() for name in parts.values()}
    used |= {name for name in tensors.names if name.startswith("base_model.vera_")}
    others, left_out = others_beside(tensors, used)
    notes = add_whole_weights(entries, tensors, others, source, layers=[])
    if kind == "IA3":
        notes.append("IA3: biases of scaled outputs change too, which is not part of ΔW")
    return Found(
        format=f"peft {kind}", entries=entries, scale_source="config", notes=tuple(notes), config=config,
        others=others, left_out=tuple(left_out),
    )  # fmt: skip


def _check(config: dict[str, Any], file: Path, tensors: Tensors, source: Source) -> None:
    kind = config["peft_type"]
    keys = {"ADALORA": ("init_r", "lora_alpha"), "LOHA": ("r", "alpha"), "LOKR": ("r", "alpha")}.get(kind, ())
    if kind != "ADALORA":  # its rank_pattern says which directions are left, which the file holds alone
        check_patterns(config, file)
    for key in keys:
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (key != "lora_alpha" and value <= 0):
            raise InputError(f"{file}: {key} = {clip(value)}: must be a number above 0")
    if kind in NEED_BASE and source.weights is None:
        raise InputError(f"{file}: peft_type = {kind}: its ΔW needs the base: give --base")
    if kind == "VERA" and not any(name.startswith("base_model.vera_A") for name in tensors.names):
        raise InputError(f"{tensors.file}: holds no shared A and B (VeRA with save_projection = false)")


def others_beside(tensors: Named, used: Iterable[str]) -> tuple[dict[str, Other], list[str]]:
    """What the file holds beside the tensors of ΔW, by the model's names; and what is another adapter's, or no weight
    that was trained."""
    rest = sorted(set(tensors.names) - set(used))
    foreign = {name for name in rest if _FOREIGN.search(name)}
    names = {
        name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", "."): name for name in rest
    }
    others = {
        key: Other(tensors=tensors, name=tensors.stored(name)) for key, name in names.items() if name not in foreign
    }
    return others, sorted(map(tensors.stored, foreign))


def add_whole_weights(
    entries: dict[str, Entry], tensors: Named, others: dict[str, Other], source: Source, layers: list[int]
) -> list[str]:
    """Add ΔW of what was saved whole, where the base has it in that shape; a note of each that it has not.

    `layers` is as `original_layers` gives it.
    """
    whole = {key: other.name for key, other in others.items() if _is_whole(key, other.name)}
    if source.weights is None:
        matrices = [name for name in whole.values() if len(tensors.shape(name)) > 1]
        return [f"saved whole, so that their ΔW needs the base (--base): {some(matrices)}"] if matrices else []
    tuned = WeightFiles(tensors.file, [_ByName(tensors, whole)]) if whole else None
    missing, reshaped = [], []
    for key, name in whole.items():
        assert tuned is not None
        tuned.has_conv1d = source.weights.has_conv1d
        parameter = source.weights.find(original_name(key, layers))
        if parameter is None:
            missing.append(name)
        elif source.weights.shape(parameter) != tuned.shape(key):
            before = source.weights.stored_shape(parameter)
            reshaped.append(f"{key} is {tensors.shape(name)} for {before}")
        else:
            called = key if original_name(key, layers) != key else parameter
            entries[called] = Difference(tuned, source.weights, key, parameter, called)
    notes = [f"saved whole, and not in the base: {some(missing)}"] if missing else []
    return notes + (
        [f"saved whole, in other shapes than in the base (another vocabulary?): {some(reshaped)}"] if reshaped else []
    )


def _is_whole(key: str, name: str) -> bool:
    """A weight or a bias of the model, of which no factors are trained too."""
    of_model = key.endswith((".weight", ".bias")) and not key.endswith(".lora_B.bias")
    return of_model and not name.endswith(".base_layer.weight")


class _ByName:
    """Tensors under other names: key -> name."""

    def __init__(self, tensors: Named, names: dict[str, str]):
        self.file, self.metadata, self.names = tensors.file, tensors.metadata, sorted(names)
        self._tensors, self._names = tensors, names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self._names[name])

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(self._names[name])

    def read(self, name: str) -> Tensor:
        return self._tensors.read(self._names[name])
