"""A small random model of the same architecture, on which is tried what a run would find out too late.

Whether a language model sees the tokens that it predicts, and whether what a method has learned can be saved and read.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorabench.config.decode import InputError, encode
from lorabench.config.quote import clip, show_path
from lorabench.models import base_model as models
from lorabench.models.denoisers import TIMESTEP, is_denoiser, some_conditions, some_input
from lorabench.models.flat import attend_by_example
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.task import LanguageModeling
from lorabench.training.examples import collate, end_to_end
from lorabench.training.passes import forward
from lorabench.updates.formats import read_updates

_WIDTH = re.compile(r"(?!.*(vocab|kernel|patch|window|chunk|block|image|state|type|group|time))"
                    r"(.*_(size|dim|rank)|dim|d_(model|ff|kv|inner|embed|head)|n_(embd|inner)|\w*ffn_dim)")  # fmt: skip
"""The fields of a configuration that are widths: in one proportion, any of them may be smaller."""
_AT_MOST = {"vocab_size": 1000, r"\w+_token_id": 999, "num_experts|num_local_experts|n_routed_experts": 16}
"""What else is made smaller. Of fewer experts a token could be given more than there are."""
NARROWEST = 2
"""What no width is made smaller than."""
LARGEST = 100e6
"""Parameters of the largest model that is tried."""
FEW_SIZES = 2
"""Of models, which are tried first."""
NO_MODEL = "no small model can be made of its configuration"
LENGTH, CHANGED = 12, 8
SEEN = 1e-5
"""Share of what a changed token changes at its own place: as much before it is no rounding. (Causal models: below 1e-6;
a BERT of random weights: 1e-3.)"""


FLAT = 1e-4
"""What else an example may change of another's logits, as a share of their spread. (Where they are apart: below 1e-5;
a Mamba of random weights: 1.)"""


class NotComputed(InputError):
    """A model has no output with what a method has put on it."""


def try_out(spec: RunSpec, options: dict[str, Any]) -> str:
    """What of it could not be tried, and why; empty where all was.

    InputError where the run's model does not fit its task, or what its method learns could not be saved.
    """
    keys = ("model", "revision", "padding", "tasks" if spec.tasks else "task")
    table = {key: encode(getattr(spec, key)) for key in keys}
    own = {"method": encode(spec.method)}
    found = _try_out(json.dumps(table | {"method": _smallest(own["method"])}), json.dumps(options), FEW_SIZES)
    if found:  # what does not fit a narrow model so may do it in its own amounts, or fit a wider one
        found = _try_out(json.dumps(table | own | {"quantization": spec.quantization}), json.dumps(options))
    if isinstance(found, InputError):
        raise found
    return found


def _smallest(method: dict[str, Any]) -> dict[str, Any]:
    """The method at its default amounts, and of rank 1: PiSSA and OLoRA take no rank above what is left of a width."""
    kept = {key: value for key, value in method.items() if key == "name" or not _is_amount(value)}
    if isinstance(method.get("rank"), int):
        kept["rank"] = 1
    if isinstance(method.get("rank_pattern"), dict):
        kept["rank_pattern"] = dict.fromkeys(method["rank_pattern"], 1)
    return kept


def _is_amount(value: Any) -> bool:
    """Whether a hyperparameter only says how much: ranks and rates change nothing of what can be saved."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@cache
def _try_out(key: str, options: str, sizes: int | None = None) -> InputError | str:
    """What is wrong; else why it could not be tried on so many sizes of model, if it could not."""
    try:
        spec = RunSpec.from_json(json.loads(key))
    except InputError as error:  # a method that needs a quantized base, or an amount that is no default
        return error.problems[0]
    with torch.random.fork_rng(devices=[]):
        try:
            return _try_sizes(spec, itertools.islice(_models(spec, from_json(options)), sizes))
        except InputError as error:
            return error


def _try_sizes(spec: RunSpec, bases: Iterable[nn.Module]) -> str:
    """On the first of the models that the method can be attached to."""
    reason, refused = "", None
    for base in bases:
        if not reason and not refused:
            check_causal(spec, base)
            check_flat(spec, base)
        try:
            reason = check_saving(spec, base)
        except NotComputed as error:  # a wider one may be
            refused = error
            continue
        if not reason:
            return ""
    if refused:
        raise refused
    if reason:
        return f"whether what {spec.method.name} learns can be saved was not tried: no small model takes it: {reason}"
    return "neither whether it sees what it predicts nor whether what it learns can be saved was tried: " + NO_MODEL


def from_json(text: str) -> dict[str, Any]:
    """A model's options: the keys of `id2label` are numbers, which JSON has as text."""
    options = json.loads(text)
    if "id2label" in options:
        options["id2label"] = {int(number): name for number, name in options["id2label"].items()}
    return dict(options)


def small(spec: RunSpec, options: dict[str, Any]) -> nn.Module | None:
    """A narrow model of random weights that the run's configuration describes; None where it cannot be made so.

    It has all of its blocks, and its vocabulary.
    """
    return copy.deepcopy(next(_models(spec, options), None))


def _models(spec: RunSpec, options: dict[str, Any]) -> Iterator[nn.Module]:
    """Such models, the narrowest first, which nobody may change."""
    key = (spec.model, spec.revision, spec.task.auto_class, spec.task.sequences, json.dumps(options, sort_keys=True))
    if key not in _KEPT:
        config = models.read_config(spec, options)
        whole = models.from_config(spec, config, torch.device("meta")).state_dict().keys()
        _KEPT.clear()
        _KEPT[key] = _Kept(_made(spec, config, _divisors(config), whole))
    return iter(_KEPT[key])


class _Kept:
    """What is made when it is first asked for."""

    def __init__(self, made: Iterator[nn.Module]):
        self._made, self._kept = made, list[nn.Module]()

    def __iter__(self) -> Iterator[nn.Module]:
        for place in itertools.count():
            if place == len(self._kept):
                self._kept.extend(itertools.islice(self._made, 1))
            if place == len(self._kept):
                return
            yield self._kept[place]


_KEPT: dict[tuple[Any, ...], _Kept] = {}
"""The models that were made of the last base: each method of a sweep is tried on the same."""


def _made(spec: RunSpec, config: Any, divisors: list[int], whole: Collection[str]) -> Iterator[nn.Module]:
    for divisor in divisors:
        narrow = config if models.denoises(spec) else type(config).from_dict(_narrowed(config.to_dict(), divisor))
        try:
            meta = models.from_config(spec, narrow, torch.device("meta"))
            if sum(p.numel() for p in meta.parameters()) > LARGEST or meta.state_dict().keys() != whole:
                continue
            torch.manual_seed(0)
            base = models.from_config(spec, narrow, torch.device("cpu")).float().eval()  # as a method's own weights
            _logits(spec, base, _tokens(base))
        except Exception:  # widths that do not go together: another proportion may
            continue
        yield base


def _divisors(config: Any) -> list[int]:
    """By how much its widths may all be divided, most first; 1 is last, and alone where no field is a width by itself
    (a ConvNeXt has lists)."""
    if isinstance(config, dict):  # a denoiser's, whose widths are lists
        return [1]
    table = config.to_dict()
    widths = [value for key, value in table.items() if _is_width(key, value)]
    heads, hidden = table.get("num_attention_heads"), table.get("hidden_size")
    if table.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and hidden % heads == 0:
        widths.append(hidden // heads)
    if not widths:
        return [1]
    common = math.gcd(*widths)
    fit = [n for n in (2**k for k in range(10, 0, -1)) if common % n == 0 and min(widths) // n >= NARROWEST]
    return [*fit, 1]


def _narrowed(table: dict[str, Any], divisor: int) -> dict[str, Any]:
    found = {key: value // divisor if _is_width(key, value) else value for key, value in table.items()}
    for key, value in found.items():
        most = next((most for pattern, most in _AT_MOST.items() if re.fullmatch(pattern, key)), None)
        if most is not None and isinstance(value, int):
            found[key] = min(value, most)
    return found


def _is_width(key: str, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= NARROWEST and bool(_WIDTH.fullmatch(key))


def _tokens(model: nn.Module) -> torch.Tensor:
    """(1, LENGTH), or an image (1, channels, height, width) of the size that the model is made for."""
    if is_denoiser(model):
        return torch.randn(1, *some_input(model), generator=torch.Generator().manual_seed(0))
    if models.reads_images(model):
        config: Any = model.config
        sides = [config.image_size] * 2 if isinstance(config.image_size, int) else [*config.image_size]
        return torch.randn(1, config.num_channels, *sides, generator=torch.Generator().manual_seed(0))
    rows = min(model.get_input_embeddings().weight.shape[0], 500)
    tokens = torch.randint(3, rows, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int) and end < rows:
        tokens[0, -1] = end  # a T5 classifies by it
    return tokens


def _logits(spec: RunSpec, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        batch = dict.fromkeys(spec.task.sequences, tokens)
        if is_denoiser(model):
            batch |= {TIMESTEP: torch.zeros(1)} | some_conditions(model, 1, tokens.device)
        return forward(model, batch).float()


def check_causal(spec: RunSpec, base: nn.Module) -> None:
    """InputError where a language model sees the tokens that it is to predict."""
    if not isinstance(spec.task, LanguageModeling) or "labels" in spec.task.sequences:  # a decoder of its own is causal
        return
    tokens = _tokens(base)
    changed = tokens.clone()
    changed[0, CHANGED] = 3 if tokens[0, CHANGED] != 3 else 4
    moved = (_logits(spec, base, changed) - _logits(spec, base, tokens)).abs()[0]
    if moved[:CHANGED].max() > SEEN * moved[CHANGED].max():
        raise InputError(
            f'model = "{show_path(spec.model)}": {type(base).__name__} is no causal language model: what it says of a '
            f'token depends on later ones, so that task.name = "{spec.task.name}" would give it the answers. Use a '
            'causal model, or task.name = "classification"'
        )


def check_flat(spec: RunSpec, base: nn.Module) -> None:
    """InputError where padding is free and a model does not say of examples laid end to end what it says of each."""
    if spec.padding != "free":
        return
    model, tokens = copy.deepcopy(base), _tokens(base)
    attend_by_example(model)
    examples = [tokens[:, :CHANGED], tokens[:, CHANGED:]]
    wanted = torch.cat([_logits(spec, model, each) for each in examples], 1)
    row = collate([{"input_ids": each[0], "labels": each[0]} for each in examples], 0, torch.device("cpu"))
    try:
        with torch.no_grad():
            moved = (forward(model, end_to_end(row)).float() - wanted).abs().max() / wanted.std()
        reason = f"another one beside it changes what is said by {moved:.1g} of its spread" if moved > FLAT else ""
    except Exception as error:
        reason = _reason(error)
    if reason:
        raise InputError(
            f'padding = "free": {type(base).__name__} cannot tell examples apart that are laid end to end: {reason}; '
            'use padding = "longest"'
        )


def check_saving(spec: RunSpec, base: nn.Module) -> str:
    """InputError where what the method learns cannot be computed, saved and read; why it cannot be attached, if so."""
    method, changed = spec.method, copy.deepcopy(base)
    try:
        torch.manual_seed(0)
        tuned = method.attach(changed, spec)
    except Exception as error:  # at these widths: at its own, `lorabench.launch.plan` tries it
        return _reason(error)
    try:
        _logits(spec, tuned, _tokens(base))
    except Exception as error:
        kind = type(base).__name__
        raise NotComputed(
            f'method.name = "{spec.method.name}": {kind} cannot be computed with it: {_reason(error)}'
        ) from error
    try:
        with tempfile.TemporaryDirectory(prefix="lorabench-") as folder:
            method.save(tuned, lambda: base, Path(folder), "updates")
            if method.has_update:
                list(read_updates(Path(folder)))
    except Exception as error:
        raise InputError(
            f'method.name = "{spec.method.name}": what it learns on {type(base).__name__} cannot be saved: '
            f"{_reason(error)}"
        ) from error
    return ""


def _reason(error: Exception) -> str:
    return error.problems[0] if isinstance(error, InputError) else f"{type(error).__name__}: {clip(error)}"
