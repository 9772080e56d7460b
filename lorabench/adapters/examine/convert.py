"""Any adapter that is factored, written as PEFT's LoRA: where the mapping is exact, and not otherwise."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabench.config.decode import InputError
from lorabench.updates.formats import Adapter
from lorabench.updates.layer import LayerSVD
from lorabench.updates.locate import weights_path
from lorabench.updates.peftfile import (
    Target,
    beside,
    check_whole,
    configuration,
    models_of,
    padded,
    save_adapter,
    whole_folder,
    whole_names,
)
from lorabench.updates.readers._entry import Entry
from lorabench.updates.readers._factors import Layer
from lorabench.updates.readers._names import PREFIX
from lorabench.updates.readers._peft_config import original_layers, original_name
from lorabench.updates.readers.peft_lora import CONFIG_FILE
from lorabench.updates.update import DORA_PART, Update
from lorabench.updates.weightfile import WeightFiles, flat_name, is_embedding, llama_cpp_name

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>w[123]|(?:gate|up|down)_proj)")
"""An expert of the models that had one module each, before transformers 5 stacked them."""
_OF_MODULE = re.compile(r"(?P<module>.+)(?P<leaf>\.(?:lora_B\.bias|token_adapter\..+))")
_PAIRS = {"w1": "w3", "w3": "w1", "gate_proj": "up_proj", "up_proj": "gate_proj"}
"""What PEFT makes one matrix of."""


def convert(adapter: Adapter, folder: Path, base_model: str | None = None) -> list[str]:
    """Write `adapter` in PEFT's format into `folder`, new or empty, so that PEFT computes the same ΔW; returns notes
    beside the adapter's own.

    `base_model` (a folder, a file, a Hub id, `builtin:NAME`) is named in the configuration, and its weights say how
    the modules are really called and what they are. Without it, adapters of several models in one file (diffusers)
    are written into a sub-folder each. InputError, and nothing written, where ΔW is not exactly a product of two
    factors, or it is not known which module it belongs to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"OUTPUT = {folder}: is not empty; nothing is overwritten")
    check_whole(adapter)
    base = None if base_model is None else WeightFiles(weights_path(base_model))
    models = models_of(adapter)
    if base is not None and len(models) > 1:
        raise InputError(
            f"{adapter.source}: holds adapters of several models ({', '.join(models)}): without --base, each is "
            "written into a folder of its own"
        )
    name = base_model or adapter.config.get("base_model_name_or_path")
    found = {model: _of_experts(_targets(adapter, prefix, base)) for model, prefix in models.items()}
    extra = beside(adapter, partial(_in_base, base=base, layers=_layers(adapter)))
    if name is not None:
        extra.config["base_model_name_or_path"] = name
    with whole_folder(folder) as temporary:
        for model, (targets, rank) in found.items():
            inner = temporary / model if len(found) > 1 else temporary
            inner.mkdir(exist_ok=True)
            save_adapter(inner, targets, extra, configuration(targets, extra, rank))
    several = [f"one folder a model: {', '.join(found)}"] if len(found) > 1 else []
    return [*several, *_notes(adapter, base, name)]


def _of_experts(targets: list[Target]) -> tuple[list[Target], int | None]:
    """Modules of single experts as PEFT stacks them when it loads, and the rank that `r` must then be.

    It puts w1 and w3 (gate_proj, up_proj) together at twice `r`, whatever patterns say, and all experts of a block in
    one tensor: all have the same rank, what is lacking in it is zero.
    """
    experts = {target.module: match for target in targets if (match := _EXPERT.fullmatch(target.module))}
    if not experts:
        return targets, None
    by_name = {target.module: target for target in targets}
    blocks: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for match in experts.values():
        blocks[match["stack"], match["leaf"]].add(int(match["index"]))
    missing = [
        f"{stack}.{index}.{leaf}"
        for (stack, leaf), there in blocks.items()
        for index in range(1 + max(max(blocks[stack, other]) for other in _leaves(blocks, stack)))
        if index not in there
    ]
    missing += [f"{stack}.0.{_PAIRS[leaf]}" for stack, leaf in blocks if leaf in _PAIRS
                and (stack, _PAIRS[leaf]) not in blocks]  # fmt: skip
    if missing:
        raise InputError(f"{missing[0]}: has no ΔW, and PEFT stacks either all experts of a block or none")
    rank = max(by_name[module].rank for module in experts)
    stacks = {match["stack"].removesuffix(".experts") for match in experts.values()}
    routers = {f"{stack}.gate" for stack in stacks} & by_name.keys()
    alike = experts.keys() | routers
    return [padded(target, rank) if target.module in alike else target for target in targets], rank


def _leaves(blocks: dict[tuple[str, str], set[int]], stack: str) -> list[str]:
    return [leaf for other, leaf in blocks if other == stack]


def _targets(adapter: Adapter, prefix: str, base: WeightFiles | None) -> list[Target]:
    """What is to be written of the names with a prefix. InputError with all that stands in the way."""
    problems: list[str] = []
    targets: dict[str, Target] = {}
    whole, layers = _whole(adapter, base), _layers(adapter)
    stacked: dict[str, list[Layer]] = {}
    entries = adapter.entries | adapter.vectors
    for parameter, entry in entries.items():
        if not parameter.startswith(prefix) or parameter in whole or _part(parameter) in entries:
            continue
        try:
            if wrapper := _wrapper(adapter, entry):
                stacked.setdefault(wrapper, []).append(entry)  # type: ignore[arg-type]  # `_wrapper` has seen to it
                continue
            update = _factored(entry.load(), parameter)
            if getattr(entry, "groups", 1) > 1:
                raise InputError(f"{parameter}: of a grouped convolution, whose B is a part of this one")
            if update.part and getattr(entry, "magnitude", None) is None:
                raise InputError(f"{parameter}: its DoRA is not PEFT's, which has a norm of W0 + s B A an output")
            module = _module(_of_whole(parameter).removeprefix(prefix), base, layers)
            target = replace(_target(update, module, base, layers), magnitude=_magnitude(entry))
            if target.module in targets:
                raise InputError(f"{parameter}: belongs to {target.module}, as another does")
            targets[target.module] = target
        except InputError as error:
            problems += error.problems
    if problems:
        shown = problems[:4] + ([f"and so {len(problems) - 4} more"] if len(problems) > 4 else [])
        raise InputError([f"{adapter.source}: cannot be written as PEFT exactly: {problem}" for problem in shown])
    _check_dora(adapter, [*targets.values()], stacked)
    return [*targets.values(), *(_stack(adapter, wrapper, parts) for wrapper, parts in stacked.items())]


def _magnitude(entry: Entry) -> Tensor | None:
    """DoRA's m."""
    name = getattr(entry, "magnitude", None)
    if name is None:
        return None
    layer: Any = entry
    m: Tensor = layer.tensors.read(name)
    if m.numel() != layer.shape[0]:
        raise InputError(f"{layer.tensors.file}: {name}: shape {tuple(m.shape)}, and ΔW has {layer.shape[0]} rows")
    return m


def _part(parameter: str) -> str:
    """What DoRA's s B A is called beside ΔW."""
    return f"{parameter.removesuffix('.weight')}[{DORA_PART}].weight"


def _of_whole(parameter: str) -> str:
    return parameter.replace(f"[{DORA_PART}]", "")


def _check_dora(adapter: Adapter, targets: list[Target], stacked: Collection[str]) -> None:
    """InputError where PEFT, which has DoRA everywhere or nowhere, cannot have it."""
    without = [target.module for target in targets if target.magnitude is None or _EXPERT.fullmatch(target.module)]
    if len(without) < len(targets) and (without or stacked):
        module = next(iter([*without, *stacked]))
        raise InputError(f"{adapter.source}: {module}: cannot be written as PEFT exactly: others are DoRA, and here "
                         "PEFT has none")  # fmt: skip


def _layers(adapter: Adapter) -> list[int]:
    return original_layers(adapter.config, adapter.source)


def _whole(adapter: Adapter, base: WeightFiles | None) -> set[str]:
    """Names of what was saved whole, in the source and in the base."""
    names, layers = whole_names(adapter), _layers(adapter)
    found = (None if base is None else base.find(original_name(name, layers)) for name in names)
    return names | {name for name in found if name}


def _wrapper(adapter: Adapter, entry: Entry) -> str | None:
    """PEFT's name of the LoRA that a ΔW is a part of, where the target is a parameter (`target_parameters`)."""
    if adapter.config.get("target_parameters") and isinstance(entry, Layer):
        return entry.names["A"].removeprefix(PREFIX).removesuffix(".lora_A.weight")
    return None


def _stack(adapter: Adapter, wrapper: str, parts: list[Layer]) -> Target:
    """ΔW of all experts of one parameter, in PEFT's order: A expert by expert, B with the expert last."""
    updates = {_expert(part.parameter): _factored(part.load(), part.parameter) for part in parts}
    ordered = [updates[index] for index in sorted(updates)]
    A = torch.cat([update.A for update in ordered if update.A is not None])
    B = torch.stack([update.B for update in ordered], 2).flatten(1)
    name = re.sub(r"\[\d+\]\.weight$", "", parts[0].parameter)
    targets = adapter.config["target_parameters"]
    if not any(f".{name}".endswith(f".{target}") for target in targets):
        name = name.removesuffix(".weight")
    return Target(module=wrapper, B=B, A=A, rank=ordered[0].B.shape[1], parameter=name)


def _expert(parameter: str) -> int:
    match = re.search(r"\[(\d+)\]\.weight$", parameter)
    return int(match[1]) if match else 0


def _factored(update: Update | LayerSVD, parameter: str) -> Update:
    if isinstance(update, LayerSVD):
        raise InputError(f"{parameter}: only singular values and vectors of ΔW were kept (svd:K)")
    if update.A is None:
        raise InputError(f"{parameter}: ΔW is dense: two factors would not be exact")
    if not parameter.endswith(".weight"):
        raise InputError(f"{parameter}: is not the weight of a module")
    return update


def _module(parameter: str, base: WeightFiles | None, layers: list[int]) -> str:
    """The module's name in the model. InputError where it is not certain."""
    layer = parameter.removesuffix(".weight")
    if re.search(r"\[\d+\]$", layer):
        raise InputError(
            f"{parameter}: is one of stacked experts, and which LoRA of theirs PEFT would load is not known"
        )
    if "[" in layer:
        raise InputError(f"{parameter}: is some rows of a fused layer, and no module of its own")
    if llama_cpp_name(parameter):
        raise InputError(f"{parameter}: is llama.cpp's name, and not known to have the rows of a module of the model")
    if base is None:
        if flat_name(parameter):
            raise InputError(f"{parameter}: `_` may stand for `.`: which module it is, only --base can tell")
        return layer
    if base.find(original_name(parameter, layers)) is None:
        raise InputError(f"{parameter}: the base {base.path} has no such weight, or several")
    return _in_base(parameter, base, layers).removesuffix(".weight")


def _in_base(parameter: str, base: WeightFiles | None, layers: list[int]) -> str:
    """The base's name of a parameter, of replicated blocks by their own numbers; as it is where the base has none."""
    if match := _OF_MODULE.fullmatch(parameter):
        return _in_base(f"{match['module']}.weight", base, layers).removesuffix(".weight") + match["leaf"]
    original = original_name(parameter, layers)
    found = base.find(original) if base is not None else None
    if found is None or original == parameter:
        return found or parameter
    if found.endswith(original):
        return found.removesuffix(original) + parameter
    return parameter.removeprefix(original.removesuffix(found))


def _target(update: Update, module: str, base: WeightFiles | None, layers: list[int]) -> Target:
    assert update.A is not None
    kernel = update.kernel
    if base is not None:
        stored = original_name(f"{module}.weight", layers)
        shape = base.shape(stored)
        if shape != update.shape:
            raise InputError(f"{update.parameter}: ΔW {update.shape}, and the base's weight is {shape}")
        kernel = base.stored_shape(stored)[2:]
    embedding = is_embedding(f"{module}.weight")
    return Target(module=module, B=update.B, A=update.A, rank=len(update.A), kernel=kernel, embedding=embedding)


def _notes(adapter: Adapter, base: WeightFiles | None, name: str | None) -> Iterator[str]:
    if adapter.scale_source == "assumed":
        yield "the scale is assumed, and now stands in the file"
    if base is None:
        yield "names of modules are as in the source, not held against a base (--base)"
    if name is None:
        yield f"{CONFIG_FILE} names no base model (--base)"
