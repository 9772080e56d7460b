"""A made-up but realistic store: a sweep of LoRA, QLoRA and full fine-tuning, with failures, and its analyses.

Losses follow a rule with seeded noise; singular values and subspaces are those of real (numpy) matrices.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import tempfile
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lorabench.analyses.accumulation import Accumulation
from lorabench.analyses.dynamics import Dynamics
from lorabench.analyses.gradient import Gradient
from lorabench.analysis.tidy import to_table
from lorabench.config import plugins
from lorabench.linalg.decompose import ThinSVD, thin_svd
from lorabench.report.results import Results, load_results, selected, with_analyses
from lorabench.spec.analysis import Analysis
from lorabench.spec.run_spec import RunSpec, flatten
from lorabench.spec.sweep import Sweep, parse_sweep
from lorabench.store.pictures import Sheet, write_sheet
from lorabench.store.record import STEPS_FILE, RunRecord, Status
from lorabench.store.steps import write_steps
from lorabench.store.store import Store
from lorabench.training import sequence
from lorabench.updates.base import BaseLayer, Tuned, decompose
from lorabench.updates.layer import LayerSVD
from tests import synthetic_base
from tests.conftest import TOY, made_once

TEXT = """\
# Question: how do rank and quantization change what LoRA learns, beside full fine-tuning?
# Cost: about 3 minutes on 2 CPU cores.   Expect: LoRA at its own best lr comes within 0.05 nats of full
# fine-tuning from rank 16 on.

[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
task.retain = "builtin:english-docs"
seed = [0, 1, 2]

[[grid]]
method.name = "lora"
method.rank = [1, 4, 16, 64]
quantization = ["none", "nf4"]
lr = [1e-3, 3e-3]

[[grid]]
method.name = "full"
lr = [3e-4, 1e-3]

[select]
over = "lr"
by = "valid_loss"

[[table]]
rows = ["method.name", "quantization"]
columns = "method.rank"
value = "valid_loss"

[[table]]
rows = ["method.name", "quantization", "method.rank"]
value = ["trainable_share", "valid_token_accuracy", "forgetting", "spectrum.rank_90"]
name = "learning_and_forgetting"
"""
DIM = 96
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")
ENVIRONMENT = {
    "python": "3.11.9",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0", "bitsandbytes": "0.50.1"},
    "git": {"commit": "77dc5c3a9e10", "dirty": True},
    "hardware": {"cpu": "AMD EPYC 9B14", "num_cpus": 2, "memory_gib": 15.6, "gpu": None},
    "model": {"name": "builtin:tiny-llama", "sha256": "5f2b09c3d41e"},
    "data": {"task": "sha256:1b7c2a90", "retain": "sha256:0d93aa17"},
}


def read(text: str = TEXT) -> Sweep:
    return parse_sweep(tomllib.loads(text), text, default_name="quickstart")


def fill(store: Store, sweep: Sweep) -> Sweep:
    """Write a record for each run: nf4 at rank 64 runs out of memory in two of three seeds, one seed fails."""
    for spec in sweep.runs:
        store.write_spec(spec)
        store.write(record(spec))
    return sweep


def record(spec: RunSpec) -> RunRecord:
    status, error = outcome(spec)
    common = {
        "run_id": spec.id,
        "spec": spec.to_json(),
        "status": status,
        "error": error,
        "started": "2026-01-05T10:00:00",
    }
    done = status == Status.DONE
    return RunRecord(
        **common,
        finished="2026-01-05T10:01:00",
        environment=ENVIRONMENT,
        measures=measures(spec) if done else {"load_peak_gib": 0.031},
        provenance={"peak_gib": "VmHWM, reset per phase"} if done else {},
    )


def outcome(spec: RunSpec) -> tuple[Status, str | None]:
    rank, nf4 = getattr(spec.method, "rank", None), spec.quantization == "nf4"
    if rank == 64 and nf4 and spec.seed > 0:
        return Status.OOM, "OutOfMemoryError: CUDA out of memory. Tried to allocate 96.00 MiB (<b>GPU</b> 0)"
    if rank == 4 and not nf4 and spec.seed == 1:
        return (
            Status.FAILED,
            "OSError: [Errno 28] No space left on device: 'updates/adapter_model.safetensors'",
        )
    if rank is None and spec.lr == 1e-3 and spec.seed == 2:
        return Status.DIVERGED, "loss is NaN at step 61"
    return Status.DONE, None


def measures(spec: RunSpec) -> dict[str, float]:
    rank, nf4 = getattr(spec.method, "rank", None), spec.quantization == "nf4"
    noise = np.random.default_rng([spec.seed, rank or 0, nf4, int(spec.lr * 1e5)]).normal
    base = 3.214 + 0.021 * nf4
    gain = 1.12 if rank is None else 0.84 + 0.052 * math.log2(rank) - (0.11 if rank == 64 else 0)
    best = 1e-3 if rank is None else 3e-3 if rank < 64 else 1e-3
    loss = base - gain + 0.04 * abs(math.log(spec.lr / best)) + noise(0, 0.011)
    trainable = 1_052_672 if rank is None else 12_288 * rank
    after = 2.905 + (0.31 if rank is None else 0.05 + 0.012 * math.log2(rank)) + noise(0, 0.01)
    return {
        "num_trainable": trainable,
        "trainable_share": trainable / 1_052_672,
        "peak_gib": 0.012 + trainable * 16 / 2**30 + (0.018 if not nf4 else 0.009) + abs(noise(0, 0.0003)),
        "load_peak_gib": 0.031,
        "tokens_per_second": (8400 if rank else 6100) * (0.62 if nf4 else 1) - 3 * (rank or 0) + noise(0, 120),
        "base_valid_loss": base,
        "valid_loss": loss,
        "valid_token_accuracy": 0.61 - 0.09 * (loss - 2.1) + noise(0, 0.001),
        "test_loss": loss + 0.031 + noise(0, 0.004),
        "retain_loss_before": 2.905,
        "retain_loss_after": after,
        "forgetting": after - 2.905,
        "kl_task": 0.3 * (base - loss) + abs(noise(0, 0.02)),
    }


def update(spec: RunSpec, layer: int) -> np.ndarray:
    """ΔW (DIM, DIM): a strong direction that all runs share, a weaker own subspace, and a tail."""
    rank = getattr(spec.method, "rank", None) or DIM
    shared = np.random.default_rng(layer)
    own = np.random.default_rng([layer, rank, spec.seed, spec.quantization == "nf4"])
    left, right = shared.normal(size=(DIM, DIM)), shared.normal(size=(DIM, DIM))
    weights = np.exp(-np.arange(rank) / (0.25 * rank + 1)) * np.where(np.arange(rank) == 0, 2, 0.5)
    common = np.where(np.arange(rank) < 2, 1.6, 0.35)
    B = common * left[:, :rank] + own.normal(size=(DIM, rank))
    A = common[:, None] * right[:rank] + own.normal(size=(rank, DIM))
    return (B * weights) @ A / DIM


def analyses(results: Results) -> dict[str, pd.DataFrame]:
    """Frames in the engine's columns, for the runs that are done: of each run, beside W0, and between runs."""
    runs = selected(results).runs
    done = runs.index[runs["status"] == Status.DONE]
    specs = [spec for spec in results.sweep.runs if spec.id in set(done)]
    layers = [(f"model.layers.{depth}.self_attn.{kind}", kind, depth) for depth in range(2) for kind in KINDS]
    svds = {(spec.id, n): _svd(spec, n) for spec in specs for n in range(len(layers))}
    bases = [synthetic_base.base(n, DIM) for n in range(len(layers))]
    places = [(spec, n, dict(zip(("layer", "kind", "depth"), layer, strict=True)) | {"run_id": spec.id})
              for spec in specs for n, layer in enumerate(layers)]  # fmt: skip
    spectra = [_spectrum(spec, place, svds[spec.id, n][1], bases[n]) for spec, n, place in places]
    pairs = [
        (_pair(a, b, axis) | dict(zip(("layer", "kind", "depth"), layer, strict=True)), svds[a.id, n], svds[b.id, n])
        for a, b in itertools.permutations(specs, 2)
        for axis in [_axis(a, b)]
        if axis
        for n, layer in enumerate(layers)
    ]
    frames = {
        "spectrum": [row for metrics, _ in spectra for row in metrics],
        "singular_values": [row for _, values in spectra for row in values],
        "subspace": [
            place | row for place, a, b in pairs if place["axis"] != "method" for row in _subspace(a[2], b[2])
        ],
        "overlap": [place | row for place, a, b in pairs for row in synthetic_base.overlap(a, b)],
    }
    beside = {name: getattr(synthetic_base, name) for name in ("alignment", "intruders", "survival")}
    frames |= {name: [] for name in beside}
    for spec, n, place in places:
        for name, rows_of in beside.items():
            frames[name] += [place | row for row in rows_of(*svds[spec.id, n], bases[n])]
    compared = set(selected(results).run_ids)
    found = {name: pd.DataFrame(rows) for name, rows in frames.items()}
    found |= _on_base([place for place in places if place[0].id in compared])
    return {name: _with_categories(frame) for name, frame in found.items()}


ON_BASE = ("cosines", "off_principal", "profile", "sparsity")


LAYER = 2
"""A v_proj."""


def _on_base(places: list[tuple[RunSpec, int, dict]]) -> dict[str, pd.DataFrame]:
    """What these analyses themselves find of one layer: of more it would take seconds."""
    base, parts = decompose(torch.from_numpy(synthetic_base.base(LAYER, DIM)).float()), []
    for spec, n, place in places:
        if n == LAYER:
            layer = _layer(torch.from_numpy(update(spec, n)).float(), _rank(spec), 8)
            tuned = Tuned(layer=layer, base=base)
            parts.append({name: _table(name, tuned, place) for name in ON_BASE})
    return {name: pd.concat([tables[name] for tables in parts], ignore_index=True) for name in ON_BASE}


def _table(name: str, tuned: Tuned, place: dict) -> pd.DataFrame:
    table = to_table(plugins.example("analyses", name).compute(tuned), place)
    return table.to_pandas().astype({"run_id": str, "layer": str, "kind": str})


def make(folder: Path, text: str = TEXT, analyzed: bool = True) -> Results:
    """The results of the synthetic store in `folder`."""
    store, sweep = Store(folder), read(text)
    fill(store, sweep)
    results = load_results(store, sweep)
    return with_analyses(results, analyses(results)) if analyzed else results


MATRICES = {seed: [[0.2, 0.3], [0.5 + seed / 10, 0.2], [0.4, 0.6 + seed / 10]] for seed in range(3)}
"""Seed -> accuracies of a sequence of two tasks: before, after the first, after the second."""


@cache
def sequences() -> Results:
    """LoRA over two tasks in sequence, in two ranks and three seeds; one run has run out of memory."""
    tasks = [TOY["task"], {"name": "text", "data": "builtin:english-docs"}]
    base = {"method": {"name": "lora", "rank": [1, 2]}, "model": TOY["model"], "tasks": tasks, "seed": [0, 1, 2]}
    sweep = parse_sweep({"base": base}, default_name="made up")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for spec in sweep.runs:
            R = MATRICES[spec.seed]
            found = {"token_accuracy": R, "loss": [[1 - share for share in row] for row in R]}
            run = RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.OOM)
            if (spec.method.rank, spec.seed) != (2, 2):
                run.status, run.measures = Status.DONE, sequence.measures(found)
                run.sequence = {"tasks": ["python-code", "english-docs"], "matrices": found}
            store.write_spec(spec)
            store.write(run)
        return load_results(store, sweep)


@cache
def trajectories() -> Results:
    """LoRA in two ranks and full fine-tuning with three snapshots; the rank-4 run of seed 2 has run out of memory."""
    base = TOY | {"steps": 8, "snapshot_every": 2, "seed": [0, 1, 2]}
    grid = [{"method": {"name": "lora", "rank": [1, 4]}}, {"method": {"name": "full"}}]
    sweep = parse_sweep({"base": base, "grid": grid}, default_name="made up")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for spec in sweep.runs:
            lost = (getattr(spec.method, "rank", None), spec.seed) == (4, 2)
            store.write_spec(spec)
            store.write(
                RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.OOM if lost else Status.DONE)
            )  # fmt: skip
        results = load_results(store, sweep)
    done = [spec for spec in sweep.runs if results.runs["status"][spec.id] == Status.DONE]
    frames = {name: pd.concat(_trajectory(spec, analysis) for spec in done)
              for name, analysis in {"dynamics": Dynamics(), "gradient": Gradient(),
                                    "accumulation": Accumulation()}.items()}  # fmt: skip
    return with_analyses(results, frames)


STEPS = 40
"""Of the runs of `logged`, which are evaluated after every ten."""


@cache
def logged() -> Results:
    """One for all tests that only read it, or its steps."""
    with tempfile.TemporaryDirectory() as folder:
        results = make_logged(Path(folder))
        results.steps  # noqa: B018 (read while the logs are there)
        return results


def make_logged(folder: Path) -> Results:
    """LoRA in two ranks and full fine-tuning with the logs of their steps; the first seed of rank 1 was unstable."""
    base = TOY | {"steps": STEPS, "eval_every": 10, "seed": [0, 1, 2]}
    grid = [{"method": {"name": "lora", "rank": [1, 4]}}, {"method": {"name": "full"}}]
    store, sweep = Store(folder), parse_sweep({"base": base, "grid": grid}, default_name="made up")
    for spec in sweep.runs:
        digest = write_steps(store.folder(spec.id) / STEPS_FILE, step_lines(spec))
        measures = {"base_valid_loss": 4.0, "valid_loss": 3.0 + spec.seed / 10}
        done = {"status": Status.DONE, "measures": measures, "steps_sha256": digest}
        store.write_spec(spec)
        store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), **done))
    return load_results(store, sweep)


def step_lines(spec: RunSpec) -> list[str]:
    """The log of a run whose loss falls from 4 to 3 nats; of rank 1 and seed 0 it climbs to 6."""
    climbs = (getattr(spec.method, "rank", None), spec.seed) == (1, 0)
    rows: list[dict[str, float]] = []
    for step in range(1, STEPS + 1):
        loss = (6 if climbs and step > 20 else 3 + math.exp(-step / 10)) + spec.seed / 10
        rows.append({"step": step, "loss": loss, "grad_norm": 1 + 1 / step, "lr": spec.lr * (1 - step / STEPS)})
        rows += [{"step": step, "valid_loss": loss + 0.1}] if step % 10 == 0 and step < STEPS else []
    return [json.dumps(row) + "\n" for row in rows]


def _trajectory(spec: RunSpec, analysis: Analysis) -> pd.DataFrame:
    """Of two layers: ΔW turns towards its end and grows, by the analysis itself."""
    frames, dtype = [], torch.float32 if analysis.is_beside_base() else torch.float64
    gradients = {name: thin_svd(torch.from_numpy(np.random.default_rng(n).normal(size=(DIM, DIM))), keep=16)
                 for n, name in enumerate(("task", "retain"))}  # fmt: skip
    for depth in range(2):
        end, start = (torch.from_numpy(update(spec, n)).to(dtype) for n in (depth, depth + 2))
        layers = [_layer(end * step + start * (8 - step), _rank(spec), step) for step in (2, 4, 6, 8)]
        place = {"run_id": spec.id, "layer": layers[0].layer, "kind": "q_proj", "depth": depth}
        place["layer"] = place["layer"].replace("0", str(depth))
        given: list[Any] = [dataclasses.replace(layer, gradients=gradients) for layer in layers]
        if analysis.is_beside_base():
            given = [Tuned(layer=layer, base=_base(depth)) for layer in given]
        frames.append(pd.DataFrame([place | row for row in analysis.compute(*given)]))
    return _with_categories(pd.concat(frames, ignore_index=True))


@cache
def _base(depth: int) -> BaseLayer:
    return decompose(torch.from_numpy(np.random.default_rng(100 + depth).normal(size=(DIM, DIM))).float())


def _layer(delta: torch.Tensor, rank: int, step: int) -> LayerSVD:
    """The best approximation of `delta` of that rank."""
    svd = thin_svd(delta, keep=rank)
    name = "model.layers.0.self_attn.q_proj.weight"
    cut = ThinSVD(U=svd.U, S=svd.S[:rank], Vh=svd.Vh)
    return LayerSVD(parameter=name, svd=cut, rank=rank if rank < DIM else None, base_norm=50.0, step=step)


def _with_categories(frame: pd.DataFrame) -> pd.DataFrame:
    """Strings as categories, as the engine has them."""
    return frame.astype({name: "category" for name in frame if isinstance(frame[name].iloc[0], str)})


def _rank(spec: RunSpec) -> int:
    return getattr(spec.method, "rank", DIM)


def _svd(spec: RunSpec, layer: int) -> tuple[np.ndarray, ...]:
    """The thin SVD of ΔW, as wide as its rank."""
    U, S, Vh = np.linalg.svd(update(spec, layer), full_matrices=False)
    return U[:, : _rank(spec)], S[: _rank(spec)], Vh[: _rank(spec)]


@cache
def _chance(rank: int) -> np.ndarray:
    """The singular values of a random matrix (DIM, DIM) of that rank."""
    own = np.random.default_rng(rank)
    return np.linalg.svd(own.normal(size=(DIM, rank)) @ own.normal(size=(rank, DIM)))[1][:rank]


def _spectrum(spec: RunSpec, place: dict, S: np.ndarray, W: np.ndarray) -> tuple[list[dict], list[dict]]:
    """The rows of `spectrum` and of `singular_values`."""
    null = _chance(_rank(spec))
    share = [int(np.searchsorted(np.cumsum(x**2) / np.sum(x**2), 0.9)) + 1 for x in (S, null)]
    ranks = [float(np.exp(-np.sum(p * np.log(p)))) for p in (S / S.sum(), null / null.sum())]
    norm = float(np.linalg.norm(S) / np.linalg.norm(W))
    metrics = [("rank_90", *share), ("effective_rank_entropy", *ranks), ("relative_norm", norm, None)]
    pairs = zip(S / S[0], null / null[0], strict=True)
    return (
        [place | {"metric": metric, "value": value, "null": null} for metric, value, null in metrics],
        [place | {"value": float(s * S[0]), "null": float(z * S[0]), "index": i} for i, (s, z) in enumerate(pairs, 1)],
    )


def _axis(a: RunSpec, b: RunSpec) -> str | None:
    """The one axis, lr apart, in which two runs differ, the first having the smaller value."""
    flats = [flatten(spec.to_json()) for spec in (a, b)]
    differ = [key for key in {**flats[0], **flats[1]} if flats[0].get(key) != flats[1].get(key)]
    differ = [key for key in differ if key != "lr"]
    if differ in (["method.rank"], ["seed"]) and flats[0][differ[0]] < flats[1][differ[0]]:
        return differ[0]
    if (a.method.name, b.method.name) == ("full", "lora") and (a.seed, a.quantization) == (b.seed, b.quantization):
        return "method"
    return None


def _pair(a: RunSpec, b: RunSpec, axis: str) -> dict:
    """The engine's columns of a pair."""
    values = [flatten(spec.to_json())["method.name" if axis == "method" else axis] for spec in (a, b)]
    return {"run_a": a.id, "run_b": b.id, "axis": axis, "value_a": values[0], "value_b": values[1]}


def _subspace(Vh_a: np.ndarray, Vh_b: np.ndarray) -> list[dict]:
    gram = np.cumsum(np.cumsum((Vh_a @ Vh_b.T) ** 2, axis=0), axis=1)
    return [
        {"side": "input", "i": i, "j": j, "phi": gram[i - 1, j - 1] / min(i, j), "chance": max(i, j) / DIM,
         "chance_std": 0.01}
        for i, j in itertools.product(_marks(len(Vh_a)), _marks(len(Vh_b)))
    ]  # fmt: skip


def _marks(rank: int) -> list[int]:
    """All indices up to 8, then every fourth: enough for a heat map, and quick."""
    return [k for k in range(1, rank + 1) if k <= 8 or k % 4 == 0]


@cache
def shared() -> Results:
    """One for all tests that only read it, made by the first of xdist's workers that asks."""
    with made_once("synthetic") as (folder, is_made):
        file = folder / "results.pickle"
        if not is_made:
            file.write_bytes(pickle.dumps(make(folder / "store")))
        return pickle.loads(file.read_bytes())


@cache
def pictured() -> Results:
    """The shared results, of runs that have drawn: prompts of one shade each, twice, the tuned model's ten lighter."""
    results = shared()
    shades = np.repeat(np.arange(40, 200, 40, dtype=np.uint8), 2)
    base = np.broadcast_to(shades[:, None, None, None], (8, 6, 5, 3)).copy()
    prompts = tuple(name for name in ("a dog", "a dog at sea", "a cat", "a house") for _ in range(2))
    sheet = Sheet(prompts=prompts, unrelated=prompts[4:], base=base, tuned=base + 10)
    folder = Path(tempfile.mkdtemp())
    write_sheet(folder / "pictures.png", sheet)
    return dataclasses.replace(results, drawn=dict.fromkeys(results.runs.index, folder / "pictures.png"))
