"""Small adapters that PEFT itself makes, as if trained."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from lorabench.updates.update import Update, save_svds, save_updates

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=40,
)  # fmt: skip
SCALE = 2.5


def save_lora(folder: Path, r: int = 4, seed: int = 0, **options) -> PeftModel:
    """LoRA of random factors on q_proj and up_proj of three blocks, α = 2.5 r; the model that it belongs to."""
    torch.manual_seed(seed)
    options = {"target_modules": ["q_proj", "up_proj"], "lora_alpha": SCALE * r, "init_lora_weights": False} | options
    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIG), LoraConfig(r=r, **options))
    model.save_pretrained(folder)
    return model


def deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT itself would add to each weight, by layer, in float64."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and module.lora_A
    }


def save_dense(folder: Path, shapes: dict[str, tuple[int, int]], seed: int = 0, keep: int | None = None) -> dict:
    """ΔW of full fine-tuning as lorabench keeps it, whole or (`keep`) its top singular vectors alone."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    updates = [Update(parameter=f"{name}.weight", B=W, base_norm=10.0) for name, W in found.items()]
    save_updates(updates, folder) if keep is None else save_svds(updates, folder, keep)
    return found
