"""A run's model along W0 + λ ΔW: the task and what is retained, evaluated at each λ.

    results/paths/<id>/record.json      one a run; written after each evaluation, further λ are added

λ = 0 is the untouched base and λ = 1 the run's own model. Wortsman et al. 2021 (WiSE-FT, arXiv 2109.01903) trade what
was learned against what was forgotten so, with λ in [0, 1].
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorabench.adapters.intervention.intervene import Bench, Run, about, content_of, read_run
from lorabench.config.decode import InputError
from lorabench.config.durable import write_json
from lorabench.config.json_file import read_json
from lorabench.config.quote import show_path
from lorabench.models import weights
from lorabench.processes.distributed import pick_device
from lorabench.report.freshness import find_sweeps
from lorabench.spec.run_spec import canonical_json
from lorabench.store.paths import FOLDER, VERSION
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training import environment
from lorabench.updates import formats

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
Record = dict[str, Any]


def runs_of(store: Store, given: str, note: Callable[[str], None]) -> list[str]:
    """The run that is named so, or those of a sweep that are done and whose model is W0 + ΔW. InputError: none is."""
    is_run = any(run_id.startswith(given) for run_id in store.run_ids())
    if is_run or not (Path(given).is_file() or (store.root / given / "sweep.toml").is_file()):
        return [given]
    (file,) = find_sweeps(store, given)
    found, problems = [], []
    for state in store.states(list(file.read().runs)):
        if state.status != Status.DONE:
            continue
        try:
            found.append(read_run(store, state.run_id).record.run_id)
        except InputError as error:
            problems += error.problems
    for problem in problems if found else ():
        note(problem)
    if not found:
        raise InputError(problems or [f"RUN = {show_path(given)}: no run of this sweep is done"])
    return found


@contextmanager
def scaled(base: nn.Module, run: Run, scale: float) -> Iterator[nn.Module]:
    """W0 + λ ΔW inside, in place; afterwards to the bit the untouched base."""
    before: dict[str, Tensor] = {}
    try:
        for update in formats.read_updates(run.folder) if scale else ():
            parameter = re.sub(r"\[\d+\]\.weight$", "", update.parameter)  # an expert's is a part of all experts'
            if parameter not in before:
                before[parameter] = base.get_parameter(parameter).detach().to("cpu", copy=True)
            weights.add_update(base, replace(update, B=scale * update.B))
        yield base
    finally:
        with torch.no_grad():
            for parameter, weight in before.items():
                base.get_parameter(parameter).copy_(weight)


def measure(store: Store, run: Run, lambdas: Sequence[float], device: str, note: Callable[[str], None]) -> Record:
    """A run's record with every λ that is wanted, and λ = 0; what is there already is read, and no model loaded."""
    if below := [scale for scale in lambdas if scale < 0]:
        raise InputError([f"--lambdas {scale:g}: must be at least 0" for scale in below])
    key, run_id = content_of(run) | {"version": VERSION}, run.record.run_id
    name = f"{run_id}-{hashlib.sha256(canonical_json(key)).hexdigest()[:12]}"
    file = store.root / FOLDER / name / "record.json"
    record = _read(file, key)
    there = {point["lambda"] for point in record["points"]} if record else set()
    missing = sorted({0.0, *lambdas} - there)  # the base first: forgetting counts from it
    if record is not None and not missing:
        return record
    bench = Bench(run, [], pick_device(device))
    record = record or {
        "path_id": name,
        "key": key,
        "spec": run.spec.to_json(),
        "evaluated": about(run.spec),
        "environment": environment.describe(bench.device),
        "points": [],
    }
    for position, scale in enumerate(missing, 1):
        with scaled(bench.base, run, scale) as model:
            metrics = bench.metrics(model)
        if "retain_loss" in metrics:
            base = record["points"][0] if record["points"] else metrics
            metrics["forgetting"] = metrics["retain_loss"] - base["retain_loss"]
        record["points"] = sorted([*record["points"], {"lambda": scale} | metrics], key=lambda point: point["lambda"])
        write_json(file, record)
        note(f"{run_id}: [{position}/{len(missing)}] λ = {scale:g}: valid_loss {metrics['valid_loss']:.4g}")
    return record


def _read(file: Path, key: dict[str, Any]) -> Record | None:
    """The record that was kept, if it is whole and of this content."""
    try:
        record = read_json(file)
    except InputError:
        return None
    return record if record is not None and record.get("key") == key and record.get("points") else None
