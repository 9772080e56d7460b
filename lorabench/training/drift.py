"""What ΔW does on data: how far it moves the outputs of each layer, and the model's predictions from the base's.

    drift    E‖ΔW h‖² / E‖W0 h‖² over tokens, h the input that the layer has in the untouched base: the relative
             capability-conditioned drift of Huang et al. 2026 (PEFT-Arena, arXiv 2605.28819)
    null     the same of a random ΔW of that norm: ‖ΔW‖² E‖h‖² / (N E‖W0 h‖²); with its singular values, too, it has the
             standard deviation of `null_std`
    KL       KL(base ‖ tuned) of the next token, over the whole vocabulary, at each token that is predicted from those
             before it: the forward divergence that Shenfeld et al. 2025 (arXiv 2509.04259) hold against forgetting

On about TOKENS validation tokens of the task, and as many of what is retained: a pass of the base and one of the tuned
model over each, or one for all examples of a length, so that nothing is padded.

Shapes: M out features, N in features, t tokens.
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from lorabench.linalg.nulls import trace_chance
from lorabench.models.base_model import new_heads
from lorabench.models.weights import is_linear_layer
from lorabench.spec.task import LanguageModeling
from lorabench.training import gradients
from lorabench.training.base import SharedBase
from lorabench.training.evaluation import retained_sets
from lorabench.training.examples import Examples, few_batches, reader
from lorabench.training.inference import twin
from lorabench.training.passes import autocast, forward
from lorabench.training.predictions import by_tokens, divergences, look_at_head
from lorabench.training.state import Training
from lorabench.updates.gradients import RETAIN, TASK
from lorabench.updates.update import Update

TOKENS = 256
"""About how many tokens of a set are looked at; one example at least."""
Drifts = dict[str, dict[str, float]]
"""Layer -> `task`, `task_null`, `task_null_std`, and the same of `retain`."""


@dataclass(kw_only=True)
class Seen:
    """Of one linear layer of the base: its inputs (t, N) pass by pass, and Σ‖W0 h‖² over them."""

    inputs: list[Tensor] = field(default_factory=list)
    energy: float = 0.0


def measure(training: Training, root: Path) -> tuple[dict[str, float], dict[str, str], Drifts]:
    """Measures by their names in MEASURES, provenance, and the drift of each linear layer that has changed.

    Of a run that keeps snapshots the gradients at W0 are kept below `root` too, the store's folder.
    """
    with training.meter.clock("drift"):
        try:
            return _measured(training, root)
        except Exception as error:  # whatever it is, what was trained and saved stands
            return {}, {"drift": why_not(error)}, {}


def why_not(error: Exception) -> str:
    traceback.print_exception(error)
    return "not measured: " + traceback.format_exception_only(error)[-1].strip().partition("\n")[0]


def _measured(training: Training, root: Path) -> tuple[dict[str, float], dict[str, str], Drifts]:
    training.model.eval()
    base = base_beside(training).eval()
    sets = {TASK: [(training.base.stages[-1], "validation")], RETAIN: retained_sets(training.base.stages)}
    looks = {name: [look(training, base, *part) for part in parts] for name, parts in sets.items()}
    kls = {name: [kl for _, kl in found if kl is not None] for name, found in looks.items()}
    measures = {f"kl_{name}": fmean(values) for name, values in kls.items() if values}
    drifts: Drifts = defaultdict(dict)
    for update in training.spec.method.updates(training.model, lambda: base):
        for name, found in looks.items():
            if of_sets := [(pair, seen) for seen, _ in found if (pair := drift(update, seen)) is not None]:
                own, null = (fmean(pair[side] for pair, _ in of_sets) for side in (0, 1))
                std = null_std(update, [seen[update.layer] for _, seen in of_sets])
                drifts[update.layer] |= {name: own, f"{name}_null": null, f"{name}_null_std": std}
    for key in dict.fromkeys(key for each in drifts.values() for key in each if not key.endswith("_std")):
        measures[f"drift_{key}"] = fmean(each[key] for each in drifts.values() if key in each)
    of_layers = f"means over {len(drifts)} linear layers that have changed" if drifts else "no linear layer has changed"
    notes = {"drift": f"{TOKENS} validation tokens or so a set; {of_layers}"}
    if training.spec.snapshot_every and drifts:
        try:
            notes["gradients"] = gradients.keep(training, base, root)
        except Exception as error:  # as above
            notes["gradients"] = why_not(error)
    return measures, notes, dict(drifts)


def base_beside(training: Training) -> nn.Module:
    """The untouched base: out of the tuned model, sharing its frozen weights, once for a pack; else loaded anew."""
    if not training.spec.method.keeps_base:
        return training.base.untouched()

    def taken_out() -> nn.Module | None:
        return training.spec.method.unload(twin(training.model))

    is_shared = isinstance(training.base, SharedBase)
    base = training.base.once(("beside",), taken_out) if is_shared else taken_out()
    return base if base is not None else training.base.untouched()


@torch.no_grad()
def look(training: Training, base: nn.Module, examples: Examples, split: str) -> tuple[dict[str, Seen], float | None]:
    """What the base's linear layers are given on a split, and the mean KL(base ‖ tuned) in nats a token.

    No KL where the task predicts no tokens: of a new head the base has random weights alone.
    """
    spec, device, task = training.spec, training.meter.device, reader(examples.task, split)
    heads, total, count = tuple(f"{head}." for head in new_heads(base)), 0.0, 0
    batches = few_batches(examples, split, TOKENS, device)
    if by_tokens(task):
        look_at_head(base, batches[0])  # which takes a pass of its own
    with autocast(spec, device), watched(base, lambda name: not f"{name}.".startswith(heads)) as seen:
        for batch in batches:
            if not isinstance(task, LanguageModeling):
                forward(base, batch)
                continue
            found = divergences(base, training.model, batch, task.targets(batch))
            total, count = total + float(found.double().sum()), count + len(found)
    return seen, total / count if count else None


@contextmanager
def watched(base: nn.Module, wanted: Callable[[str], bool]) -> Iterator[dict[str, Seen]]:
    """Keep what linear layers are given inside, by their names."""
    seen: dict[str, Seen] = defaultdict(Seen)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            bias = getattr(module, "bias", None)
            own = output if bias is None else output - bias
            seen[name].inputs.append(args[0].detach().flatten(0, -2))
            seen[name].energy += float(own.detach().float().square().sum())

        return hook

    layers = [(name, module) for name, module in base.named_modules() if is_linear_layer(module) and wanted(name)]
    handles = [module.register_forward_hook(keep(name)) for name, module in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def drift(update: Update, seen: dict[str, Seen]) -> tuple[float, float] | None:
    """E‖ΔW h‖² / E‖W0 h‖² of a layer, and what a random ΔW of its norm gives; None of what is no linear layer's weight,
    or was given nothing."""
    own = seen.get(update.layer) if update.parameter.endswith(".weight") else None
    if own is None or not own.energy:
        return None
    factors = [factor.to(own.inputs[0].device).float() for factor in (update.A, update.B) if factor is not None]
    moved = squares = 0.0
    for inputs in own.inputs:
        h = inputs.float()
        squares += float(h.square().sum())
        for factor in factors:
            h = h @ factor.mT
        moved += float(h.square().sum())
    return moved / own.energy, squared_norm(update) * squares / (update.shape[1] * own.energy)


def null_std(update: Update, of_sets: Sequence[Seen]) -> float:
    """Standard deviation of the mean drift over sets of inputs of one layer, of ΔW's singular values in random
    directions: that of tr(ΔWᵀΔW H), H = Σ h hᵀ / Σ‖W0 h‖² on average over the sets (`trace_chance`).

    The random ΔW is one and the same for all tokens and sets, so that more of them take little off.
    """
    sizes = [(seen.energy * len(of_sets)) ** 0.5 for seen in of_sets]
    parts = [h.float() / size for seen, size in zip(of_sets, sizes, strict=True) for h in seen.inputs]
    gram = _gram(torch.cat(parts))
    of_inputs = float(gram.trace()), float(gram.square().sum())
    _, std = trace_chance((squared_norm(update), _fourth_moment(update, gram.device)), of_inputs, update.shape[1])
    return float(std)


def squared_norm(update: Update) -> float:
    """‖ΔW‖_F², from the factors where there are any."""
    B = update.B.double()
    if update.A is None:
        return float(B.square().sum())
    A = update.A.double()
    return float(((B.mT @ B) * (A @ A.mT)).sum())


def _fourth_moment(update: Update, device: torch.device) -> float:
    """Σσ⁴ of ΔW, from the factors where there are any."""
    if update.A is None:
        return float(_gram(update.B.to(device).float()).square().sum())
    A, B = update.A.double(), update.B.double()
    product = (B.mT @ B) @ (A @ A.mT)
    return float((product * product.mT).sum())


def _gram(X: Tensor) -> Tensor:
    """X Xᵀ or XᵀX, the smaller one: of either the trace and that of its square are the same."""
    return X @ X.mT if X.shape[0] < X.shape[1] else X.mT @ X
