"""What a tokenizer does beside cutting up a text: what it puts before it, and where a prompt ends in it."""

from __future__ import annotations

from itertools import islice
from typing import Any


def opening(tokenizer: Any) -> list[int]:
    """The tokens that it puts before a text: Llama's beginning-of-sequence token, of many others none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = (place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return whole[: next(places, 0)]


def prompt_and_response(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """The tokens of both, which are cut up together: a tokenizer that marks beginnings of words marks none at the seam.

    A token over the seam (a space that ends the prompt and the word behind it) is the response's, as in EleutherAI's
    lm-evaluation-harness. No special tokens are added.
    """
    if not tokenizer.is_fast:  # and so knows of no offsets
        return _by_length(tokenizer, prompt, response)
    encoded = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    seam = next((place for place, end in enumerate(ends) if end > len(prompt)), len(ids))
    return ids[:seam], ids[seam:]


def context_and_continuation(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of both as EleutherAI's lm-evaluation-harness 0.4.13 has them (`_encode_pair`), none of them added.

    Spaces and line ends that end the context are the continuation's, whose tokens are those of the whole text behind as
    many as the context has by itself. An empty context is the token that begins sequences, or else that ends them.
    """
    head, whole = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context.rstrip(), context + continuation)
    )
    begin = (token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None)
    return head or [*islice(begin, 1)], whole[len(head) :]


def _by_length(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Apart, where the two together do not begin with the prompt's own tokens."""
    head, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + response))
    if whole[: len(head)] == head:
        return head, whole[len(head) :]
    return head, tokenizer(response, add_special_tokens=False)["input_ids"]
