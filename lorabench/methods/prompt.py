"""Prompt tuning: trained vectors in front of the embedded input, the model itself frozen.

Lester, Al-Rfou and Constant 2021, arXiv 2104.08691. By PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from lorabench.methods._peft import SoftPrompt, sizes
from lorabench.models import base_model as models

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Prompt(SoftPrompt):
    """num_tokens · width parameters."""

    num_tokens: Annotated[int, Ge(1)] = 20
    start: Literal["random", "vocabulary", "text"] = "vocabulary"
    """`random` numbers, the embeddings of random words of the `vocabulary`, or those of `text`."""
    text: str | None = None
    """For `start = "text"`: its tokens are repeated or cut to num_tokens."""

    @property
    def num_virtual_tokens(self) -> int:
        return self.num_tokens

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        if (self.start == "text") != bool(self.text):
            yield f'method.start = "{self.start}": method.text must be given with "text", and with it alone'

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        from peft import PromptTuningConfig

        start = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}[self.start]
        text = {"prompt_tuning_init_text": self.text, "tokenizer_name_or_path": models.resolve(spec.model)}
        return PromptTuningConfig(
            num_virtual_tokens=self.num_tokens,
            num_transformer_submodules=1,  # of an encoder-decoder PEFT would train as many more that nothing reads
            **sizes(model),
            prompt_tuning_init=start,
            **(text if self.start == "text" else {}),  # type: ignore[arg-type]
        )


EXAMPLE = Prompt(num_tokens=4)
