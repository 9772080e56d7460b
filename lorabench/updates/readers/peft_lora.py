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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError
from lorabench.updates.readers import _peft_tuners
from lorabench.updates.readers._dora import Dora
from lorabench.updates.readers._entry import CONFIG_FILE, Entry, Found, Source, TensorFile, Tensors, numbers, read_json
from lorabench.updates.readers._experts import BASE_LAYER, expert_layers, targeted
from lorabench.updates.readers._factors import Layer
from lorabench.updates.readers._names import PREFIX, Named
from lorabench.updates.readers._peft_config import (
    ADAPTER_FILE,
    check_lora,
    original_layers,
    original_name,
    rank_and_scale,
    rebased,
)
from lorabench.updates.readers._peft_factors import Factors
from lorabench.updates.readers._peft_files import (
    adapter_tensors,
    as_trained,
    folder_tensors,
    has_adapter_file,
    own_configuration,
)
from lorabench.updates.update import DELTA_FILE, DORA_PART, INITIAL_FILE
from lorabench.updates.weightfile import some

__all__ = ["ADAPTER_FILE", "CONFIG_FILE", "PREFIX"]

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
    tensors: Named
    source: Source
    own: bool
    """Whether lorabench wrote it: then the ΔW that factors do not give lies beside it."""
    norms: dict[str, float]
    layers: list[int]
    """As `original_layers` gives them."""
    initial: Tensors | None = None
    initial_is_peft: bool = False

    @cached_property
    def is_dora(self) -> bool:
        """torchtune writes magnitudes, and a configuration that does not say so."""
        return bool(self.config.get("use_dora")) or any(".lora_magnitude_vector" in name for name in self.tensors.names)


def find(source: Source) -> Found | None:
    """The adapter of a folder with a PEFT configuration, or of a file without; None where there is none."""
    folder, config = source.folder, own_configuration(source)
    if not config:
        return _without_config(_one_file(source))
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
    tensors, sorted_by_name, config = adapter_tensors(source), config, as_trained(config, folder)
    if tensors is None:
        return None
    if kind != "LORA":
        return _peft_tuners.find(config, folder / CONFIG_FILE, tensors, source)
    check_lora(config, folder / CONFIG_FILE)
    adapter = Adapter(
        config=config, config_file=folder / CONFIG_FILE, tensors=tensors, source=source, own=own, norms=_norms(folder),
        layers=original_layers(config, folder / CONFIG_FILE), **_initial(config, folder),
    )  # fmt: skip
    entries = _lora_entries(adapter)
    others, left_out = _peft_tuners.others_beside(tensors, _used(tensors, entries))
    notes = _notes(adapter, entries)
    if not own:  # whose ΔW lies beside it
        notes += _peft_tuners.add_whole_weights(entries, tensors, others, source, adapter.layers)
    if config is not sorted_by_name and _scales(config, entries) != _scales(sorted_by_name, entries):
        notes.append(f"patterns overlap: they are taken in the order of spec.json, which {CONFIG_FILE} has not kept")
    if source.alpha is not None:
        notes.append(f"--alpha is not used: {CONFIG_FILE} has it")
    return Found(
        format="peft", entries=entries, scale_source="config", notes=tuple(notes), config=config, others=others,
        left_out=tuple(left_out),
    )  # fmt: skip


def _scales(config: dict[str, Any], entries: dict[str, Entry]) -> list[tuple[int, float]]:
    modules = [parameter.removesuffix(".weight").replace(f"[{DORA_PART}]", "") for parameter in entries]
    return [rank_and_scale(config, module, CONFIG_FILE) for module in modules]


def _used(tensors: Tensors, entries: dict[str, Entry]) -> set[str]:
    """Names of the tensors that ΔW is made of."""
    factors = {name for entry in entries.values() if isinstance(entry, Factors) for name in (entry.A, entry.B)}
    factors |= {name for entry in entries.values() if isinstance(entry, Layer) for name in entry.names.values()}
    return factors | {name for name in tensors.names if _MAGNITUDE.search(name)}


def _is_torchtune(source: Source) -> bool:
    """torchtune writes PEFT's configuration beside a file of its own, with or without PEFT's."""
    if source.path.is_file():
        return source.path.suffix == ".pt"
    return not has_adapter_file(source.folder) and any(file.name.startswith("adapter_") for file in source.files(".pt"))


def _norms(folder: Path) -> dict[str, float]:
    """‖W0‖ by parameter, where lorabench has kept it."""
    file = folder / NORMS_FILE
    return numbers(read_json(file), str(file)) if file.exists() else {}


def _lora_entries(adapter: Adapter) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    stacked: dict[str, tuple[str, str]] = {}
    for name in adapter.tensors.names:
        match = _A.fullmatch(name)
        if match is None:
            continue
        module = match["module"].removeprefix(PREFIX)
        if targeted(adapter.config, module):
            stacked[module] = name, _B(name)
            continue
        factors = _factors(adapter, name, module, match["module"])
        entries[factors.parameter] = factors
        if adapter.is_dora and not adapter.own and adapter.source.weights is not None:
            entries[f"{module}.weight"] = Dora(
                sBA=factors, tensors=adapter.tensors, magnitude=_magnitude(adapter.tensors, match["module"]),
                weights=adapter.source.weights, parameter=f"{module}.weight",
                base_name=original_name(f"{module}.weight", adapter.layers),
            )  # fmt: skip
    if stacked and adapter.initial is not None:
        raise InputError(f"{adapter.config_file}: target_parameters: ΔW of experts needs initial factors, and has none")
    for layer in expert_layers(adapter.config, adapter.config_file, stacked, adapter.tensors, adapter.source):
        entries[layer.parameter] = layer
    if not entries:
        raise InputError(f"{adapter.tensors.file}: holds no LoRA factors (…lora_A.weight)")
    return entries


def _factors(adapter: Adapter, name: str, module: str, stored: str) -> Factors:
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
        magnitude=_magnitude(adapter.tensors, stored) if adapter.is_dora else None,
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
            return {"initial": folder_tensors(other), "initial_is_peft": True}
    raise InputError(
        f"{folder / CONFIG_FILE}: init_lora_weights = {start}: ΔW needs the initial factors, not in the file; put the "
        "adapter as it was before training beside it, in a folder `init`, or let PEFT convert it "
        "(save_pretrained(path_initial_model_for_weight_conversion=…))"
    )


def _notes(adapter: Adapter, entries: dict[str, Entry]) -> list[str]:
    notes = []
    if adapter.is_dora and not adapter.own and adapter.source.weights is None:
        notes.append("DoRA: ΔW needs W0; this is its s B A; give --base")
    if adapter.is_dora and "use_dora" not in adapter.config:
        notes.append(
            "magnitudes, and no use_dora: torchtune's export, which has reordered the rows of q and k but not their "
            "magnitudes, so that this is not the ΔW that was trained (adapter_model.pt is)"
        )
    if adapter.initial_is_peft and adapter.initial:
        notes.append(f"initial factors from {adapter.initial.file.parent}: ΔW = s (B A - B0 A0)")
    if adapter.config.get("lora_bias"):
        notes.append("lora_bias: the change of the biases is not part of ΔW")
    if adapter.config.get("alora_invocation_tokens"):
        notes.append("aLoRA: ΔW acts on the tokens after its invocation alone")
    if any("trainable_tokens_" in name for name in adapter.tensors.names):
        notes.append("trainable_token_indices: the change of single tokens' rows is not part of ΔW")
    if adapter.layers:
        notes.append(
            f"layer_replication: blocks 0 to {len(adapter.layers) - 1} are the base's {_spans(adapter.layers)}"
        )
    if any(isinstance(entry, Factors) and entry.groups > 1 for entry in entries.values()):
        notes.append("a grouped convolution: its ΔW counts all inputs, which W0 does not")
    return notes


def _spans(layers: list[int]) -> str:
    """`0 to 1, 1`."""
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1] + 1]
    ends = [*starts[1:], len(layers)]
    names = [
        f"{layers[i]} to {layers[j - 1]}" if j - i > 1 else f"{layers[i]}" for i, j in zip(starts, ends, strict=True)
    ]
    return some(names)


def _one_file(source: Source) -> Source:
    """Of a folder with one file of tensors, by another name than PEFT's, that file."""
    if source.path.is_file() or has_adapter_file(source.folder):
        return source
    files = source.files(".safetensors")
    return replace(source, path=files[0]) if len(files) == 1 else source


def _without_config(source: Source) -> Found | None:
    """A file of PEFT's whose configuration is lost: the rank is that of the factors, α is given or taken for r."""
    if not (source.files(".safetensors", ".bin") if source.path.is_file() else has_adapter_file(source.folder)):
        return None
    tensors = adapter_tensors(source)
    if tensors is None:
        return None
    names = [name for name in tensors.names if name.startswith(PREFIX) and _A.fullmatch(name)]
    if not names:
        return None
    if any(".lora_magnitude_vector" in name for name in tensors.names):
        raise InputError(f"{tensors.file}: holds DoRA's magnitudes, and no {CONFIG_FILE} lies beside it")
    entries: dict[str, Entry] = {}
    origin = "assumed" if source.alpha is None else "--alpha"
    for name in names:
        module, rank = name.removeprefix(PREFIX).rpartition(".lora_")[0], tensors.shape(name)[0]
        if BASE_LAYER in f"{module}." or module.endswith(".experts"):
            raise InputError(
                f"{tensors.file}: {module}: LoRA on stacked experts (target_parameters), of which {CONFIG_FILE} alone "
                "tells the rank and which weight: none lies beside it"
            )
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
