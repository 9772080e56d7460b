"""Examples that are laid end to end in one row: each attends to itself alone, and nothing is padded.

transformers tells them apart by positions that begin anew, and masks all else in the whole row: so the square of all
tokens is computed. Where a model leaves attention to transformers' interface, it is taken example by example instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

NAME = "sdpa_by_example"
"""Of the attention among transformers' implementations."""
_LENGTHS: ContextVar[tuple[int, ...]] = ContextVar("lengths", default=())


def attend_by_example(model: Any) -> None:
    """Have a model of transformers attend example by example in a row that is `laid_out`, in any other as before."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


@contextlib.contextmanager
def laid_out(lengths: tuple[int, ...]) -> Iterator[None]:
    """Around a forward pass over one row that holds examples of so many tokens each."""
    token = _LENGTHS.set(lengths)
    try:
        yield
    finally:
        _LENGTHS.reset(token)


def _mask(*args: Any, **given: Any) -> Tensor | None:
    """The examples' lengths, (1, 1, 1, n) whole numbers, in place of a mask; a mask where causality is not all of it:
    an example is longer than the window that it attends to."""
    from transformers.masking_utils import sdpa_mask

    lengths, window = _LENGTHS.get(), given.get("local_size")
    is_causal = given.get("attention_mask") is None and not given.get("use_vmap")
    if lengths and is_causal and (window is None or max(lengths) <= window):
        return torch.tensor(lengths).view(1, 1, 1, -1)
    return sdpa_mask(*args, **given)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """Of (1, heads, tokens, width), (1, tokens, heads, width)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    lengths = attention_mask.flatten().tolist()
    each = zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True)
    found = [sdpa_attention_forward(module, q, k, v, None, **others)[0] for q, k, v in each]
    return torch.cat(found, 1), None
