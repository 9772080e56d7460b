"""What the methods share whose adapters are kept in lorabench's own form: PEFT has none for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError, encode, show
from lorabench.config.quote import show_path
from lorabench.models.base_model import drawn_modules, new_heads
from lorabench.models.weights import weight_changes
from lorabench.spec.method import LoadBase, Method
from lorabench.updates.update import Update, restore_drawn, save_drawn, save_svds, save_updates

if TYPE_CHECKING:
    from torch import nn

    from lorabench.spec.run_spec import RunSpec

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


class OwnFile(Method):
    """All that is trained in one safetensors file, and the method's fields beside it."""

    def save(self, model: nn.Module, load_base: LoadBase, folder: Path, keep: str) -> None:
        """What is trained, whatever `keep` is; of ΔW, if there is any, what `keep` says."""
        from safetensors.torch import save_file

        save_file({name: t.contiguous() for name, t in self.trained_state(model).items()}, folder / ADAPTER_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self._config, indent=2, sort_keys=True) + "\n")
        save_drawn(_frozen_drawn(_base_of(model)), folder)
        updates = list(self.updates(model, load_base))
        if updates and keep == "updates":
            save_updates(updates, folder)
        elif updates:
            save_svds(updates, folder, int(keep.removeprefix("svd:")))

    def load(self, base: nn.Module, folder: Path, spec: RunSpec) -> nn.Module:
        """InputError where the folder's adapters are of other hyperparameters, or of another base."""
        from lorabench.updates.readers._entry import TensorFile, read_json

        found = read_json(folder / CONFIG_FILE)
        other = [key for key in sorted(self._config | found) if found.get(key) != self._config.get(key)]
        if other:
            pairs = (f"{key} = {show(found.get(key))} and not {show(self._config.get(key))}" for key in other)
            raise InputError(f"{folder / CONFIG_FILE}: is of another method: {', '.join(pairs)}")
        restore_drawn(base, folder)
        tensors, model = TensorFile(folder / ADAPTER_FILE), self.attach(base, spec)
        try:
            self.restore(model, {name: tensors.read(name) for name in tensors.names})
        except ValueError as error:
            raise InputError(f"{tensors.file}: does not fit {show_path(spec.model)}: {error}") from None
        return model

    @property
    def _config(self) -> dict[str, Any]:
        """The method's fields; without PEFT's key `peft_type`, so that nobody takes it for PEFT's."""
        return {"lorabench_method": self.name} | {k: v for k, v in encode(self).items() if k != "name"}


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _frozen_drawn(base: Any) -> dict[str, Any]:
    """What the base's files lack and no training has changed: a new head stands among what is trained."""
    modules = drawn_modules(base)
    return {name: value for name, value in getattr(base, "drawn", {}).items() if name.rpartition(".")[0] in modules}


def new_head_updates(model: nn.Module, load_base: LoadBase) -> Iterator[Update]:
    """ΔW of a new task head that was trained in place; nothing where there is none."""
    heads = [(head, model.get_submodule(head)) for head in new_heads(model)]
    names = [f"{head}.{name}" for head, module in heads for name, _ in module.named_parameters()]
    return weight_changes(model, load_base(), names=names) if names else iter(())
