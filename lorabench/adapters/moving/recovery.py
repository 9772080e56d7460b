"""What a moved adapter is worth on the new base: losses of it and of what it stands beside, and the gain recovered.

All in float32, W0 + ΔW merged, on the validation split of a run's (last) task; the new base has its own tokenizer. The
intervals are of a paired bootstrap over the examples, percentiles (Efron and Tibshirani 1993, section 13.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lorabench.adapters.compression.compressible import Subject, load_updates, modules_of
from lorabench.adapters.intervention.directions import random_triplets
from lorabench.adapters.moving.transfer import Moved, Transfer
from lorabench.linalg.decompose import thin_svd
from lorabench.models import base_model
from lorabench.models.weights import add_update
from lorabench.spec.run_spec import RunSpec
from lorabench.training.base import seeded_base
from lorabench.training.evaluation import scores_of
from lorabench.training.examples import Examples, prepare_stages
from lorabench.updates.modules import refusal
from lorabench.updates.update import Update
from lorabench.updates.weightfile import WeightFiles

BASE, MOVED, RANDOM, COPIED, TRAINED = "new base", "moved", "random", "copied", "trained"
OLD_BASE, OLD = "old base", "old base + adapter"
DRAWS = 2000
LEVEL = 0.95
Losses = np.ndarray
"""(examples, 2): summed nats, and of how many tokens or examples they are."""


class Recovery:
    """Evaluates models of the new base and of the old one by a run's task and settings."""

    def __init__(self, transfer: Transfer, spec: RunSpec, device: torch.device):
        self.transfer, self.device = transfer, device
        plain = replace(spec, quantization="none", dtype="float32", micro_batch_size=1)
        self.new = replace(plain, model=transfer.to, revision=None)
        self.old = replace(plain, model=transfer.source_name, revision=transfer.revision)
        torch.set_num_threads(spec.threads)

    def losses(self, moved: Sequence[Moved], trained: Subject | None, note: Callable[[str], None]) -> dict[str, Losses]:
        """By what is evaluated. `copied` is ΔW as it is, where every width is the same."""
        random = [random_update(each) for each in moved]
        wanted: dict[str, tuple[RunSpec, Iterable[Update]]] = {
            BASE: (self.new, ()),
            MOVED: (self.new, (each.update for each in moved)),
            RANDOM: (self.new, random),
        }
        if self.transfer.fits:
            wanted[COPIED] = self.new, self._copies()
        if trained is not None:
            wanted[TRAINED] = self.new, updates_of(trained, self.transfer.target)
        wanted |= {OLD_BASE: (self.old, ()), OLD: (self.old, updates_of(self.transfer.subject, self.transfer.source))}
        found = {}
        for number, (name, (spec, updates)) in enumerate(wanted.items(), 1):
            found[name] = self._losses_with(spec, updates)
            note(f"[{number}/{len(wanted)}] {name}: loss {mean(found[name]):.4g}")
        return found

    def _copies(self) -> Iterable[Update]:
        partners = self.transfer.fits
        for update in updates_of(self.transfer.subject, self.transfer.source):
            if update.layer in partners:
                yield replace(update, parameter=f"{partners[update.layer]}.weight")

    def _losses_with(self, spec: RunSpec, updates: Iterable[Update]) -> Losses:
        """Of a base with all of these added."""
        examples = self._examples(spec)
        model: nn.Module = seeded_base(spec, examples, self.device)
        for update in updates:
            add_update(model, update)
        scores = scores_of(model, spec, examples, "validation")
        return np.array([(total, count) for total, count, _ in scores], dtype=float)

    def _examples(self, spec: RunSpec) -> Examples:
        return prepare_stages(spec)[-1]


def can_evaluate(spec: RunSpec) -> bool:
    """Whether the task needs no trained head, which no moved adapter brings."""
    return not base_model.new_heads(base_model.skeleton(spec, prepare_stages(spec)[-1].model_options))


def updates_of(subject: Subject, weights: WeightFiles) -> Iterable[Update]:
    """Every ΔW of an adapter, vectors too, by the names of the base whose weights these are."""
    modules = modules_of(replace(subject, weights=weights))
    for update in load_updates({p: e for p, e in modules.entries.items() if not getattr(e, "part", None)}):
        yield replace(update, parameter=modules.named(update.parameter))


def check_trained(trained: Subject, transfer: Transfer) -> None:
    """InputError where an adapter is not of the new base."""
    if problems := modules_of(replace(trained, weights=transfer.target)).problems:
        raise refusal(problems, f"--trained {trained.name}")


def random_update(moved: Moved) -> Update:
    """The moved ΔW's singular values in random directions: as large a change, of no direction."""
    svd = thin_svd(moved.B.float(), moved.A.float())
    random = random_triplets(moved.partner, svd.S, (len(moved.B), moved.A.shape[1]))
    return Update(parameter=f"{moved.partner}.weight", B=random.U * random.S.float(), A=random.Vh)


def mean(losses: Losses) -> float:
    return float(losses[:, 0].sum() / losses[:, 1].sum())


def table(losses: dict[str, Losses]) -> list[dict[str, Any]]:
    """A row of each: `loss` with its interval, `gain` over its own base, and `recovered`, the gain as a share of that
    of the adapter trained on the new base or, where there is none, of the old adapter on its own base.

    Every interval is of the same draws of examples, so that what two models have in common does not widen it. `gain`
    stand beside no base, and `recovered` not where the reference has no gain at 95%, or other tokens (another
    tokenizer).
    """
    reference, own = (TRAINED, BASE) if TRAINED in losses else (OLD, OLD_BASE)
    drawn = {name: bootstrap_means(each) for name, each in losses.items()}
    whole = {name: mean(each) for name, each in losses.items()}
    most = drawn[own] - drawn[reference]
    is_gain = bool(np.quantile(most, (1 - LEVEL) / 2) > 0)
    is_paired = np.array_equal(losses[own][:, 1], losses[BASE][:, 1])
    rows = []
    for name in losses:
        base = OLD_BASE if name in (OLD_BASE, OLD) else BASE
        row: dict[str, Any] = {"evaluated": name, "loss": whole[name], "loss_interval": interval(drawn[name])}
        if name != base:
            gains = drawn[base] - drawn[name]
            row |= {"gain": whole[base] - whole[name], "gain_interval": interval(gains)}
            if is_gain and is_paired and base == BASE:
                row["recovered"] = row["gain"] / (whole[own] - whole[reference])
                row["recovered_interval"] = interval(gains / most)
        rows.append(row)
    return rows


def bootstrap_means(losses: Losses) -> np.ndarray:
    """Mean losses (DRAWS,) of as many examples drawn with replacement: the same draws for as many examples."""
    chosen = np.random.default_rng(0).integers(len(losses), size=(DRAWS, len(losses)))
    totals = losses[chosen].sum(1)
    return totals[:, 0] / totals[:, 1]


def interval(drawn: np.ndarray) -> list[float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]
