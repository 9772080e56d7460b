"""LoRA in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

ΔW = s B A with s = α / r, or α / √r for rsLoRA, by module where there are patterns. `modules_to_save` (trained task
heads) hold whole weights, not changes, and are left out: lorabench keeps their ΔW beside the adapter. So it does with
DoRA's ΔW, which needs W0; the factors give its part s B A. Where initial factors lie beside the adapter, ΔW is
s (B A - B0 A0).
Shapes: A (r, in) and B (out, r), also for GPT-2's Conv1D; embeddings A (r, vocabulary) and B (dim, r), so that
ΔW is (dim, vocabulary); convolutions A (r, in, height, width) and B (out, r, 1, 1), flattened.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorabench.decode import InputError
from lorabench.readers._entry import Entry, Found, Source, TensorFile, read_json
from lorabench.update import DELTA_FILE, INITIAL_FILE, Update

CONFIG_FILE, ADAPTER_FILE, NORMS_FILE = "adapter_config.json", "adapter_model.safetensors", "base_norms.json"
PREFIX = "base_model.model."
FACTORS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
DORA_PART = "sBA"
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations whose first B A is not zero and was taken out of the base: ΔW is what was added to it."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The tensors `B` and `A` of one module."""

    tensors: TensorFile
    B: str
    A: str
    parameter: str
    scale: float
    rank: int
    base_norm: float | None
    part: str | None = None
    initial: tuple[TensorFile, str] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        B, A = self.tensors.shape(self.B), self.tensors.shape(self.A)
        if not (len(A) == len(B) >= 2 and B[1] == A[0] == self.rank and set(B[2:]) <= {1}):
            raise InputError(
                f"{self.tensors.file}: {self.parameter}: B {B} and A {A} do not fit each other and rank {self.rank}"
            )
        return B[0], math.prod(A[1:])

    def load(self) -> Update:
        M, N = self.shape
        B, A = self.tensors.read(self.B), self.tensors.read(self.A)
        dtype = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
        B, A = B.to(dtype).reshape(M, self.rank) * self.scale, A.to(dtype).reshape(self.rank, N)
        if self.initial:
            file, layer = self.initial
            B = torch.cat([B, -self.scale * file.read(f"{layer}.B").to(dtype)], 1)
            A = torch.cat([A, file.read(f"{layer}.A").to(dtype)])
        return Update(
            parameter=self.parameter,
            part=self.part,
            B=B,
            A=A,
            base_norm=self.base_norm,
            scale_source="config",
        )


def find(source: Source) -> Found | None:
    """The adapter of a folder with a PEFT configuration; None where there is none."""
    folder = source.folder
    if not (folder / CONFIG_FILE).exists():
        return None
    config = read_json(folder / CONFIG_FILE)
    if "peft_type" not in config or _is_torchtune(source):
        return None
    own = (folder / DELTA_FILE).exists()
    if config["peft_type"] != "LORA" and own:
        return None  # lorabench's own ΔW lies beside the adapter
    _check_readable(config, folder / CONFIG_FILE, own)
    initial = TensorFile(folder / INITIAL_FILE) if (folder / INITIAL_FILE).exists() else None
    tensors = TensorFile(folder / ADAPTER_FILE)
    norms = read_json(folder / NORMS_FILE) if (folder / NORMS_FILE).exists() else {}
    entries: dict[str, Entry] = {}
    for name in tensors.names:
        suffix = next((suffix for suffix in FACTORS if name.endswith(f".{suffix}")), None)
        if suffix is None:
            continue
        module = name.removeprefix(PREFIX).removesuffix(f".{suffix}")
        parameter = f"{module}.weight"
        rank, scale = _rank_and_scale(config, module, folder / CONFIG_FILE)
        entry = Factors(
            tensors=tensors,
            B=name.removesuffix(suffix) + FACTORS[suffix],
            A=name,
            parameter=f"{module}[{DORA_PART}].weight" if config.get("use_dora") else parameter,
            scale=scale,
            rank=rank,
            base_norm=norms.get(parameter),
            part=DORA_PART if config.get("use_dora") else None,
            initial=(initial, module) if initial else None,
        )
        entries[entry.parameter] = entry
    if not entries:
        raise InputError(f"{tensors.file}: holds no LoRA factors (…lora_A.weight)")
    return Found(format="peft", entries=entries, scale_source="config")


def _is_torchtune(source: Source) -> bool:
    """torchtune writes PEFT's configuration beside a file of its own, with or without PEFT's."""
    files = source.files(".pt")
    return source.path in files or (bool(files) and not (source.folder / ADAPTER_FILE).exists())


def _check_readable(config: dict[str, Any], file: Path, own: bool) -> None:
    """Refuse what is not ΔW = s B A, rather than give wrong numbers."""
    if config["peft_type"] != "LORA":
        raise InputError(f"{file}: peft_type = {config['peft_type']}: only LORA can be read")
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise InputError(f"{file}: r = {config.get('r')}: must be a whole number, at least 1")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise InputError(f"{file}: lora_alpha = {config.get('lora_alpha')}: must be a number")
    for key in ("use_dora", "target_parameters", "use_bdlora", "use_qalora"):
        if config.get(key) and not (key == "use_dora" and own):
            raise InputError(f"{file}: {key} = {config[key]}: its ΔW is not s B A, and cannot be read")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(REBASED):
        raise InputError(f"{file}: init_lora_weights = {start}: ΔW needs the initial factors, not in the file")


def _rank_and_scale(config: dict[str, Any], module: str, file: Path) -> tuple[int, float]:
    rank = _by_pattern(config, "rank_pattern", module, config["r"], file)
    alpha = _by_pattern(config, "alpha_pattern", module, config["lora_alpha"], file)
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: dict[str, Any], key: str, module: str, default: Any, file: Path) -> Any:
    """The value of the first pattern that matches, by PEFT's rule (`peft.utils.other.get_pattern_key`)."""
    patterns = config.get(key) or {}
    try:
        return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", module)), default)
    except re.error as error:
        raise InputError(f"{file}: {key}: not a regular expression: {error}") from None
