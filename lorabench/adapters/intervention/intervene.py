"""What a run's intruder dimensions do: scale their singular values, and evaluate the task and what is retained again.

    results/interventions/<id>/record.json      one a run, ε and k; written after each evaluation, further λ are added

W = W0 + ΔW + (λ − 1) Σ u σ vᵀ, the sum over the intruders of every matrix at once (Shuttleworth et al. 2024, arXiv
2410.21228, who report for LoRA of rank 256 on MetaMath at λ = 0.3: accuracy −0.1%, forgetting −33.3%). λ = 1 is the
run's own model; λ = 0 takes the intruders out. The same is done to the controls of `directions`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.adapters.intervention.directions import KINDS, Directions, find_directions
from lorabench.adapters.merging.adapters import find_run
from lorabench.analyses.intruders import EPSILON, TOP
from lorabench.analysis.analyze import files_of
from lorabench.analysis.bases import FOLDER, Bases
from lorabench.config.decode import InputError
from lorabench.config.durable import write_json
from lorabench.config.json_file import read_json
from lorabench.config.quote import clip
from lorabench.models import base_model, weights
from lorabench.processes.distributed import pick_device
from lorabench.spec.run_spec import RunSpec, canonical_json
from lorabench.store.interventions import FOLDER as INTERVENTIONS
from lorabench.store.interventions import VERSION
from lorabench.store.record import RunRecord
from lorabench.store.store import Store, check_updates
from lorabench.training import environment
from lorabench.training.evaluation import metrics_of, retention_of
from lorabench.training.examples import prepare_stages
from lorabench.updates import formats
from lorabench.updates.base import TUNED_VECTORS
from lorabench.updates.readers._entry import CONFIG_FILE
from lorabench.updates.update import INITIAL_FILE, Update

BEYOND_UPDATES = ("trainable_token_indices", "alora_invocation_tokens", "layer_replication")
"""Fields of PEFT's configuration of what a tuned model computes beyond W0 + ΔW."""
LAMBDAS = (0.0, 0.3, 0.5, 0.7, 1.0, 1.5)
BASE, TUNED = "base", "tuned"
"""The points beside those of KINDS: the untouched base, and λ = 1, which is the same for all kinds."""


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What counts as an intruder (analysis `intruders`), and by what it is scaled."""

    lambdas: tuple[float, ...] = LAMBDAS
    epsilon: float = EPSILON
    top: int = TOP

    def __post_init__(self) -> None:
        problems = [f"--lambdas {value:g}: must be at least 0" for value in self.lambdas if value < 0]
        if not 0 < self.epsilon <= 1:
            problems.append(f"--epsilon {self.epsilon:g}: must be above 0 and at most 1")
        if not 1 <= self.top <= TUNED_VECTORS:
            problems.append(f"--top {self.top}: must be at least 1 and at most {TUNED_VECTORS}")
        if problems:
            raise InputError(problems)

    def points(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """What is to be evaluated of a run, the base first; of a kind of which there are no directions nothing."""
        kinds = [kind for kind in KINDS if record[f"num_{kind}"]]
        scales = sorted({*self.lambdas} - {1.0})
        return [
            {"scaled": BASE, "lambda": None},
            {"scaled": TUNED, "lambda": 1.0},
            *({"scaled": kind, "lambda": scale} for kind in kinds for scale in scales),
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run whose tuned model is W0 + ΔW, all of it kept in `folder`."""

    record: RunRecord
    spec: RunSpec
    folder: Path


def read_run(store: Store, given: str) -> Run:
    """The run whose id begins so. InputError where there is none, or none that W0 + ΔW stands for."""
    run_id = find_run(store, given)
    record, folder = store.done(run_id, "RUN"), store.folder(run_id) / "updates"
    spec = RunSpec.from_json(record.spec)
    if spec.method.adds_computation:
        raise InputError(
            f"RUN = {run_id}: method {spec.method.name} computes what no ΔW stands for; none can be scaled"
        )
    if spec.keep != "updates":
        raise InputError(f'RUN = {run_id}: has not kept its ΔW as a whole (keep = "{spec.keep}")')
    config = (read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None) or {}
    if beyond := next((key for key in BEYOND_UPDATES if config.get(key)), None):
        raise InputError(f"RUN = {run_id}: has {beyond} = {clip(config[beyond])}, which no ΔW stands for")
    if (folder / INITIAL_FILE).exists():
        raise InputError(f"RUN = {run_id}: is LoftQ, whose ΔW counts from the base with its initial factors on top")
    check_updates(folder.parent, record, f"RUN = {run_id}")
    return Run(record=record, spec=spec, folder=folder)


def read_runs(store: Store, given: Sequence[str]) -> list[Run]:
    """Each run once. InputError with every reason why one cannot be had."""
    runs, problems = [], []
    for name in given:
        try:
            runs.append(read_run(store, name))
        except InputError as error:
            problems += error.problems
    ids = [run.record.run_id for run in runs]
    problems += [f"RUN = {run_id}: is given twice" for run_id in dict.fromkeys(ids) if ids.count(run_id) > 1]
    if problems:
        raise InputError(problems)
    return runs


class Bench:
    """A run's base and tuned model, loaded when first used. The base is evaluated before the tuned model is made."""

    def __init__(self, run: Run, found: Sequence[Directions], device: torch.device):
        self.run, self.found, self.device = run, found, device
        self.stages = prepare_stages(run.spec)

    @cached_property
    def base(self) -> nn.Module:
        """The untouched base in float32; of a quantized one, the dequantized weights."""
        spec = self.run.spec
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)  # of a new head's random weights, from which its ΔW counts
        base = base_model.load_base(spec, self.device, self.stages[0].model_options)
        for name, module in list(base.named_modules()):
            if type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params"):
                base.set_submodule(name, weights.dense_linear(module))
        return nn.Module.float(base)  # transformers' own refuses what was loaded quantized

    @cached_property
    def tuned(self) -> nn.Module:
        """W0 + ΔW, in the base's place."""
        for update in formats.read_updates(self.run.folder):
            weights.add_update(self.base, update)
        return self.base

    def evaluate(self, point: dict[str, Any]) -> dict[str, float]:
        """Validation metrics on the run's (last) task, and the retention set's."""
        if point["scaled"] in (BASE, TUNED):
            return self.metrics(self.base if point["scaled"] == BASE else self.tuned)
        with scaled(self.tuned, self.found, point["scaled"], point["lambda"]):
            return self.metrics(self.tuned)

    def metrics(self, evaluated: nn.Module) -> dict[str, float]:
        spec = replace(self.run.spec, dtype="float32")  # without autocast
        valid = metrics_of(evaluated, spec, self.stages[-1], "validation")
        return valid | retention_of(evaluated, spec, self.stages)


@contextmanager
def scaled(tuned: nn.Module, found: Sequence[Directions], kind: str, scale: float) -> Iterator[None]:
    """W0 + ΔW + (λ − 1) Σ u σ vᵀ inside, in place; afterwards to the bit what it was."""
    before: dict[str, Tensor] = {}
    try:
        for each in found:
            svd = each.triplets[kind]
            if len(svd.S):
                before[each.parameter] = tuned.get_parameter(each.parameter).detach().to("cpu", copy=True)
                B = svd.U * ((scale - 1) * svd.S).to(svd.U.dtype)
                weights.add_update(tuned, Update(parameter=each.parameter, B=B, A=svd.Vh))
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in before.items():
                tuned.get_parameter(parameter).copy_(weight)


def intervene(store: Store, run: Run, wanted: Intervention, device: str, note: Callable[[str], None]) -> dict[str, Any]:
    """A run's record with every point that is wanted; what is there already is read, and no model loaded for it."""
    key = content_of(run) | {"version": VERSION, "epsilon": wanted.epsilon, "top": wanted.top}
    run_id = run.record.run_id
    name = f"{run_id}-{hashlib.sha256(canonical_json(key)).hexdigest()[:12]}"
    file = store.root / INTERVENTIONS / name / "record.json"
    record = read_record(file, key)
    if record is not None and not _missing(record, wanted):
        return record
    note(f"{run_id}: looking for intruders")
    found = find_directions(run.record, run.folder, Bases(store.root / FOLDER, note), wanted.epsilon, wanted.top)
    bench = Bench(run, found, pick_device(device))
    record = record or {"intervention_id": name, "key": key} | _describe(run, found, bench.device)
    missing = _missing(record, wanted)
    for position, point in enumerate(missing, 1):
        metrics = bench.evaluate(point)
        record["points"].append(point | _with_forgetting(metrics, record))
        write_json(file, record)
        at = "" if point["lambda"] is None else f", λ = {point['lambda']:g}"
        note(f"{run_id}: [{position}/{len(missing)}] {point['scaled']}{at}: valid_loss {metrics['valid_loss']:.4g}")
    return record


def content_of(run: Run) -> dict[str, Any]:
    """All of a run that the numbers depend on."""
    seen = run.record.environment
    return {
        "run_id": run.record.run_id,
        "files": files_of(run.record),
        **{name: seen.get(name) for name in ("data", "model_commit", "model_sha256")},
    }


def _describe(run: Run, found: list[Directions], device: torch.device) -> dict[str, Any]:
    seen, measures = run.record.environment, run.record.measures
    weights_seen = {name: seen[name] for name in ("model_commit", "model_sha256") if name in seen}
    recorded = ("base_valid_loss", "valid_loss", "valid_accuracy", "retain_loss_before", "retain_loss_after")
    return {
        "spec": run.spec.to_json(),
        "evaluated": about(run.spec),
        "recorded": {name: measures[name] for name in recorded if name in measures},
        "environment": environment.describe(device) | weights_seen,
        "num_matrices": len(found),
        **{f"num_{kind}": sum(len(each.triplets[kind].S) for each in found) for kind in KINDS},
        "num_degenerate": sum(each.num_degenerate for each in found),
        "matrices": [each.describe() for each in found],
        "points": [],
    }


def about(spec: RunSpec) -> str:
    """What was evaluated; the record's own metrics are of the model as it was trained."""
    base = "the original weights" if spec.quantization == "none" else f"the dequantized {spec.quantization} weights"
    loaded = f", loaded in {spec.dtype}" if spec.dtype != "float32" and not spec.method.trains_base else ""
    again = f", not quantized to {spec.quantization} again" if spec.quantization != "none" else ""
    return f"W0 ({base}{loaded}) with ΔW and what is scaled merged into it{again}; all in float32"


def _with_forgetting(metrics: dict[str, float], record: dict[str, Any]) -> dict[str, float]:
    """`forgetting`, the retention loss above that of the untouched base, where there is a retention set."""
    if "retain_loss" not in metrics:
        return metrics
    before = next((p["retain_loss"] for p in record["points"] if p["scaled"] == BASE), metrics["retain_loss"])
    return metrics | {"forgetting": metrics["retain_loss"] - before}


def _missing(record: dict[str, Any], wanted: Intervention) -> list[dict[str, Any]]:
    there = {(point["scaled"], point["lambda"]) for point in record["points"]}
    return [point for point in wanted.points(record) if (point["scaled"], point["lambda"]) not in there]


def read_record(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The record that was kept, if it is whole and of this content."""
    try:
        record = read_json(file)
    except InputError:
        return None
    whole = record is not None and record.get("key") == key and {"points", "matrices", "evaluated"} <= record.keys()
    return record if whole else None
