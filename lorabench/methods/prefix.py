"""Prefix tuning: trained keys and values in front of every layer's own, the model itself frozen.

Li and Liang 2021, arXiv 2101.00190; without re-parameterization also P-tuning v2: Liu et al. 2022, arXiv 2110.07602.
By PEFT, which in an encoder-decoder puts a prefix before what the decoder has written, and there alone; the first paper
also puts one before what is encoded, and before what the decoder reads of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge

from lorabench.methods._peft import SoftPrompt
from lorabench.models import base_model as models

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
            prefix_projection=self.projection,
            encoder_hidden_size=width if self.projection else None,  # type: ignore[arg-type]
            **(_decoder_shape if models.task_type(model) == "SEQ_2_SEQ_LM" else _of_keys)(model.config),
        )


def _decoder_shape(config: Any) -> dict[str, Any]:
    """Of an encoder-decoder, as T5 and as BART call it; PEFT would take the encoder's, and the model's width."""
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    return {
        "num_layers": getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", None),
        "num_attention_heads": heads,
        "token_dim": heads * (getattr(config, "d_kv", None) or config.hidden_size // heads),
    }


def _of_keys(config: Any) -> dict[str, Any]:
    """Width and heads of the keys where PEFT has no right idea of them: in Falcon 7B all heads share one key. No
    heads where a model has no attention, which PEFT then refuses."""
    heads = getattr(config, "num_attention_heads", None)
    if heads and getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return {"token_dim": config.hidden_size // heads, "num_attention_heads": 1}
    return {"token_dim": config.hidden_size, "num_attention_heads": heads}


EXAMPLE = Prefix(num_tokens=4)
