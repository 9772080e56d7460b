"""P-tuning: a soft prompt that comes out of a small trained network.

Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385. By PEFT; the prompt stands in front of the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Lt

from lorabench.methods._peft import SoftPrompt, sizes

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lorabench.spec.run_spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class PTuning(SoftPrompt):
    """Embeddings of num_tokens, and the network behind them, are trained; only its output is needed afterwards."""

    num_tokens: Annotated[int, Ge(1)] = 20
    network: Literal["mlp", "lstm"] = "mlp"
    """Three linear layers, or a bidirectional LSTM with two."""
    hidden_width: Annotated[int, Ge(1)] | None = None
    """Of the network (None: the model's width)."""
    network_layers: Annotated[int, Ge(1)] = 2
    """Of the LSTM."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Inside the LSTM."""

    @property
    def num_virtual_tokens(self) -> int:
        return self.num_tokens

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            num_virtual_tokens=self.num_tokens,
            num_transformer_submodules=1,  # of an encoder-decoder PEFT would train as many more that nothing reads
            **sizes(model),
            encoder_reparameterization_type=self.network.upper(),
            encoder_hidden_size=self.hidden_width or model.config.hidden_size,
            encoder_num_layers=self.network_layers,
            encoder_dropout=self.dropout,
        )


EXAMPLE = PTuning(num_tokens=4, hidden_width=32)
