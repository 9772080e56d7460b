"""What a tokenizer does beside cutting up a text: what it puts before it, and where a prompt ends in it."""

from __future__ import annotations

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


def _by_length(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Apart, where the two together do not begin with the prompt's own tokens."""
    head, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + response))
    if whole[: len(head)] == head:
        return head, whole[len(head) :]
    return head, tokenizer(response, add_special_tokens=False)["input_ids"]
