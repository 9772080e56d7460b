"""How long a results folder of 10,000 runs takes to list and to analyze: all of it, unchanged, and with one new run.

The store is made up, as a user with a small grid would have it: LoRA at 10 ranks × 10 learning rates × 100 seeds on a
base of 4 matrices of 16 × 16, so that what is timed is the number of runs and not their size. `[select]` leaves 1,000
runs to compare. Each command is a process of its own, called as a user calls it, start-up included.

    python benchmarks/store.py                    # about 20 minutes on 2 CPU cores
    python benchmarks/store.py --seeds 10         # 1,000 runs
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hardware import write
from safetensors.torch import save_file

from lorabench.config.digests import file_digests
from lorabench.config.durable import write_bytes
from lorabench.processes.machine import available_cores
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep, read_sweep
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store

SWEEP = """
[base]
model = "{base}"
task.name = "text"
task.data = "builtin:python-code"
method.name = "lora"
method.rank = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]
lr = [1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2]
seed = {seeds}

[select]
over = "lr"
by = "valid_loss"

[[table]]
rows = ["method.name"]
columns = "method.rank"
value = ["valid_loss", "spectrum.effective_rank_entropy"]

[[figure]]
name = "rank_quality"

[[figure]]
name = "subspace_grid"
"""
LAYERS = [f"model.layers.{depth}.self_attn.{kind}" for depth in range(2) for kind in ("q_proj", "v_proj")]
SIZE = 16


def make_base(folder: Path) -> None:
    """A model of nothing but the four matrices."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    generator = torch.Generator().manual_seed(0)
    weights = {f"{layer}.weight": torch.randn(SIZE, SIZE, generator=generator) for layer in LAYERS}
    save_file(weights, folder / "model.safetensors")


def make_run(store: Store, spec: RunSpec) -> None:
    """A run that is done, as `lorabench run` leaves it, with random factors."""
    rank, generator = spec.method.rank, torch.Generator().manual_seed(int(spec.id[-8:], 16))  # type: ignore[attr-defined]
    tensors = {}
    for layer in LAYERS:
        for name, shape in (("A", (rank, SIZE)), ("B", (SIZE, rank))):
            tensors[f"base_model.model.{layer}.lora_{name}.weight"] = torch.randn(shape, generator=generator)
    folder = store.folder(spec.id)
    (folder / "updates").mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
    (folder / "updates" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "updates" / "adapter_model.safetensors")
    noise = float(torch.randn((), generator=generator))
    measures = {"valid_loss": 3 - 0.1 * rank**0.5 + abs(spec.lr - 1e-3) + 0.01 * noise, "tokens_per_second": 1000.0}
    record = RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE, measures=measures)
    record.files = file_digests(folder / "updates", folder)
    (folder / "spec.json").write_text(json.dumps(spec.to_json(), indent=2) + "\n")  # not synced: 10,000 take minutes
    (folder / "record.json").write_text(json.dumps(record.to_json(), indent=2) + "\n")


def make_store(root: Path, num_seeds: int) -> tuple[Store, Sweep]:
    make_base(root / "base")
    store = Store(root / "results")
    text = SWEEP.format(base=root / "base", seeds=list(range(num_seeds)))
    write_bytes(store.root / "grid" / "sweep.toml", text.encode())
    return store, read_sweep(store.root / "grid" / "sweep.toml", "grid")


def timed(name: str, *command: str) -> dict[str, float]:
    """Seconds of wall and processor time of one call, and the largest resident set of its processes so far."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "lorabench", *command], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mib": after.ru_maxrss / 1024,
    }
    print(f"{name}: {found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s of CPU)", file=sys.stderr)
    return found


def measure(root: Path, num_seeds: int, workers: int) -> dict[str, Any]:
    """Each command in turn; the last run of the sweep is done only after the first analysis."""
    store, sweep = make_store(root, num_seeds)
    *runs, last = sweep.runs
    begin = time.perf_counter()
    for spec in runs:
        make_run(store, spec)
    print(f"{len(runs)} runs made: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    results, many = str(store.root), ["--workers", str(workers)]
    figures = {
        "status": timed("status", "status", results),
        "first_analyze": timed("first analyze", "analyze", results, *many),
        "unchanged_analyze": timed("analyze, unchanged", "analyze", results),
    }
    make_run(store, last)
    figures["one_new_run"] = timed("analyze, one new run", "analyze", results)
    figures["unchanged_report"] = timed("report, unchanged", "report", results)
    sizes = [file.stat().st_size for kind in ("zip", "parquet") for file in store.root.rglob(f"*.{kind}")]
    return {"runs": len(sweep.runs), "commands": figures, "cache_files": len(sizes), "cache_mib": sum(sizes) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", default=100, type=int, help="a hundred runs each (default: 100)")
    parser.add_argument("--workers", default=available_cores(), type=int)
    parser.add_argument("--folder", type=Path, help="keep the store in this new folder")
    arguments = parser.parse_args()
    settings = {"seeds": arguments.seeds, "workers": arguments.workers}
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        figures = measure(root, arguments.seeds, arguments.workers)
    print(write("store", "cpu", settings, figures))


if __name__ == "__main__":
    main()
