"""A forward pass of any model, as a run's spec has it computed."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import nn

from lorabench.models import denoisers
from lorabench.models.flat import laid_out
from lorabench.processes.distributed import ALONE, World
from lorabench.spec.run_spec import RunSpec
from lorabench.training.examples import LENGTHS, PIXELS, Batch


def forward(model: nn.Module, batch: Batch, **options: Any) -> torch.Tensor:
    """Logits (n, classes), or (n, t, vocabulary) of the batch's own positions: virtual tokens in front have none.

    Of a decoder that is apart from what is read they are those of its labels' positions; of a denoiser (n, channels,
    height, width) what it says of the noise.
    """
    if denoisers.TIMESTEP in batch:
        told = {key: batch[key] for key in denoisers.CONDITIONS if key in batch}
        return denoisers.predict(model, batch[PIXELS], batch[denoisers.TIMESTEP], told, **options)
    if PIXELS in batch:
        found: torch.Tensor = model(pixel_values=batch[PIXELS]).logits
        return found
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    if decodes(model, batch):
        inputs["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
    if "token_type_ids" in batch and _takes_segments(model):
        inputs["token_type_ids"] = batch["token_type_ids"]
    lengths = tuple(batch[LENGTHS].tolist()) if LENGTHS in batch else ()
    if lengths:
        inputs |= {"position_ids": batch["position_ids"], "use_cache": False}  # beside a cache they tell nothing apart
    with laid_out(lengths):
        logits = model(**inputs).logits
    length = (batch["labels"] if "decoder_input_ids" in inputs else batch["input_ids"]).shape[1]
    return logits[:, -length:] if logits.ndim == 3 and logits.shape[1] > length else logits


def decodes(model: nn.Module, batch: Batch) -> bool:
    """Whether the labels are what the decoder of an encoder-decoder is to write; it also classifies."""
    return (
        PIXELS not in batch
        and base_of(model).config.is_encoder_decoder
        and "labels" in batch
        and batch["labels"].ndim == 2
    )


def decoder_inputs(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """(n, s), as the model makes it of labels: each what is before it, a token of the model's own before the first."""
    from transformers.models.bart.modeling_bart import shift_tokens_right

    base = base_of(model)
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return base.prepare_decoder_input_ids_from_labels(labels=labels)
    return shift_tokens_right(labels, base.config.pad_token_id, base.config.decoder_start_token_id)


def base_of(model: Any) -> Any:
    """transformers' model, whatever PEFT has around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _takes_segments(model: Any) -> bool:
    """Whether the base tells the texts of a pair apart by segments, of which a RoBERTa has a single one."""
    base = base_of(model)
    is_argument = "token_type_ids" in inspect.signature(base.forward).parameters
    return is_argument and getattr(base.config, "type_vocab_size", 2) > 1


def autocast(spec: RunSpec, device: torch.device, world: World = ALONE) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where the spec says so. Of shared-out weights its cache would keep all, cast, until it ends."""
    enabled = spec.dtype == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=not world.is_sharded)
