"""What a model writes to prompts: batched, with a cache of keys and values, by transformers' `generate`.

Prompts are padded on the left, so that every answer begins where its prompt ends; masks and positions leave the padding
out, and a batch gives the tokens that each prompt alone gives. What an encoder reads is padded on the right, as in
training: its positions count the padding too, and its decoder begins elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lorabench.models.base_model import load_tokenizer
from lorabench.processes.distributed import ALONE, World
from lorabench.spec.generate import Generate
from lorabench.training.passes import autocast
from lorabench.training.scoring import Answer

if TYPE_CHECKING:
    from lorabench.spec.run_spec import RunSpec
    from lorabench.spec.task import Prompt


def answers(
    model: nn.Module,
    spec: RunSpec,
    generate: Generate,
    prompts: list[Prompt],
    *,
    world: World = ALONE,
    check: Callable[[], None] = lambda: None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Answer]:
    """What the model answers to each prompt, in their order, as `written` has it."""
    rows = written(model, spec, generate, prompts, world=world, check=check, tell=tell)
    tokenizer = load_tokenizer(spec.model, spec.revision)
    return [answer(tokenizer, prompt, row) for prompt, row in zip(prompts, rows, strict=True)]


def answer(tokenizer: Any, prompt: Prompt, row: list[int]) -> Answer:
    """The text of the tokens that were written to a prompt."""
    text = tokenizer.decode(until(row, tokenizer.eos_token_id), skip_special_tokens=True)
    return Answer(prompt=prompt.text, reference=prompt.reference, output=text.removeprefix(prompt.tail))


@torch.no_grad()
def written(
    model: nn.Module,
    spec: RunSpec,
    generate: Generate,
    prompts: list[Prompt],
    *,
    world: World = ALONE,
    check: Callable[[], None] = lambda: None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[list[int]]:
    """The tokens that the model writes to each prompt, in their order, what follows an end-of-sequence token included.

    Ranks take batches in turn, and each gets all. `check` may raise between two batches, and `tell` is given how many
    prompts are done. The model is left in evaluation mode.
    """
    tokenizer = load_tokenizer(spec.model, spec.revision)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].ids))  # those of one length together
    batches = [order[first : first + generate.batch_size] for first in range(0, len(order), generate.batch_size)]
    device = next(model.parameters()).device
    model.eval()
    if world.is_sharded:
        model.unshard()  # an encoder is called by itself, and finds its outermost weights whole
    found: list[tuple[int, list[int]]] = []
    with _settings(model, generate, tokenizer) as settings:
        for number in range(world.rank, -(-len(batches) // world.size) * world.size, world.size):
            check()
            is_idle = number >= len(batches)
            if is_idle and not world.is_sharded:
                continue
            batch = batches[number if not is_idle else -1]
            ids, mask = padded(
                [prompts[place].ids for place in batch], tokenizer.pad_token_id, device, model.config.is_encoder_decoder
            )
            with _drawn(generate, number), autocast(spec, device, world):
                new = _generate(model, ids, mask, settings, world)
            if not is_idle:
                found += [(place, row.tolist()) for place, row in zip(batch, new.cpu(), strict=True)]
            tell(min((number + 1) * generate.batch_size, len(prompts)), len(prompts))
    if world.is_sharded:
        model.reshard()
    rows = dict(each for rank in world.gather(found) for each in rank)
    return [rows[place] for place in range(len(prompts))]


def padded(rows: list[Any], padding: int, device: torch.device, on_right: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, (n, longest), padded on the left, or on the right."""
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), padding, np.int64), np.zeros((len(rows), longest), np.int64)
    for place, row in enumerate(rows):
        own = slice(len(row)) if on_right else slice(longest - len(row), None)
        ids[place, own] = row
        mask[place, own] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def until(row: list[int], end: int | None) -> list[int]:
    """The tokens before the first `end`."""
    return row[: row.index(end)] if end in row else row


def _generate(model: Any, ids: Tensor, mask: Tensor, settings: dict[str, Any], world: World) -> Tensor:
    """The new tokens, (n, at most max_new_tokens)."""
    if world.is_sharded and hasattr(model, "get_base_model"):
        torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")  # PEFT's calls the base's, past the root
    written = model.generate(input_ids=ids, attention_mask=mask, synced_gpus=world.is_sharded, **settings)
    return written[:, 1 if model.config.is_encoder_decoder else ids.shape[1] :]


@contextlib.contextmanager
def _settings(model: Any, generate: Generate, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """What `generate` is called with. What the base's own configuration asks for (a temperature, a penalty) is left
    out meanwhile: it would be another decoding than the spec's."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = GenerationConfig()
    drawing = {"temperature": generate.temperature, "top_p": generate.top_p, "top_k": 0} if generate.temperature else {}
    try:
        yield {
            "do_sample": bool(generate.temperature),
            "num_beams": 1,
            "use_cache": True,
            "max_new_tokens": generate.max_new_tokens,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": getattr(base.config, "decoder_start_token_id", None),
            **drawing,
        }
    finally:
        base.generation_config = own


@contextlib.contextmanager
def _drawn(generate: Generate, number: int) -> Iterator[None]:
    """The random numbers of one batch, and outside none less."""
    with torch.random.fork_rng():
        torch.manual_seed(generate.seed * 1_000_003 + number)
        yield
