"""The bridge to any other PEFT tuner: its type and its configuration's own fields, checked by PEFT.

ΔW is what the tuned layer computes beyond the untouched base's, whatever the tuner; soft prompts have none.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorabench.config import plugins
from lorabench.config.decode import show
from lorabench.methods._peft import (
    Tuner,
    bias_update,
    change,
    exact,
    is_linear,
    merged,
    refuse_decoder_classifier,
    tuner_layers,
)
from lorabench.models import base_model as models
from lorabench.models import weights
from lorabench.spec.method import LoadBase
from lorabench.updates.update import Update

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from lorabench.spec.run_spec import RunSpec

OWN = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type",
       "inference_mode", "target_modules", "modules_to_save")  # fmt: skip
"""Fields that lorabench or PEFT itself sets."""
UNFIT = {
    "ADAPTION_PROMPT": "it takes the place of whole attention modules, not of linear layers",
    "LN_TUNING": 'use method.name = "layernorm"',
    "MULTITASK_PROMPT_TUNING": "it needs to be told each example's task",
    "POLY": "it needs to be told each example's task",
    "SHADOW": "it wraps whole decoder blocks, not linear layers",
    "TRAINABLE_TOKENS": "it needs token indices, and changes embeddings alone",
    "XLORA": "it mixes adapters that are trained already",
}
"""What cannot be trained as the others are, and why."""
ON_QUANTIZED = ("LORA", "ADALORA", "IA3", "OFT", "VERA", "FOURIERFT", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
"""Those that are known to compute what they should on 4-bit and 8-bit weights."""

TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
}


@dataclass(frozen=True, kw_only=True)
class Peft(Tuner):
    """`method.type = "FOURIERFT"`, `method.config.n_frequency = [100, 1000]`. A list in a list is one value."""

    type: str = "FOURIERFT"
    """A value of PEFT's PeftType: `BOFT`, `HRA`, `FOURIERFT`, `RANDLORA`, `C3A`, `MISS`, `ROAD`, `CPT` …"""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of PEFT's configuration class of that type; its own defaults stand for the rest."""

    @property
    def called(self) -> str:
        return f"method.type = {show(self.type)}"

    @property
    def keeps_base(self) -> bool:
        return False  # some tuners begin by changing its weights, or train its biases

    @property
    def is_prompt(self) -> bool:
        from peft.config import PromptLearningConfig

        return issubclass(self._class(), PromptLearningConfig)

    @property
    def has_update(self) -> bool:
        return not self.is_prompt

    @property
    def starts_at_base(self) -> bool:
        return False  # that depends on the tuner, and on its initialization

    @property
    def num_virtual_tokens(self) -> int:
        return int(self.config.get("num_virtual_tokens", 0)) if self.is_prompt else 0

    def problems(self, spec: RunSpec) -> Iterator[str]:
        """What PEFT's configuration class says; it is not tried on the model before the plan."""
        yield from super().problems(spec)
        known = _classes()
        if self.type not in known:
            yield f"method.type = {show(self.type)}: {plugins.unknown('PEFT type', self.type, sorted(known))}"
            return
        if self.type in UNFIT:
            yield f"method.type = {show(self.type)}: cannot be used here: {UNFIT[self.type]}"
        if spec.quantization != "none" and self.type not in ON_QUANTIZED:
            key = f'quantization = "{spec.quantization}"'
            yield f"{key}: not known to work with method.type = {show(self.type)}. Choices: {', '.join(ON_QUANTIZED)}"
        names = [f.name for f in dataclasses.fields(self._class()) if f.init and f.name not in OWN]
        unknown = [key for key in self.config if key not in names]
        yield from (f"method.config.{key}: {plugins.unknown('field', key, names)}" for key in unknown)
        if not unknown:
            try:
                self._class()(task_type=TASK_TYPES.get(spec.task.auto_class), **self.config)
            except (ValueError, TypeError) as error:
                yield f"method.config = {show(self.config)}: {self._class().__name__} refuses it: {error}"

    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        names = {f.name for f in dataclasses.fields(self._class())}
        chosen: dict[str, Any] = {"task_type": models.task_type(model)}
        if "target_modules" in names:
            chosen["target_modules"] = self.match(model)
        return self._class()(**chosen, **self.config)

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        if self.is_prompt:
            refuse_decoder_classifier(self, model)

    def layer_updates(self, model: nn.Module, load_base: LoadBase) -> Iterator[Update]:
        """Against the untouched base: some tuners change the base's weights when they are attached."""
        base: Any = None
        for name, module in tuner_layers(model):
            if not weights.is_linear_layer(module.get_base_layer()) or not is_linear(tuned := exact(module)):
                print(f"{name}: {self.type} is not linear in the layer's input: there is no ΔW")
                continue
            if base is None:
                base = load_base()
            original = exact(base.get_submodule(name))
            yield Update(
                parameter=f"{name}.weight",
                B=change(tuned, original),
                base_norm=weights.weight_norm(original),
                precision="float32",
            )
            yield from bias_update(name, tuned, original)

    def merge(self, model: Any) -> nn.Module | None:
        if not self.has_update or not any(hasattr(module, "merge") for _, module in tuner_layers(model)):
            return None
        return merged(model)

    def _class(self) -> Any:
        return _classes()[self.type]


def _classes() -> dict[str, Any]:
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a kernel it can do without
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


EXAMPLE = Peft(type="HRA", config={"r": 2})
