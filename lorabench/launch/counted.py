"""What a run's method would train, store and take on a well-known model: counted on its shapes, without weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import torch

from lorabench.config.decode import InputError, encode
from lorabench.config.plugins import example
from lorabench.launch import estimate, plan
from lorabench.models import base_model, shapes, weights
from lorabench.spec.run_spec import RunSpec
from lorabench.training.meter import GIB


def count_on(spec: RunSpec, shape: shapes.Shape) -> dict[str, float]:
    """The measures of `claim.COUNTABLE` for the run's method, quantization, dtype, batch and length on that model.

    Memory is by formula, on a GPU: weights, gradients, the optimizer's moments, activations and logits. An encoder
    is given a task head of two classes. InputError where the method fits no such model, or cannot be attached without
    weights.
    """
    keys = ("method", "optimizer", "quantization", "dtype", "batch_size", "micro_batch_size", "seq_len",
            "gradient_checkpointing")  # fmt: skip
    key = json.dumps({key: encode(getattr(spec, key)) for key in keys})
    return dict(_count(key, shape))


@cache
def _count(key: str, shape: shapes.Shape) -> dict[str, float]:
    config = shapes.config(shape)
    kind = "text" if config.model_type == "llama" else "classification"
    spec = RunSpec.from_json(json.loads(key) | {"task": encode(example("tasks", kind)), "model": shapes.NAMES[shape]})
    spec = replace(spec, seq_len=min(spec.seq_len, config.max_position_embeddings))
    base = base_model.from_config(spec, config, torch.device("meta"))
    num_base = weights.count(base)
    try:
        counts = plan.counted(spec, base, {})
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(f'method.name = "{spec.method.name}": cannot be counted without weights: {error}') from None
    return {
        "num_parameters": float(counts.num_parameters),
        "num_trainable": float(counts.num_trainable),
        "trainable_share": counts.num_trainable / num_base,
        "storage_bytes": estimate.updates_bytes(spec, counts),
        "model_gib": counts.weight_bytes / GIB,
        "peak_gib": _memory_bytes(spec, counts) / GIB,
    }


def _memory_bytes(spec: RunSpec, counts: estimate.Counts) -> float:
    """Peak memory of training by formula, what libraries take apart.

    Weights; for what trains the gradient in float32, and what the optimizer keeps; activations kept for the backward
    pass, about 10 widths and 4 inner widths a token and layer (only the layers' inputs and one layer's activations with
    gradient checkpointing); logits, their log-softmax and gradient in float32.
    """
    micro, lengths = spec.micro_batch_size or spec.batch_size, spec.objective.longest(spec)
    layer = 10 * counts.width + 4 * counts.inner
    kept = counts.layers * counts.width + layer if spec.gradient_checkpointing else counts.layers * layer
    memory = counts.weight_bytes + 4 * counts.num_trainable + counts.moment_bytes
    return memory + micro * (sum(lengths) * kept * estimate.BYTES[spec.dtype] + lengths[-1] * 3 * 4 * counts.vocabulary)
