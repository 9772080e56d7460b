"""Prompts that a base makes: how it is asked for them, and what of its text is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from lorabench.models.base_model import load_tokenizer
from lorabench.spec.generate import Generate
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.task import Prompt
from lorabench.training.generation import written

TOTAL = 10
"""Examples that the generator is told of, as in the paper; more where it is shown so many."""


@dataclass
class Made:
    """What a generator has made so far: a set, as in algorithm 1 of the paper."""

    texts: list[str] = field(default_factory=list)
    """Each once."""
    count: int = 0
    endless: int = 0
    repeated: int = 0
    _seen: set[str] = field(default_factory=set)

    def add(self, text: str | None) -> None:
        self.count += 1
        if text is None:
            self.endless += 1
        elif text in self._seen:
            self.repeated += 1
        else:
            self._seen.add(text)
            self.texts.append(text)


def asks(examples: Sequence[str]) -> str:
    """What a generator writes behind: a numbered list that goes on, as in the paper's figure 7 (appendix A.1).

    Without examples, for a base that is trained on them, what stands before each.
    """
    if not examples:
        return "Here is an example:\n"
    lines = [f"{number}. {text}" for number, text in enumerate(stems(examples), 1)]
    total = max(TOTAL, len(lines) + 1)
    return "\n".join([f"Here are {total} examples:\n", *lines, f"{len(lines) + 1}."])


def as_question(prompt: str, name: str) -> str:
    """t(x), what the discriminator answers by yes or no (equation 1 of the paper)."""
    return f"{prompt.rstrip()}\nIs the above question from the {name} dataset?"


def stems(prompts: Sequence[str]) -> list[str]:
    """Without the white space that a template ends with."""
    return [prompt.rstrip() for prompt in prompts]


def tail(prompts: Sequence[str]) -> str:
    """The white space that all of them end with; none where they differ in it."""
    ends = {prompt[len(prompt.rstrip()) :] for prompt in prompts}
    return next(iter(ends)) if len(ends) == 1 else ""


def drawn_texts(
    model: nn.Module, spec: RunSpec, generate: Generate, text: str, examples: Sequence[str]
) -> list[str | None]:
    """`generate.batch_size` prompts that the model writes behind `text`; None in the place of one without end."""
    tokenizer = load_tokenizer(spec.model, spec.revision)
    asked = Prompt(ids=np.array(tokenizer(text)["input_ids"], np.int32), text=text, reference="")
    rows = written(model, spec, generate, [asked] * generate.batch_size)
    return [made_prompt(tokenizer, row, text, examples) for row in rows]


def made_prompt(tokenizer: object, row: list[int], text: str, examples: Sequence[str]) -> str | None:
    """The prompt in the tokens that were written behind `text`: up to the end of the sequence or of the list's item.

    An item ends with its line, or where the task's prompts have several lines at the next number. None where there is
    no end, or nothing before it.
    """
    end = tokenizer.eos_token_id  # type: ignore[attr-defined]
    is_ended = end in row
    whole = tokenizer.decode(row[: row.index(end)] if is_ended else row, skip_special_tokens=True)  # type: ignore[attr-defined]
    if text == asks(examples):
        has_lines = any("\n" in stem for stem in stems(examples))
        stop = f"\n{len(examples) + 2}." if has_lines else "\n"
        whole, found, _ = whole.lstrip(" ").partition(stop)
        is_ended = is_ended or bool(found)
    stem = whole.strip()
    return stem + tail(examples) if is_ended and stem else None
