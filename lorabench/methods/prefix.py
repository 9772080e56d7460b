"""Prefix tuning: trained keys and values in front of every layer's own, the model itself frozen.

Li and Liang 2021, arXiv 2101.00190; without re-parameterization also P-tuning v2: Liu et al. 2022, arXiv 2110.07602.
By PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from lorabench.methods._peft import SoftPrompt

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Prefix(SoftPrompt):
    """num_tokens · layers · 2 · (width of the keys) parameters; with `projection` those of its network come on top."""

    prefix: ClassVar[bool] = True

    num_tokens: Annotated[int, Ge(1)] = 20
    projection: bool = False
    """Re-parameterization: the keys and values come out of a two-layer network that is trained with its input."""
    projection_width: Annotated[int, Ge(1)] | None = None
    """Hidden width of that network (None: the model's width)."""

    @property
    def num_virtual_tokens(self) -> int:
        return self.num_tokens

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        if self.projection_width is not None and not self.projection:
            yield f"method.projection_width = {self.projection_width}: is of use with method.projection = true only"

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        from peft import PrefixTuningConfig

        width = self.projection_width or model.config.hidden_size
        return PrefixTuningConfig(
            num_virtual_tokens=self.num_tokens,
            **_of_keys(model.config),
            prefix_projection=self.projection,
            encoder_hidden_size=width if self.projection else None,  # type: ignore[arg-type]
        )


def _of_keys(config: Any) -> dict[str, Any]:
    """Width and heads of the keys where PEFT has no right idea of them: in Falcon 7B all heads share one key. No
    heads where a model has no attention, which PEFT then refuses."""
    heads = getattr(config, "num_attention_heads", None)
    if heads and getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return {"token_dim": config.hidden_size // heads, "num_attention_heads": 1}
    return {"token_dim": config.hidden_size, "num_attention_heads": heads}


EXAMPLE = Prefix(num_tokens=4)
