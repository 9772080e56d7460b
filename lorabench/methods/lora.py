"""LoRA: ΔW = s B A with B (out, r), A (r, in); on a quantized base it is QLoRA.

Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; QLoRA: Dettmers et al. 2023,
arXiv 2305.14314. Attached, saved and loaded by PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Lt
from pydantic import StringConstraints

from lorabench import model as models
from lorabench import targets
from lorabench.method import Method
from lorabench.update import Update, save_deltas, save_svds

if TYPE_CHECKING:
    from torch import nn

PerRank = Annotated[str, StringConstraints(pattern=r"^[0-9]*\.?[0-9]+r$")]


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """The scale s is alpha / rank, or alpha / √rank with `rslora`."""

    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Ge(0)] | PerRank = "2r"
    """A number, or a multiple of the rank such as "2r": a fixed alpha and a fixed scale are different experiments."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    targets: str = "all-linear"
    """`query`, `query-value`, `attention`, `mlp`, `all-linear`, or a regular expression on layer names."""
    rslora: bool = False
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the trained factors."""

    @property
    def alpha_value(self) -> float:
        if isinstance(self.alpha, str):
            return float(self.alpha.removesuffix("r")) * self.rank
        return self.alpha

    def attach(self, model: nn.Module) -> nn.Module:
        import torch
        from peft import LoraConfig, get_peft_model

        names, heads = targets.match(model, self.targets), models.new_heads(model)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha_value,  # type: ignore[arg-type]  # PEFT takes any number
            lora_dropout=self.dropout,
            target_modules=names,
            use_rslora=self.rslora,
            fan_in_fan_out=models.is_conv1d(model.get_submodule(names[0])),
            task_type="SEQ_CLS" if heads else "CAUSAL_LM",
            modules_to_save=heads or None,
        )
        tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
        dtype = getattr(torch, self.adapter_dtype)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return tuned

    def updates(self, model: nn.Module, load_base: Callable[[], nn.Module]) -> Iterator[Update]:
        from peft.tuners.lora import LoraLayer

        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer) and "default" in module.lora_A:
                yield Update(
                    parameter=f"{name}.weight",
                    B=module.lora_B["default"].weight.detach() * module.scaling["default"],
                    A=module.lora_A["default"].weight.detach(),
                    base_norm=models.weight_norm(module.get_base_layer()),
                    scale_source="config",
                )
        yield from self._head_updates(model, load_base)

    def save(self, model: nn.Module, load_base: Callable[[], nn.Module], folder: Path, keep: str) -> None:
        if keep != "updates":
            save_svds(self.updates(model, load_base), folder, int(keep.removeprefix("svd:")))
            return
        models.save_peft(model, folder)
        norms = {update.parameter: update.base_norm for update in self.updates(model, load_base)}
        (folder / "base_norms.json").write_text(json.dumps(norms, indent=1))
        heads = list(self._head_updates(model, load_base))
        if heads:
            save_deltas(heads, folder)

    def _head_updates(self, model: nn.Module, load_base: Callable[[], nn.Module]) -> Iterator[Update]:
        """ΔW of a task head that was trained in full beside the factors."""
        from peft.utils import ModulesToSaveWrapper

        for name, module in model.get_base_model().named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                yield from models.weight_changes(module.modules_to_save["default"], module.original_module, f"{name}.")


EXAMPLE = Lora(rank=2)
