"""Any adapter that is factored, written as PEFT's LoRA: where the mapping is exact, and not otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.updates.formats import Adapter
from lorabench.updates.layer import LayerSVD
from lorabench.updates.locate import weights_path
from lorabench.updates.modules import Modules, models_in, of_other_models, refusal
from lorabench.updates.old_experts import is_single_expert, of_one_rank
from lorabench.updates.peftfile import (
    Target,
    beside,
    check_whole,
    configuration,
    save_adapter,
    whole_folder,
)
from lorabench.updates.readers._entry import Entry
from lorabench.updates.readers.peft_lora import CONFIG_FILE
from lorabench.updates.stacked import expert_of, parameter_of, stacked, wrapper_of
from lorabench.updates.update import DORA_PART, Update
from lorabench.updates.weightfile import WeightFiles


def convert(adapter: Adapter, folder: Path, base_model: str | None = None) -> list[str]:
    """Write `adapter` in PEFT's format into `folder`, new or empty, so that PEFT computes the same ΔW; returns notes
    beside the adapter's own.

    `base_model` (a folder, a file, a Hub id, `builtin:NAME`) is named in the configuration, and its weights say how
    the modules are really called and what they are. Without it, adapters of several models in one file (diffusers)
    are written into a sub-folder each. InputError, and nothing written, where ΔW is not exactly a product of two
    factors, or it is not known which module it belongs to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"OUTPUT = {show_path(folder)}: is not empty; nothing is overwritten")
    check_whole(adapter)
    base = None if base_model is None else WeightFiles(weights_path(base_model))
    models = models_in(adapter, base)
    name = base_model or adapter.config.get("base_model_name_or_path")
    found = {modules.model: of_one_rank(_targets(modules)) for modules in models}
    extra = beside(adapter, models[0].named)
    if name is not None:
        extra.config["base_model_name_or_path"] = name
    with whole_folder(folder) as temporary:
        for model, (targets, rank) in found.items():
            inner = temporary / model if len(found) > 1 else temporary
            inner.mkdir(exist_ok=True)
            save_adapter(inner, targets, extra, configuration(targets, extra, rank))
    several = [f"one folder a model: {', '.join(found)}"] if len(found) > 1 else []
    return [*several, *of_other_models(adapter, models), *_notes(adapter, base, name)]


def _targets(modules: Modules) -> list[Target]:
    """What is to be written of one model. InputError with all that stands in the way."""
    problems: list[str] = []
    targets: dict[str, Target] = {}
    stacks: dict[str, dict[str, Entry]] = {}
    adapter = modules.adapter
    for parameter, entry in modules.entries.items():
        if parameter in modules.whole or _part(parameter) in modules.entries:
            continue
        try:
            if wrapper := wrapper_of(adapter.config, entry):
                stacks.setdefault(wrapper, {})[parameter] = entry
                continue
            target = _target(parameter, entry, modules)
            if target.module in targets:
                raise InputError(f"{parameter}: belongs to {target.module}, as another does")
            targets[target.module] = target
        except InputError as error:
            problems += error.problems
    if problems:
        raise refusal(problems, f"{adapter.source}: cannot be written as PEFT exactly")
    _check_dora(adapter, [*targets.values()], stacks)
    return [*targets.values(), *(_stack(adapter, wrapper, parts) for wrapper, parts in stacks.items())]


def _target(parameter: str, entry: Entry, modules: Modules) -> Target:
    """InputError where PEFT would compute another ΔW, or of another module."""
    update = _factored(entry.load(), parameter)
    if getattr(entry, "groups", 1) > 1:
        raise InputError(f"{parameter}: of a grouped convolution, whose B is a part of this one")
    if update.part and getattr(entry, "magnitude", None) is None:
        raise InputError(f"{parameter}: its DoRA is not PEFT's, which has a norm of W0 + s B A an output")
    assert update.A is not None  # `_factored` has seen to it
    module = modules.module(parameter)
    return Target(
        module=module,
        B=update.B,
        A=update.A,
        rank=len(update.A),
        kernel=modules.kernel(parameter),
        embedding=modules.embeds(parameter, module),
        magnitude=_magnitude(entry),
    )


def _magnitude(entry: Entry) -> Tensor | None:
    """DoRA's m."""
    name = getattr(entry, "magnitude", None)
    if name is None:
        return None
    layer: Any = entry
    m: Tensor = layer.tensors.read(name)
    if rows := getattr(layer, "rows", None):
        m = m.flatten()[rows.start : rows.stop]
    if m.numel() != layer.shape[0]:
        raise InputError(f"{layer.tensors.file}: {name}: shape {tuple(m.shape)}, and ΔW has {layer.shape[0]} rows")
    return m


def _part(parameter: str) -> str:
    """What DoRA's s B A is called beside ΔW."""
    return f"{parameter.removesuffix('.weight')}[{DORA_PART}].weight"


def _check_dora(adapter: Adapter, targets: list[Target], stacks: Collection[str]) -> None:
    """InputError where PEFT, which has DoRA everywhere or nowhere, cannot have it."""
    without = [target.module for target in targets if target.magnitude is None or is_single_expert(target.module)]
    if len(without) < len(targets) and (without or stacks):
        module = next(iter([*without, *stacks]))
        raise InputError(f"{adapter.source}: {module}: cannot be written as PEFT exactly: others are DoRA, and here "
                         "PEFT has none")  # fmt: skip


def _stack(adapter: Adapter, wrapper: str, parts: dict[str, Entry]) -> Target:
    """ΔW of all experts of one parameter."""
    updates = [_factored(parts[name].load(), name) for name in sorted(parts, key=expert_of)]
    factors = [(update.B, update.A) for update in updates if update.A is not None]
    return stacked(wrapper, parameter_of(adapter.config, next(iter(parts))), factors)


def _factored(update: Update | LayerSVD, parameter: str) -> Update:
    if isinstance(update, LayerSVD):
        raise InputError(f"{parameter}: only singular values and vectors of ΔW were kept (svd:K)")
    if update.A is None:
        raise InputError(f"{parameter}: ΔW is dense: two factors would not be exact")
    if not parameter.endswith(".weight"):
        raise InputError(f"{parameter}: is not the weight of a module")
    return update


def _notes(adapter: Adapter, base: WeightFiles | None, name: str | None) -> Iterator[str]:
    if adapter.scale_source == "assumed":
        yield "the scale is assumed, and now stands in the file"
    if base is None:
        yield "names of modules are as in the source, not held against a base (--base)"
        if adapter.format in ("peft LOHA", "peft LOKR"):
            yield "a convolution that the file has flattened is written as a linear layer: only --base can tell"
    if name is None:
        yield f"{CONFIG_FILE} names no base model (--base)"
