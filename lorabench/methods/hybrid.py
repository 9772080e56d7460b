"""Hybrid: several methods in one model, in the sense of MAM and UniPELT.

He et al. 2022 (Mix-And-Match: prefix tuning on the attention, parallel adapters at the feed-forward), arXiv 2110.04366;
Mao et al. 2022 (UniPELT: LoRA, prefix and adapters; here without its gates), arXiv 2110.07577.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabench.methods._own_file import OwnFile, new_head_updates
from lorabench.methods._peft import head_updates
from lorabench.methods.adapter import Adapter
from lorabench.methods.lora import Lora
from lorabench.methods.prefix import Prefix
from lorabench.methods.prompt import Prompt
from lorabench.models import base_model as models
from lorabench.spec.method import LoadBase, Method
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Hybrid(OwnFile):
    """Two parts or more: `method.lora.rank = 8`, `method.lora.targets = "attention"`, `method.adapter.reduction = 16`.

    ΔW is that of the LoRA part, what the others compute beside it apart; such a model cannot be merged.
    """

    lora: Lora | None = None
    adapter: Adapter | None = None
    prefix: Prefix | None = None
    prompt: Prompt | None = None

    @property
    def parts(self) -> list[Method]:
        """In the order in which they are attached: a soft prompt wraps the model that the others have changed."""
        return [part for part in (self.lora, self.adapter, self.prefix or self.prompt) if part is not None]

    @property
    def has_update(self) -> bool:
        return self.lora is not None

    @property
    def starts_at_base(self) -> bool:
        return all(part.starts_at_base for part in self.parts)

    @property
    def adds_computation(self) -> bool:
        return True

    @property
    def num_virtual_tokens(self) -> int:
        return sum(part.num_virtual_tokens for part in self.parts)

    def left_out(self, model: nn.Module) -> list[str]:
        return self.lora.left_out(model) if self.lora else []

    def without_effect(self, model: nn.Module) -> list[str]:
        found = self.lora.without_effect(model) if self.lora else []
        return [text.replace("method.", "method.lora.", 1) for text in found]

    def ranks(self, model: nn.Module) -> dict[str, tuple[str, int]]:
        found = self.lora.ranks(model) if self.lora else {}
        return {name: (key.replace("method.", "method.lora.", 1), rank) for name, (key, rank) in found.items()}

    def problems(self, spec: RunSpec) -> Iterator[str]:
        for part in self.parts:
            yield from (text.replace("method.", f"method.{part.name}.", 1) for text in part.problems(spec))
        if self.prefix and self.prompt:
            yield "method.prompt: cannot be had together with method.prefix: both stand in front of the input"
        if len(self.parts) < 2:
            yield "method: a hybrid needs at least two of the parts lora, adapter, prefix, prompt"
        if self.lora and self.lora.restart_every:
            yield "method.lora.restart_every: cannot be had in a hybrid, whose other parts do not begin anew"
        if self.lora and (self.lora.rebased or self.lora.num_start_examples or self.lora.lr_ratio != 1):
            yield (
                f'method.lora: init = "{self.lora.init}", lr_ratio = {self.lora.lr_ratio}: in a hybrid, init must be '
                "kaiming, gaussian or orthogonal, and lr_ratio 1"
            )

    def attach(self, model: nn.Module, spec: RunSpec) -> nn.Module:
        import torch
        from peft import inject_adapter_in_model

        tuned = model
        trained: list[nn.Parameter] = []
        if self.lora:
            self.lora.prepare(model)
            config = self.lora.peft_config(model, spec)
            inject_adapter_in_model(config, model)
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.to(getattr(torch, self.lora.adapter_dtype))
                    trained.append(parameter)
        if self.adapter:
            self.adapter.attach(model, spec)
            trained += [p for name, p in model.named_parameters() if ".bottleneck." in name]
        soft = self.prefix or self.prompt
        if soft:
            tuned = soft.attach(model, spec)
        else:
            model.requires_grad_(False)
            for head in models.new_heads(model):
                model.get_submodule(head).float().requires_grad_(True)
        for parameter in trained:
            parameter.requires_grad_(True)
        return tuned

    def updates(self, model: Any, load_base: LoadBase) -> Iterator[Update]:
        if self.lora:
            yield from self.lora.layer_updates(model, load_base)
        wrapped = hasattr(model, "get_base_model")
        yield from head_updates(model) if wrapped else new_head_updates(model, load_base)

    def merge(self, model: nn.Module) -> nn.Module | None:
        return None


EXAMPLE = Hybrid(lora=Lora(rank=2, targets="attention"), adapter=Adapter(reduction=8, placement="parallel"))
"""LoRA on the attention, and an adapter at the feed-forward."""
