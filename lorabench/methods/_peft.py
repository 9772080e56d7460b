"""What the methods that PEFT implements share: attach, ΔW, save, load, merge.

Shapes: M out features, N in features, r rank.
"""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.methods._patterns import config_as_trained, make_exact
from lorabench.models import base_model as models
from lorabench.models import targets, weights
from lorabench.models.targets import Targets
from lorabench.spec.method import LoadBase, Method
from lorabench.updates.update import Update, restore_drawn, save_drawn, save_svds, save_updates

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from lorabench.spec.run_spec import RunSpec

ADAPTER = "default"


class PeftMethod(Method):
    """`peft_config` gives PEFT's own configuration; PEFT attaches, saves in its format, loads and merges."""

    holds_several: ClassVar[bool] = True

    @abstractmethod
    def peft_config(self, model: nn.Module, spec: RunSpec) -> PeftConfig:
        """PEFT's configuration for this model, but for the task type and the new head, which `attach` sets."""

    def attach(self, model: nn.Module, spec: RunSpec) -> nn.Module:
        import torch
        from peft import get_peft_model

        self.prepare(model)
        heads, drawn = models.new_heads(model), models.drawn_modules(model)
        try:
            config = self.peft_config(model, spec)
            config.task_type = models.task_type(model)
            if hasattr(config, "modules_to_save"):
                config.modules_to_save = [*heads, *drawn] or None
            self._check_drawn(config, drawn, spec)
            tuned = get_peft_model(model, config, autocast_adapter_dtype=False)
        except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
            if isinstance(error, NotImplementedError) and next(model.parameters()).is_meta:
                raise  # torch's: there are no weights to compute on
            raise InputError(f"{self.called}: PEFT refuses it for {show_path(spec.model)}: {error}") from error
        make_exact(config, tuner_layers(tuned), ADAPTER)
        _name_base(config, spec.model)
        for module in drawn if hasattr(config, "modules_to_save") else ():
            tuned.get_base_model().get_submodule(module).requires_grad_(False)  # it is saved, and not trained
        if not any(p.requires_grad for p in tuned.parameters()):
            raise InputError(f"{self.called}: trains nothing on {show_path(spec.model)}")
        dtype = getattr(torch, self.trained_dtype)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return tuned

    def _check_drawn(self, config: PeftConfig, drawn: list[str], spec: RunSpec) -> None:
        """InputError for a target whose own weights are random: PEFT saves a module's weights, or what it adds."""
        targeted = {str(name).removesuffix(".weight") for key in ("target_modules", "target_parameters")
                    for name in getattr(config, key, None) or ()}  # fmt: skip
        for name in drawn:
            if name in targeted:
                raise InputError(
                    f'model = "{show_path(spec.model)}": its files lack the weights of {name}, which {self.called} is '
                    "put on: ΔW would count from random numbers; leave it out by method.targets, or use another model"
                )

    def prepare(self, model: nn.Module) -> None:
        """Change the base into what PEFT can attach to."""
        weights.as_linear(model)

    @property
    def called(self) -> str:
        """How messages name it."""
        return f'method.name = "{self.name}"'

    @property
    def trained_dtype(self) -> str:
        return "float32"

    def updates(self, model: nn.Module, load_base: LoadBase) -> Iterator[Update]:
        if self.has_update:
            yield from self.layer_updates(model, load_base)
        yield from head_updates(model)

    def layer_updates(self, model: nn.Module, load_base: LoadBase) -> Iterator[Update]:
        """ΔW of each layer that the method is attached to."""
        return (self.layer_update(name, module) for name, module in tuner_layers(model))

    def layer_update(self, name: str, module: Any) -> Update:
        """ΔW of one layer; dense, from what the layer computes, unless the method knows better."""
        return Update(
            parameter=f"{name}.weight",
            B=probe(module),
            base_norm=weights.weight_norm(module.get_base_layer()),
            precision="float32",
        )

    def save(self, model: Any, load_base: LoadBase, folder: Path, keep: str) -> None:
        if keep == "updates":
            models.save_peft(model, folder)
            save_updates(self.updates(model, load_base), folder)
            base = model.get_base_model()
            if not hasattr(model.peft_config[ADAPTER], "modules_to_save"):
                save_drawn(getattr(base, "drawn", {}), folder)
        else:
            save_svds(self.updates(model, load_base), folder, int(keep.removeprefix("svd:")))

    def load(self, base: nn.Module, folder: Path, spec: RunSpec) -> nn.Module:
        from peft import PeftModel

        restore_drawn(base, folder)
        self.prepare(base)
        config = config_as_trained(folder)
        return PeftModel.from_pretrained(base, folder, config=config, autocast_adapter_dtype=False)

    def merge(self, model: Any) -> nn.Module | None:
        return merged(model) if self.has_update else None

    @property
    def keeps_base(self) -> bool:
        return not (self.changes_base or self.merges_as_it_goes)

    def unload(self, model: Any) -> nn.Module | None:
        """The base's layers out of the tuner's: PEFT's own `unload` refuses quantized bases with some tuners."""
        base = model.get_base_model()
        _unwrap_heads(model, tuned=False)
        for name, module in list(tuner_layers(base)):
            if ".base_layer" not in name:  # of several on one module, the outermost stands for all
                base.set_submodule(name, module.get_base_layer())
        is_left = any(type(module).__module__.startswith("peft.") for module in base.modules())
        return None if is_left else base

    def load_another(self, model: Any, folder: Path, name: str) -> None:
        model.load_adapter(folder, name, torch_device=str(model.device), autocast_adapter_dtype=False)

    def activate(self, model: Any, name: str) -> None:
        model.set_adapter(name)


@dataclass(frozen=True, kw_only=True)
class Tuner(PeftMethod):
    """A change of the weights of linear layers."""

    without: ClassVar[tuple[str, ...]] = ()
    """Quantizations on which PEFT's implementation fails."""

    targets: str = "all-linear"
    """`query`, `query-value`, `attention`, `mlp`, `key-value-down`, `all-linear`, `convolutions`, `all-layers` (the
    last two together), or a regular expression on names."""
    layers: str | None = None
    """Only these blocks, from 0: `"0-3,11"` (None: all)."""

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        if spec.quantization in self.without:
            yield f'quantization = "{spec.quantization}": PEFT cannot put method {self.name} on such weights'

    def match(self, model: nn.Module) -> list[str]:
        return targets.match(model, self.targets, self.layers)

    def reach(self, found: Targets) -> Targets:
        """What of the targets that were found the method can be put on."""
        return replace(found, stacked=[])

    def left_out(self, model: nn.Module) -> list[str]:
        if self.targets != "all-linear":
            return []
        return targets.unreached(model, self.reach(targets.find(model, self.targets)))


class SoftPrompt(PeftMethod):
    """Trained vectors in front of the input or of every layer's keys and values: no weight is changed."""

    prefix: ClassVar[bool] = False
    """Whether they are keys and values, which PEFT hands over as a cache."""

    @property
    def has_update(self) -> bool:
        return False

    @property
    def starts_at_base(self) -> bool:
        return False

    def problems(self, spec: RunSpec) -> Iterator[str]:
        yield from super().problems(spec)
        if self.prefix and spec.gradient_checkpointing:
            yield (
                f"gradient_checkpointing = true: method {self.name} hands its prefix over as a cache of keys and "
                "values, which checkpointing throws away"
            )
        if spec.padding == "free":
            yield (
                f'padding = "free": method {self.name} puts its vectors in front of a row, not of each example; '
                'use padding = "longest"'
            )

        if spec.task.unit == "images":
            yield (
                f'method.name = "{self.name}": puts trained vectors in front of tokens, and task {spec.task.name} '
                "reads images: a ViT or a denoiser takes no vectors beside them, nor keys and values; use lora, full …"
            )

    def prepare(self, model: nn.Module) -> None:
        refuse_decoder_classifier(self, model)


def sizes(model: Any) -> dict[str, Any]:
    """Width of what stands in front of the input, and heads, which PEFT asks for here without using them: it does not
    know all names that configurations have for these."""
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
    return {"token_dim": model.get_input_embeddings().weight.shape[1], "num_attention_heads": heads}


def refuse_decoder_classifier(method: Method, model: nn.Module) -> None:
    """InputError for a decoder with a classification head, which must find the last token that is no padding."""
    if models.reads_last_token(model):
        raise InputError(
            f'method.name = "{method.name}": {type(model).__name__} classifies by the last token that is no padding, '
            "and does not find it behind a soft prompt; use an encoder, or another method"
        )


def tuner_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Name in the untouched base and module of each layer that a PEFT tuner has replaced."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def head_updates(model: Any) -> Iterator[Update]:
    """ΔW of a task head that was trained in full beside the method's own parameters."""
    for name, module in tuned_heads(model):
        original = model.get_base_model().get_submodule(name).original_module
        yield from weights.weight_changes(module, original, f"{name}.")


def tuned_heads(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name in the untouched base of each task head that is trained in full, and what it has become."""
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    drawn = models.drawn_modules(base)
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and name not in drawn:
            yield name, module.modules_to_save[ADAPTER]


def _name_base(config: Any, model: str) -> None:
    """Call the base what the spec calls it: where this machine keeps it is nobody else's concern."""
    for key in ("base_model_name_or_path", "tokenizer_name_or_path"):
        if hasattr(config, key) and getattr(config, key) in (models.resolve(model), None):
            setattr(config, key, model)


def merged(model: Any) -> nn.Module:
    """The model with its tuner merged into the weights, in place."""
    _unwrap_heads(model, tuned=True)
    return model.merge_and_unload()


def _unwrap_heads(model: Any, *, tuned: bool) -> None:
    """Leave of each task head the tuned one or the base's: of most tuners, PEFT cannot unwrap one of several layers."""
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.modules_to_save[ADAPTER] if tuned else module.original_module)


def product_update(name: str, module: Any, B: Tensor, A: Tensor | None) -> Update:
    """ΔW of one layer from what `lorabench.linalg.products` gives, with the tuner's scale."""
    return Update(
        parameter=f"{name}.weight",
        B=(B * module.scaling[ADAPTER]).cpu(),
        A=None if A is None else A.cpu(),
        base_norm=weights.weight_norm(module.get_base_layer()),
        precision="float32" if A is None else None,
        scale_source=None if A is None else "config",
    )


def probe(module: Any) -> Tensor:
    """ΔW (M, N) of a linear layer, by its definition: what the layer adds to the base layer's output, for each input.

    Right for every method that is linear in the layer's input, whatever its form; in float32 on the dequantized
    weights, so with a noise floor of about 1e-7 of the base's, also where the model computes in fewer bits.
    """
    return change(exact(module), exact(module.get_base_layer()))


def change(tuned: Any, base: Any) -> Tensor:
    """(M, N): what one linear layer computes beyond another, bias apart; both as `exact` makes them."""
    import torch

    inputs = torch.eye(base.in_features, device=next(base.parameters()).device)
    with torch.no_grad():
        return (tuned(inputs) - tuned(0 * inputs[:1]) - (base(inputs) - base(0 * inputs[:1]))).T.contiguous().cpu()


def bias_update(name: str, tuned: Any, base: Any) -> Iterator[Update]:
    """What a layer that is given no input computes beyond the other: the change of its bias, if there is any."""
    import torch

    with torch.no_grad():
        zero = torch.zeros(1, base.in_features, device=next(base.parameters()).device)
        found = (tuned(zero) - base(zero)).T.contiguous().cpu()
    if base.bias is not None and found.any():
        yield Update(parameter=f"{name}.bias", B=found, base_norm=float(base.bias.norm()), precision="float32")


def exact(module: Any) -> Any:
    """A copy of a layer in float32 and evaluation mode, with a dense base layer: dequantized, and no Conv1D."""
    if not hasattr(module, "get_base_layer"):
        return weights.dense_linear(module)
    copied = copy.deepcopy(module)
    copied.base_layer = weights.dense_linear(module.get_base_layer())
    for part in copied.modules():
        if hasattr(part, "fan_in_fan_out"):
            part.fan_in_fan_out = False
    return copied.float().eval()


def is_linear(module: Any) -> bool:
    """Whether a layer's output is linear in its input: tried on a few random ones."""
    import torch

    base = module.get_base_layer()
    x, y = torch.randn(2, 4, base.in_features, generator=torch.Generator().manual_seed(0)).to(base.weight.device)
    with torch.no_grad():
        at = [module(inputs) for inputs in (x, y, x + y, 0 * x)]
    return torch.allclose(at[0] + at[1], at[2] + at[3], rtol=0, atol=1e-3 * float(at[2].abs().max()))


def write_norms(updates: list[Update], folder: Path) -> None:
    """‖W0‖ of each layer, beside an adapter that is read in PEFT's format."""
    norms = {update.parameter: update.base_norm for update in updates}
    (folder / "base_norms.json").write_text(json.dumps(norms, indent=1))
