"""Adapters in PEFT's format: `adapter_config.json`, and `adapter_model.safetensors` or `.bin`.

LoRA: ΔW = s B A with s = α / r, or α / √r for rsLoRA, by module where there are patterns. Shapes: A (r, in) and B
(out, r), also for GPT-2's Conv1D; embeddings A (r, vocabulary) and B (dim, r), so that ΔW is (dim, vocabulary);
convolutions A (r, in, height, width) and B (out, r, 1, 1), flattened.
DoRA needs W0: without, its part s B A is all that is given. Where initial factors lie beside the adapter, or in PEFT's
`init` folder, ΔW is s (B A - B0 A0). Whole weights (`modules_to_save`) are no changes: lorabench keeps their ΔW beside
the adapter; of others, ΔW needs the base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorabench.decode import InputError
from lorabench.readers import _peft_tuners
from lorabench.readers._dora import Dora
from lorabench.readers._entry import CONFIG_FILE, Entry, Found, Source, TensorFile, Tensors, read_json
from lorabench.readers._names import PREFIX, open_named
from lorabench.readers._peft_config import ADAPTER_FILE, ADAPTER_FILES, check_lora, rank_and_scale, rebased
from lorabench.readers._peft_factors import Factors
from lorabench.update import DELTA_FILE, DORA_PART, INITIAL_FILE

NORMS_FILE = "base_norms.json"
_A = re.compile(r"(?P<module>.+)\.(?P<kind>lora_A\.weight|lora_embedding_A)")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.weight)?$")
_INITIAL_FOLDER = re.compile(r"(.*[_-])?init(ial)?", re.IGNORECASE)
_WITHOUT_UPDATE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
                   "CARTRIDGE")  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """What is known of an adapter before its tensors are read."""

    config: dict[str, Any]
    config_file: Path
    tensors: Tensors
    source: Source
    own: bool
    """Whether lorabench wrote it: then the ΔW that factors do not give lies beside it."""
    norms: dict[str, float]
    initial: Tensors | None = None
    initial_is_peft: bool = False

    @cached_property
    def is_dora(self) -> bool:
        """torchtune writes magnitudes, and a configuration that does not say so."""
        return bool(self.config.get("use_dora")) or any(".lora_magnitude_vector" in name for name in self.tensors.names)


def find(source: Source) -> Found | None:
    """The adapter of a folder with a PEFT configuration, or of a file without; None where there is none."""
    folder = source.folder
    if not (folder / CONFIG_FILE).exists():
        return _without_config(source)
    config = read_json(folder / CONFIG_FILE)
    if "peft_type" not in config or _is_torchtune(source):
        return None
    own, kind = (folder / DELTA_FILE).exists(), str(config["peft_type"])
    if kind in _WITHOUT_UPDATE:
        why = f"not applicable: {kind} changes no weight, so that there is no ΔW"
        if own:
            return Found(format="peft", entries={}, notes=(why,))
        raise InputError(f"{folder / CONFIG_FILE}: {why}")
    if own and kind != "LORA":
        return None  # lorabench's own ΔW lies beside the adapter
    file = source.path if source.path.is_file() else _adapter_file(folder)
    tensors = open_named(file)
    if kind != "LORA":
        return _peft_tuners.find(config, folder / CONFIG_FILE, tensors, source)
    check_lora(config, folder / CONFIG_FILE)
    norms = read_json(folder / NORMS_FILE) if (folder / NORMS_FILE).exists() else {}
    adapter = Adapter(
        config=config, config_file=folder / CONFIG_FILE, tensors=tensors, source=source, own=own, norms=norms,
        **_initial(config, folder),
    )  # fmt: skip
    entries = _lora_entries(adapter)
    notes = [*_notes(adapter, entries), *_peft_tuners.add_whole_weights(entries, tensors, source, own)]
    if source.alpha is not None:
        notes.append(f"--alpha is not used: {CONFIG_FILE} has it")
    others, left_out = _peft_tuners.others_beside(tensors, _used(tensors, entries))
    return Found(
        format="peft", entries=entries, scale_source="config", notes=tuple(notes), config=config, others=others,
        left_out=tuple(left_out),
    )  # fmt: skip


def _used(tensors: Tensors, entries: dict[str, Entry]) -> set[str]:
    """Names of the tensors that ΔW is made of."""
    factors = {name for entry in entries.values() if isinstance(entry, Factors) for name in (entry.A, entry.B)}
    return factors | {name for name in tensors.names if _MAGNITUDE.search(name)}


def _is_torchtune(source: Source) -> bool:
    """torchtune writes PEFT's configuration beside a file of its own, with or without PEFT's."""
    if source.path.is_file():
        return source.path.suffix == ".pt"
    is_peft = any((source.folder / name).exists() for name in ADAPTER_FILES)
    return not is_peft and any(file.name.startswith("adapter_") for file in source.files(".pt"))


def _adapter_file(folder: Path) -> Path:
    """InputError where it is missing, with the name that PEFT gives it now."""
    return next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), folder / ADAPTER_FILE)


def _lora_entries(adapter: Adapter) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name in adapter.tensors.names:
        match = _A.fullmatch(name)
        if match is None:
            continue
        module = match["module"].removeprefix(PREFIX)
        factors = _factors(adapter, name, module)
        entries[factors.parameter] = factors
        if adapter.is_dora and not adapter.own and adapter.source.weights is not None:
            entries[f"{module}.weight"] = Dora(
                sBA=factors, tensors=adapter.tensors, magnitude=_magnitude(adapter.tensors, match["module"]),
                weights=adapter.source.weights, parameter=f"{module}.weight",
            )  # fmt: skip
    if not entries:
        raise InputError(f"{adapter.tensors.file}: holds no LoRA factors (…lora_A.weight)")
    return entries


def _factors(adapter: Adapter, name: str, module: str) -> Factors:
    parameter = f"{module}.weight"
    rank, scale = rank_and_scale(adapter.config, module, adapter.config_file)
    initial = None
    if adapter.initial is not None:
        names = (_B(name), name) if adapter.initial_is_peft else (f"{module}.B", f"{module}.A")
        initial = (adapter.initial, *names)
    return Factors(
        tensors=adapter.tensors,
        B=_B(name),
        A=name,
        parameter=f"{module}[{DORA_PART}].weight" if adapter.is_dora else parameter,
        scale=scale,
        rank=rank,
        base_norm=adapter.norms.get(parameter),
        part=DORA_PART if adapter.is_dora else None,
        initial=initial,
    )


def _B(name: str) -> str:
    head, _, tail = name.rpartition("_A")
    return f"{head}_B{tail}"


def _magnitude(tensors: Tensors, module: str) -> str:
    names = [f"{module}.lora_magnitude_vector{end}" for end in (".weight", "")]
    return next((name for name in names if name in tensors.names), names[0])


def _initial(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The factors that training began with: lorabench's file, or the adapter that PEFT's PiSSA example saves first."""
    if (folder / INITIAL_FILE).exists():
        return {"initial": TensorFile(folder / INITIAL_FILE)}
    start = rebased(config)
    if start is None:
        return {}
    for other in [*sorted(folder.iterdir()), *sorted(folder.parent.iterdir())]:
        if other != folder and _INITIAL_FOLDER.fullmatch(other.name) and (other / CONFIG_FILE).exists():
            return {"initial": open_named(_adapter_file(other)), "initial_is_peft": True}
    raise InputError(
        f"{folder / CONFIG_FILE}: init_lora_weights = {start}: ΔW needs the initial factors, not in the file; put the "
        "adapter as it was before training beside it, in a folder `init`, or let PEFT convert it "
        "(save_pretrained(path_initial_model_for_weight_conversion=…))"
    )


def _notes(adapter: Adapter, entries: dict[str, Entry]) -> list[str]:
    notes = []
    if adapter.is_dora and not adapter.own and adapter.source.weights is None:
        notes.append("DoRA: ΔW needs W0; this is its s B A; give --base")
    if adapter.initial_is_peft and adapter.initial:
        notes.append(f"initial factors from {adapter.initial.file.parent}: ΔW = s (B A - B0 A0)")
    if adapter.config.get("lora_bias"):
        notes.append("lora_bias: the change of the biases is not part of ΔW")
    if adapter.config.get("alora_invocation_tokens"):
        notes.append("aLoRA: ΔW acts on the tokens after its invocation alone")
    if any("trainable_tokens_" in name for name in adapter.tensors.names):
        notes.append("trainable_token_indices: the change of single tokens' rows is not part of ΔW")
    if any(isinstance(entry, Factors) and entry.groups > 1 for entry in entries.values()):
        notes.append("a grouped convolution: its ΔW counts all inputs, which W0 does not")
    return notes


def _without_config(source: Source) -> Found | None:
    """A file of PEFT's whose configuration is lost: the rank is that of the factors, α is given or taken for r."""
    files = [file for file in source.files(".safetensors", ".bin") if file.name in ADAPTER_FILES or source.path == file]
    if not files:
        return None
    tensors = open_named(files[0])
    names = [name for name in tensors.names if name.startswith(PREFIX) and _A.fullmatch(name)]
    if not names:
        return None
    if any(".lora_magnitude_vector" in name for name in tensors.names):
        raise InputError(f"{tensors.file}: holds DoRA's magnitudes, and no {CONFIG_FILE} lies beside it")
    entries: dict[str, Entry] = {}
    origin = "assumed" if source.alpha is None else "--alpha"
    for name in names:
        module, rank = name.removeprefix(PREFIX).rpartition(".lora_")[0], tensors.shape(name)[0]
        scale = 1.0 if source.alpha is None else source.alpha / max(rank, 1)
        entries[f"{module}.weight"] = Factors(
            tensors=tensors, B=_B(name), A=name, parameter=f"{module}.weight", scale=scale, rank=rank,
            base_norm=None, scale_source=origin,
        )  # fmt: skip
    note = f"no {CONFIG_FILE} beside it: "
    note += "the scale is taken for 1 (α = r); give --alpha" if source.alpha is None else "the scale is --alpha / r"
    others, left_out = _peft_tuners.others_beside(tensors, _used(tensors, entries))
    return Found(
        format="peft", entries=entries, scale_source=origin, notes=(note,), others=others, left_out=tuple(left_out)
    )
