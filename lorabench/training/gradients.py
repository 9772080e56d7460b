"""The loss's gradient at W0 with respect to each linear layer's weight, on the task and on what is retained.

Zhang et al. 2025 (LoRA-One, arXiv 2502.01235) show that LoRA's ΔW turns to the top singular spaces of this one-step
gradient of full fine-tuning. Made of the layers' inputs h and of the gradients g at their outputs, Σ g hᵀ over tokens:
no weight needs a gradient of its own, so that a quantized base has one too, and memory holds one layer's at a time.

Shapes: M out features, N in features, t tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.config.decode import encode
from lorabench.linalg.decompose import ThinSVD, thin_svd
from lorabench.models.base_model import new_heads, reads_images
from lorabench.models.weights import is_linear_layer, output_embeddings
from lorabench.training.evaluation import retained_sets
from lorabench.training.examples import Examples, few_batches, reader
from lorabench.training.passes import autocast, base_of
from lorabench.training.predictions import task_loss
from lorabench.training.state import Training
from lorabench.updates.gradients import FOLDER, RETAIN, SUFFIX, TASK, write_gradients

VERSION = 1
"""Part of a file's name: raise it when the numbers change."""
RANK = 16
"""Triplets that are kept of a layer."""
TOKENS = 1024
"""About how many of a set the gradient is of; one example at least."""
Sides = dict[str, list[tuple[Tensor, Tensor]]]
"""Layer -> g (t, M) and h (t, N), pass by pass."""


def keep(training: Training, base: nn.Module, root: Path) -> str:
    """Keep the gradients of the run's base and data, unless they are; the name of the file."""
    name = hashlib.sha256(json.dumps(_content(training), sort_keys=True, default=str).encode()).hexdigest()[:32]
    file = root / FOLDER / f"{name}{SUFFIX}"
    if not file.is_file():
        sets = {TASK: (training.base.stages[-1], "train")}
        if retained := retained_sets(training.base.stages):
            sets[RETAIN] = retained[0]
        write_gradients({name: triplets(training, base, *part) for name, part in sets.items()}, file)
    return file.name


def _content(training: Training) -> dict[str, object]:
    """All that they depend on; the seed only where a new head is drawn by it."""
    spec = training.spec
    own = {key: getattr(spec, key) for key in ("seq_len", "dtype", "quantization")}
    seed = spec.seed if new_heads(base_of(training.model)) else None
    tasks = [encode(task) for task in spec.stages]
    return own | training.base.content | {"tasks": tasks, "seed": seed, "of": [VERSION, RANK, TOKENS]}


def triplets(training: Training, base: nn.Module, examples: Examples, split: str) -> dict[str, ThinSVD]:
    """The top RANK of each layer's gradient of the mean loss over the first TOKENS or so of a split."""
    spec, device, task, count = training.spec, training.meter.device, reader(examples.task, split), 0
    base.eval().requires_grad_(False)
    with autocast(spec, device), sides(base) as found:
        for batch in few_batches(examples, split, TOKENS, device):
            task_loss(base, task, batch).backward()
            count += task.count(batch)
    return {layer: top(pairs, count) for layer, pairs in found.items()}


def top(pairs: list[tuple[Tensor, Tensor]], count: int) -> ThinSVD:
    """Of Σ g hᵀ / count, from its factors where it has fewer tokens than rows and columns."""
    g, h = (torch.cat(parts).float().cpu() for parts in zip(*pairs, strict=True))
    short = len(g) < min(g.shape[1], h.shape[1])
    svd = thin_svd(g.mT / count, h, keep=RANK) if short else thin_svd(g.mT @ h / count, keep=RANK)
    return ThinSVD(U=svd.U, S=svd.S[:RANK], Vh=svd.Vh)


def _first(model: Any) -> list[nn.Module]:
    """The modules that make states of what the model is given."""
    if reads_images(model):
        return [next(each for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear))]
    tokens = model.get_input_embeddings().weight  # of T5, which encoder and decoder each have an embedding of
    return [each for each in model.modules() if isinstance(each, nn.Embedding) and each.weight is tokens]


@contextmanager
def sides(model: nn.Module) -> Iterator[Sides]:
    """What a backward pass inside gives of the linear layers but for the head, of whose weights none need train."""
    found: Sides = defaultdict(list)
    heads = tuple(f"{head}." for head in new_heads(model))
    last = output_embeddings(model)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if is_linear_layer(module) and module is not last and not f"{name}.".startswith(heads)
    ]

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            h = args[0].detach().flatten(0, -2)
            if output.requires_grad:
                output.register_hook(lambda g: found[name].append((g.detach().flatten(0, -2), h)))

        return module.register_forward_hook(forward)

    def begin(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.requires_grad_()

    handles = [each.register_forward_hook(begin) for each in _first(model)]
    handles += [watch(name, module) for name, module in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
