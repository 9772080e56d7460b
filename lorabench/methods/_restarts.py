"""ReLoRA: every so many steps s B A is merged into the weights, and LoRA begins anew.

Lialin et al. 2023, arXiv 2307.05695. What was merged is kept as factors, so that ΔW = s Σ Bᵢ Aᵢ is as exact as LoRA's.

Shapes: M out features, N in features, r rank, k restarts so far.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorabench.methods._peft import ADAPTER, tuner_layers
from lorabench.models import weights

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.updates.update import Update

Merged = dict[str, tuple["Tensor", "Tensor"]]
"""(B, A) of each layer, without the scale."""


def attach(model: Any) -> None:
    """Hold the weights that will be merged into in float32, so that nothing merged is rounded off."""
    for _, module in tuner_layers(model):
        weight = module.get_base_layer().weight
        weight.data = weight.data.float()
    model.merged = []


def begin_anew(model: Any, seed: int, init: Any) -> None:
    """Merge, and draw A anew, B being zero again; torch's own generators are left as they were."""
    import torch

    part = {
        name: (module.lora_B[ADAPTER].weight.detach().clone(), module.lora_A[ADAPTER].weight.detach().clone())
        for name, module in tuner_layers(model)
    }
    _merge(model, part)
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[*devices]), torch.no_grad():
        torch.manual_seed(seed)
        for _, module in tuner_layers(model):
            module.reset_lora_parameters(ADAPTER, init)


def _merge(model: Any, part: Merged) -> None:
    for name, module in tuner_layers(model):
        B, A = part[name]
        module.get_base_layer().weight.data.add_(module.scaling[ADAPTER] * B.float() @ A.float())
    model.merged.append(part)


def state(model: Any) -> dict[str, Tensor]:
    """What has been merged, for a checkpoint."""
    return {
        f"merged:{number}:{name}:{side}": factor
        for number, part in enumerate(getattr(model, "merged", []))
        for name, pair in part.items()
        for side, factor in zip("BA", pair, strict=True)
    }


def restore(model: Any, held: dict[str, Tensor]) -> None:
    """Merge what `state` gave into an untouched base, in the same order: the same bits. ValueError if some lacks."""
    layers = dict(tuner_layers(model))
    count = len({key.split(":")[1] for key in held if key.startswith("merged:")})
    for number in range(len(model.merged), count):
        try:
            part = {
                name: (held[f"merged:{number}:{name}:B"].to(device), held[f"merged:{number}:{name}:A"].to(device))
                for name, device in ((name, layer.get_base_layer().weight.device) for name, layer in layers.items())
            }
        except KeyError as error:
            raise ValueError(f"lacks {error.args[0]}") from None
        _merge(model, part)


def whole(update: Update, name: str, module: Any, merged: list[Merged]) -> Update:
    """ΔW since the untouched base: the factors [s B₁, …, s Bₖ, s B] and [A₁; …; Aₖ; A], of rank up to (k + 1) r."""
    import torch

    assert update.A is not None
    scale = module.scaling[ADAPTER]
    B = torch.cat([scale * part[name][0].to(update.B) for part in merged], 1)
    A = torch.cat([part[name][1].to(update.B) for part in merged])
    start = weights.dense_linear(module.get_base_layer()).weight - B.float() @ A.float()
    return replace(update, B=torch.cat([B, update.B], 1), A=torch.cat([A, update.A]), base_norm=float(start.norm()))
