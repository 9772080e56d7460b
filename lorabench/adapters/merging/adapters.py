"""The LoRA adapters of a store's runs, as they are on disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.plugins import unknown
from lorabench.config.quote import clip
from lorabench.methods._patterns import config_as_trained
from lorabench.spec.run_spec import RunSpec
from lorabench.store.record import RunRecord
from lorabench.store.store import Store, check_updates
from lorabench.updates.readers.peft_lora import PREFIX
from lorabench.updates.update import INITIAL_FILE

BESIDE_FACTORS = ("bias", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters",
                  "alora_invocation_tokens")  # fmt: skip
"""Fields of PEFT's configuration that train or mean more than factors of modules, which is all that PEFT merges."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A run's LoRA adapter as it is on disk."""

    record: RunRecord
    spec: RunSpec
    folder: Path
    config: Any
    """PEFT's LoraConfig."""

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return {name: tensor.float() for name, tensor in load_file(self.folder / "adapter_model.safetensors").items()}

    @property
    def factors(self) -> dict[str, Tensor]:
        """By PEFT's names: A (r, N) and B (M, r)."""
        return {name: tensor for name, tensor in self.tensors.items() if ".lora_" in name}

    @property
    def layers(self) -> set[str]:
        """Names of the modules that the factors are of."""
        return {name.removeprefix(PREFIX).partition(".lora_")[0] for name in self.ranks}

    @property
    def head(self) -> dict[str, Tensor]:
        """The trained task head, by its names in the base; empty for a language model."""
        return {name.removeprefix(PREFIX): t for name, t in self.tensors.items() if ".lora_" not in name}

    @property
    def ranks(self) -> dict[str, int]:
        """Name of the A factor -> its rank."""
        return {
            name: len(tensor) for name, tensor in self.factors.items() if ".lora_A." in name or "embedding_A" in name
        }


def read_adapter(store: Store, given: str) -> Adapter:
    """The adapter of the run whose id begins so. InputError where there is none, or none that can be merged."""
    run_id = find_run(store, given)
    record, folder = store.done(run_id, "RUN"), store.folder(run_id) / "updates"
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"RUN = {run_id}: has kept no adapter")
    check_updates(folder.parent, record, f"RUN = {run_id}")
    config = config_as_trained(folder)
    if config.peft_type != "LORA":
        raise InputError(f"RUN = {run_id}: is {config.peft_type.value}; PEFT merges LoRA adapters alone")
    if config.use_dora:
        raise InputError(f"RUN = {run_id}: is DoRA, whose learned norms no combination merges")
    for key in BESIDE_FACTORS:
        if (value := getattr(config, key, None)) not in (None, False, "none", [], {}):
            raise InputError(f"RUN = {run_id}: has {key} = {clip(value)}; PEFT merges factors of modules alone")
    if (folder / INITIAL_FILE).exists():
        raise InputError(
            f"RUN = {run_id}: is LoftQ, whose factors also make up for quantization: each would do it anew"
        )
    return Adapter(record=record, spec=RunSpec.from_json(record.spec), folder=folder, config=config)


def find_run(store: Store, given: str) -> str:
    """The one run whose id is, or begins with, `given`, or whose folder it is."""
    ids, given = store.run_ids(), store.named(given)
    found = [given] if given in ids else [run_id for run_id in ids if run_id.startswith(given)]
    if not given or len(found) != 1:
        which = f"{len(found)} runs begin so: {', '.join(found[:4])}" if found else unknown("run", given, ids)
        raise InputError(f"RUN = {clip(given)}: {which}")
    return found[0]
