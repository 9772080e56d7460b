"""Inference as a user would have it: what the tuned and the merged model take beside the base, and whether they agree.

Shapes: n rows in a batch, t tokens of a prompt.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from lorabench.models.base_model import max_length
from lorabench.models.copies import copied
from lorabench.models.denoisers import CONDITIONS, TIMESTEP
from lorabench.spec.measures import BATCH_SIZES
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.task import IGNORE
from lorabench.training.examples import PIXELS, Batch, Examples, collate
from lorabench.training.passes import decodes, forward

NEW_TOKENS = 5
"""Generated in one call; the first of them is prefill's."""
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 20, 0.5
"""A race goes on for so many rounds at least, at most, and for so long between the two."""
CHECKED_TOKENS = 512
"""About how many positions merged and unmerged logits are compared at."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Of `merge_error`, by dtype: bfloat16 rounds W0 + ΔW to 8 bits. None holds on a quantized base, for it rounds more."""


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares all frozen tensors with the model: to take its adapter off, or to put one on, costs no memory.

    What was trained is copied, so that full fine-tuning does cost its weights again: no more than its optimizer held.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return copied(model, {id(held): held for held in _held(model) if id(held) not in trained})


def _held(model: nn.Module) -> Iterator[Any]:
    """Parameters, buffers, and what bitsandbytes keeps beside them: the scales of 4-bit and 8-bit weights."""
    for module in model.modules():
        state = vars(module.state) if type(getattr(module, "state", None)).__name__ == "MatmulLtState" else {}
        yield from (getattr(module, "quant_state", None), *module._parameters.values(), *module._buffers.values())
        yield from (value for value in state.values() if isinstance(value, Tensor))


def as_served(model: nn.Module, dtype: str) -> nn.Module:
    """The model in evaluation mode with every parameter in the dtype of computation: serving needs no masters."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts of the run's own data, all of one length, so that nothing is padded; or images."""

    ids: Tensor
    """(largest batch size, t); of images (largest batch size, channels, height, width)."""
    generates: bool
    options: dict[str, Any]
    """For a forward pass over prompts: a decoder is to make its cache, and the logits of the last token alone."""
    told: Batch = field(default_factory=dict)
    """What a denoiser is told beside."""
    start: int | None = None
    """The token by which the decoder of an encoder-decoder begins."""

    @property
    def unit(self) -> str:
        """What is counted."""
        return "images" if self.ids.ndim == 4 else "tokens"

    @property
    def about(self) -> str:
        size = " × ".join(map(str, self.ids.shape[2:]))
        return f"images of {size}" if self.unit == "images" else f"prompts of {self.ids.shape[1]} tokens"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill", "decode") if self.generates else ("prefill",)

    def times(self, model: Any, ids: Tensor) -> tuple[float, ...]:
        """Seconds of each part, for prompts (n, t): until the first token, and from one token to the next.

        By `generate`, greedily, with the cache of keys and values. A model that classifies has a forward pass alone.
        """
        if not self.generates:
            return (seconds(partial(self.output, model, ids), ids.device),)
        _wait(ids.device)
        clock, begin = _Clock(), time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=clock,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            pad_token_id=model.config.pad_token_id,
        )
        if self.start is not None:
            clock.times[0] = begin  # the prompt is handed over when it has been encoded
        prefill, *decode = np.diff(clock.times).tolist()
        return prefill, statistics.median(decode)

    def output(self, model: nn.Module, ids: Tensor, **options: Any) -> Any:
        """Of a forward pass."""
        if self.told:
            return forward(model, {PIXELS: ids} | {key: each[: len(ids)] for key, each in self.told.items()}, **options)
        return model(**options, **self.inputs(ids)).logits

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """Of a forward pass over prompts (n, t)."""
        if self.unit == "images":
            return {PIXELS: ids}
        began = {} if self.start is None else {"decoder_input_ids": ids.new_full((len(ids), 1), self.start)}
        return {"input_ids": ids} | began | self.options


class _Clock(BaseStreamer):
    """When `generate` handed over the prompt and each new token; it waits for the device to do so."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __deepcopy__(self, memo: Any) -> _Clock:
        return self  # PEFT copies all that a soft prompt before an encoder is given to generate with

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def workload(spec: RunSpec, examples: Examples, base: nn.Module, device: torch.device) -> Workload:
    """Validation examples, joined and cut to the length of the longest, less where the model takes no more."""
    if examples.task.unit == "images":
        size, held = max(BATCH_SIZES), examples.splits["validation"]
        batch = collate([held[place % len(held)] for place in range(size)], examples.padding, device)
        told = {key: each for key, each in batch.items() if key in (TIMESTEP, *CONDITIONS)}
        return Workload(ids=batch[PIXELS], generates=False, options={}, told=told)
    rows = [example["input_ids"] for example in examples.splits["validation"]]
    generates, length = hasattr(base, "generate") and base.can_generate(), max(map(len, rows))
    limit = max_length(base)
    if limit is not None:
        length = min(length, limit - spec.method.num_virtual_tokens - (NEW_TOKENS if generates else 0))
    options: dict[str, Any] = {"use_cache": True} if generates else {}
    if generates and "logits_to_keep" in inspect.signature(base.forward).parameters:
        options["logits_to_keep"] = 1
    ids = np.resize(np.concatenate(rows), (max(BATCH_SIZES), max(length, 1))).astype(np.int64)
    start = base.config.decoder_start_token_id if generates and base.config.is_encoder_decoder else None
    return Workload(ids=torch.from_numpy(ids).to(device), generates=generates, options=options, start=start)


@torch.no_grad()
def compare(base: nn.Module, models: dict[str, nn.Module], work: Workload) -> dict[str, float]:
    """Latency and throughput of the base and of each model, and what each adds, by their names in MEASURES.

    All in one race, so that the seconds of one may be held against another's. What a model adds is the median of the
    ratios within a round, which a machine that slows down meanwhile does not change; that of the medians may differ.
    """
    measures = {}
    for size in BATCH_SIZES:
        ids = work.ids[:size]
        rows = race([partial(work.times, model, ids) for model in (base, *models.values())])
        for index, part in enumerate(work.parts):
            of_base, *others = zip(*([each[index] for each in row] for row in rows), strict=True)
            for name, times in {"base": of_base, **dict(zip(models, others, strict=True))}.items():
                key, median = f"{part}_{name}_batch_{size}", statistics.median(times)
                measures[f"{key}_seconds"] = median
                counted = ids.numel() if part == "prefill" and work.unit == "tokens" else size
                measures[f"{key}_{work.unit}_per_second"] = counted / median
                if name != "base":
                    measures[f"added_{key}"] = statistics.median(b / a for a, b in zip(of_base, times, strict=True)) - 1
    return measures


def race(calls: Sequence[Callable[[], Any]]) -> list[tuple[Any, ...]]:
    """What the calls return, a row a round: in turn, every other round backwards, so that no drift favours one.

    The first round warms up and is left out.
    """
    rows: list[tuple[Any, ...]] = []
    end = float("inf")
    while len(rows) < MIN_ROUNDS + 1 or (time.perf_counter() < end and len(rows) <= MAX_ROUNDS):
        direction = 1 - 2 * (len(rows) % 2)
        rows.append(tuple([call() for call in calls[::direction]][::direction]))
        if len(rows) == 1:
            end = time.perf_counter() + SECONDS
    return rows[1:]


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, the device's work included."""
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin


def checked_batch(examples: Examples, device: torch.device) -> Batch:
    """The first validation examples, of about CHECKED_TOKENS tokens in all, one at least."""
    rows = examples.splits["validation"]
    longest = 1 if PIXELS in rows[0] else max(len(row["input_ids"]) for row in rows)
    return collate(rows[: max(1, min(max(BATCH_SIZES), CHECKED_TOKENS // longest))], examples.padding, device)


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch on the CPU, without those of padding: (positions, vocabulary), or (n, classes)."""
    found = forward(model, batch)
    if decodes(model, batch):
        found = found[batch["labels"] != IGNORE]
    elif found.ndim == 3 and "attention_mask" in batch:
        found = found[batch["attention_mask"].bool()]
    return found.float().cpu()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference over the standard deviation of what was wanted."""
    return float((found - wanted).abs().max() / wanted.std())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
