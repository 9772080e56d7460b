"""How useful each singular direction of ΔW is: the loss without it, beside what the gradient foretells.

    results/usefulness/<id>/record.json      one a run, λ and number of directions; written after each evaluation

Direction i is the i-th singular triplet of the ΔW of every linear layer at once, so that layers are not too many to
evaluate one by one. Scaled by λ, the model is W0 + ΔW + (λ − 1) Σ σᵢ uᵢ vᵢᵀ; to first order its loss changes by
(λ − 1) Σ σᵢ uᵢᵀ (∂L/∂W) vᵢ, the gradient being that at W0 + ΔW: the sensitivity by which Tian et al. 2026 (Spectral
Surgery, arXiv 2603.03995) weigh singular values; the record has that of each layer. Beside stands as large a change in
random directions a and b, (λ − 1) Σ σᵢ a bᵀ.

Shapes: M out features, N in features, k directions of a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.adapters.intervention.directions import Directions, random_triplets
from lorabench.adapters.intervention.intervene import TUNED, Bench, Run, about, content_of, read_record
from lorabench.config.decode import InputError
from lorabench.config.durable import write_json
from lorabench.linalg.decompose import ThinSVD
from lorabench.models.weights import is_linear_layer, output_embeddings
from lorabench.processes.distributed import pick_device
from lorabench.spec.run_spec import RunSpec, canonical_json
from lorabench.store.store import Store
from lorabench.training import environment
from lorabench.training.evaluation import retained_sets
from lorabench.training.examples import Examples, collate, reader
from lorabench.training.gradients import sides
from lorabench.training.predictions import task_loss
from lorabench.updates import formats

VERSION = 1
FOLDER = "usefulness"
OWN, RANDOM = "direction", "random"
LOSSES = ("valid_loss", "retain_loss")
TOP, SCALE = 10, 0.0


@dataclass(frozen=True, kw_only=True)
class Usefulness:
    """How many directions are scaled, one after the other, and by what."""

    top: int = TOP
    scale: float = SCALE

    def __post_init__(self) -> None:
        problems = [f"--lambdas {self.scale:g}: must be at least 0"] if self.scale < 0 else []
        problems += ["--lambdas 1: changes nothing"] if self.scale == 1 else []
        problems += [f"--top {self.top}: must be at least 1"] if self.top < 1 else []
        if problems:
            raise InputError(problems)

    def points(self, found: list[Directions]) -> list[dict[str, Any]]:
        most = max((len(each.triplets) // 2 for each in found), default=0)
        names = [f"{kind} {i}" for i in range(1, most + 1) for kind in (OWN, RANDOM)]
        return [{"scaled": TUNED, "lambda": 1.0}, *({"scaled": name, "lambda": self.scale} for name in names)]


def measure(store: Store, run: Run, wanted: Usefulness, device: str, note: Callable[[str], None]) -> dict[str, Any]:
    """A run's record; what is there already is read, and no model loaded for it."""
    key = content_of(run) | {"version": VERSION, "top": wanted.top, "scale": wanted.scale}
    run_id = run.record.run_id
    name = f"{run_id}-{hashlib.sha256(canonical_json(key)).hexdigest()[:12]}"
    file = store.root / FOLDER / name / "record.json"
    record = read_record(file, key)
    if record is not None and len(record["points"]) == record["num_points"]:
        return record
    bench = Bench(run, [], pick_device(device))
    bench.found = found = [*find(run.folder, bench.base, wanted.top)]
    if not found:
        raise InputError(f"RUN = {run_id}: no linear layer has changed")
    points = wanted.points(found)
    record = record or {"usefulness_id": name, "key": key} | _describe(run, bench, found, len(points))
    there = {point["scaled"] for point in record["points"]}
    for position, point in enumerate(points, 1):
        if point["scaled"] not in there:
            record["points"].append(point | bench.evaluate(point))
            write_json(file, record)
            loss = record["points"][-1]["valid_loss"]
            note(f"{run_id}: [{position}/{len(points)}] {point['scaled']}: valid_loss {loss:.4g}")
    return record


def find(folder: Path, model: nn.Module, top: int) -> Iterator[Directions]:
    """The first directions of each linear layer, its head apart, and random ones of the same singular values."""
    modules, head = dict(model.named_modules()), output_embeddings(model)
    for entry in formats.open_layers(folder).values():
        layer = formats.load_layer(entry)
        module = modules.get(layer.layer)
        k = min(top, layer.svd.numerical_rank)
        if (
            module is None
            or module is head
            or not is_linear_layer(module)
            or layer.parameter.endswith(".bias")
            or not k
        ):
            continue
        svd = layer.svd
        random = random_triplets(layer.parameter, svd.S[:k].float(), layer.shape)
        triplets = {f"{kind} {i + 1}": ThinSVD(U=of.U[:, i : i + 1], S=of.S[i : i + 1], Vh=of.Vh[i : i + 1])
                    for i in range(k) for kind, of in ((OWN, svd), (RANDOM, random))}  # fmt: skip
        yield Directions(parameter=layer.parameter, triplets=triplets, cosines={}, num_degenerate=0)


def sensitivities(
    model: nn.Module, examples: Examples, split: str, found: list[Directions], spec: RunSpec
) -> list[Tensor]:
    """Of each layer σᵢ uᵢᵀ (∂L/∂W) vᵢ (k,) of its own directions, L the mean loss of a split.

    By the layers' inputs h and the gradients g at their outputs, Σ (g·u)(h·v): no weight needs a gradient.
    """
    model.eval().requires_grad_(False)
    rows, task, device = examples.splits[split], reader(examples.task, split), next(model.parameters()).device
    size, count = spec.micro_batch_size or spec.batch_size, 0
    bases = [_stacked(each, device) for each in found]
    sums = [torch.zeros(len(S), dtype=torch.float64) for _, S, _ in bases]
    for first in range(0, len(rows), size):
        batch = collate(rows[first : first + size], examples.padding, device)
        with sides(model) as passes:
            task_loss(model, task, batch).backward()
        count += task.count(batch)
        for each, (U, S, Vh), own in zip(found, bases, sums, strict=True):
            for g, h in passes.get(each.parameter.removesuffix(".weight"), ()):
                own += ((g @ U) * (h @ Vh.mT)).sum(0).double().cpu() * S
    return [own / count for own in sums]


def _stacked(each: Directions, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    own = [svd for name, svd in each.triplets.items() if name.startswith(OWN)]
    U, S, Vh = (
        torch.cat([svd.U for svd in own], 1),
        torch.cat([svd.S for svd in own]),
        torch.cat([svd.Vh for svd in own]),
    )
    return U.to(device), S.double(), Vh.to(device)


def _describe(run: Run, bench: Bench, found: list[Directions], num_points: int) -> dict[str, Any]:
    scale = bench.stages[-1], "validation"
    sets = {"valid_loss": [scale]} | ({"retain_loss": sets} if (sets := retained_sets(bench.stages)) else {})
    by_set = {
        name: [sensitivities(bench.tuned, *part, found, run.spec) for part in parts] for name, parts in sets.items()
    }
    matrices = []
    for place, each in enumerate(found):
        _, S, _ = _stacked(each, torch.device("cpu"))
        means = {name: [fmean(values) for values in zip(*(part[place].tolist() for part in parts), strict=True)]
                 for name, parts in by_set.items()}  # fmt: skip
        matrices.append({"parameter": each.parameter, "singular_values": S.tolist(), "sensitivity": means})
    return {
        "spec": run.spec.to_json(),
        "evaluated": about(run.spec),
        "environment": environment.describe(bench.device),
        "matrices": matrices,
        "num_points": num_points,
        "points": [],
    }
