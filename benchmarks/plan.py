"""How far the plan's estimates are from what runs take: of memory and of time, without and with finished runs.

Five small sweeps of different kinds on the built-in model: language modelling with LoRA, GSM8K as completion, SST-2 as
classification, arithmetic with answers written, and full fine-tuning with serving. Of each, runs are planned in an
empty store; all but the largest are computed; then that one is planned once more, and computed. A factor is the larger
of estimate / measured and measured / estimate.

Runs are timed by the CPU time of their process, for other processes would only make them seem slower: each has one
thread. `--data` holds `gsm8k/train.jsonl` and `sst2/train.tsv` (with a header, text and label); a sweep whose file is
not there is left out.

    python benchmarks/plan.py --data ../data       # 3 to 5 minutes on 2 CPU cores
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hardware import write

from lorabench.launch.plan import make_plan
from lorabench.launch.pool import Pool, launch
from lorabench.launch.worker import Settings, execute_run
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.source import as_sweep
from lorabench.store.store import Store

LORA = {"name": "lora", "targets": "all-linear"}
TARGET = {"without": 1.5, "with": 1.25}


def sweeps(data: Path) -> dict[str, dict[str, Any]]:
    """Each one's `base`, and its runs: what they have of their own, the largest last."""
    gsm8k = {"name": "completion", "data": str(data / "gsm8k" / "train.jsonl"), "max_train": 512, "max_eval": 32,
             "prompt": "{question}\n", "response": "{answer}"}  # fmt: skip
    sst2 = {"name": "classification", "data": str(data / "sst2" / "train.tsv"), "max_train": 4096, "max_eval": 256}
    text = {"name": "text", "data": "builtin:python-code", "max_eval": 64}
    arithmetic = {"name": "completion", "data": "builtin:arithmetic", "max_eval": 64,
                  "generate": {"max_new_tokens": 24, "answer": r"=(-?\d+)", "batch_size": 32}}  # fmt: skip
    small, large = {"method.rank": 2}, {"method.rank": 16}
    return {
        "language": {
            "base": {"task": {**text, "retain": "builtin:english-docs"}, "method": LORA, "serving": False},
            "runs": [{**small, "seq_len": 64, "batch_size": 4, "steps": 40},
                     {**large, "seq_len": 128, "batch_size": 4, "steps": 30},
                     {**large, "seq_len": 128, "batch_size": 16, "steps": 60}],
        },
        "gsm8k": {
            "base": {"task": gsm8k, "method": LORA, "serving": False, "seq_len": 256},
            "runs": [{**small, "batch_size": 2, "steps": 30}, {**small, "batch_size": 4, "steps": 30},
                     {**large, "batch_size": 8, "steps": 40}],
        },
        "sst2": {
            "base": {"task": sst2, "method": LORA, "serving": False, "seq_len": 128},
            "runs": [{**small, "batch_size": 8, "steps": 30}, {**small, "batch_size": 16, "steps": 30},
                     {**large, "batch_size": 32, "steps": 80}],
        },
        "arithmetic": {
            "base": {"task": arithmetic, "method": LORA, "serving": False, "seq_len": 64},
            "runs": [{**small, "batch_size": 8, "steps": 30}, {**small, "batch_size": 16, "steps": 40},
                     {**large, "batch_size": 32, "steps": 100}],
        },
        "full": {
            "base": {"task": text, "method": {"name": "full"}, "serving": True},
            "runs": [{"seq_len": 64, "batch_size": 4, "steps": 30}, {"seq_len": 128, "batch_size": 4, "steps": 30},
                     {"seq_len": 128, "batch_size": 16, "steps": 60}],
        },
    }  # fmt: skip


class CpuClock(ModuleType):
    """`time`, whose `perf_counter` counts what this process computes alone."""

    perf_counter = staticmethod(time.process_time)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def run_by_cpu_time(spec: RunSpec, store: Store, settings: Settings) -> Any:
    """In a run's own process."""
    from lorabench.training import inference, meter

    meter.time = inference.time = CpuClock("time")
    return execute_run(spec, store, settings)


def fresh_process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def factor(estimate: float, measured: float) -> float:
    return max(estimate / measured, measured / estimate)


def judged(estimate: dict[str, Any], measures: dict[str, float]) -> dict[str, Any]:
    """Both estimates of a run beside what it took, and the parts of its time."""
    parts = {part: [value, measures.get(f"{part}_seconds", 0.0)] for part, value in estimate["seconds_of"].items()}
    total = measures["total_seconds"]
    parts["save"][1] = total - sum(taken for _, taken in parts.values())
    return {
        "basis": estimate["basis"],
        "peak_gib": [estimate["peak_gib"], measures["peak_gib"]],
        "seconds": [estimate["seconds"], total],
        "memory_factor": factor(estimate["peak_gib"], measures["peak_gib"]),
        "time_factor": factor(estimate["seconds"], total),
        "parts": {part: values for part, values in parts.items() if any(values)},
    }


def of_sweep(name: str, table: dict[str, Any], folder: Path) -> dict[str, Any]:
    base = {"model": "builtin:tiny-llama", "lr": 1e-3, **table["base"]}
    sweep = as_sweep({"name": name, "base": base, "grid": table["runs"]})
    pool = Pool(workers=1, settings=Settings(device="cpu"))
    without, before = {}, Store(folder / "empty")
    store = Store(folder / name)
    for run in make_plan(sweep, before, "cpu")["runs"]:
        without[run["run_id"]] = run["estimate"]
    *earlier, last = sweep.runs
    for specs in (earlier, [last]):
        if specs == [last]:
            (planned,) = [run for run in make_plan(sweep, store, "cpu")["runs"] if run["run_id"] == last.id]
        launch(replace(sweep, runs=tuple(specs)), store, pool, run_by_cpu_time)
    measured = {state.run_id: state.record.measures for state in store.states(list(sweep.runs)) if state.record}
    return {
        "without": [judged(without[spec.id], measured[spec.id]) for spec in sweep.runs],
        "with": [judged(planned["estimate"], measured[last.id])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of gsm8k/ and sst2/")
    parser.add_argument("--only", nargs="*", help="of the sweeps, these alone")
    arguments = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, table in sweeps(arguments.data).items():
            file = Path(table["base"]["task"]["data"])
            is_there = str(file).startswith("builtin:") or file.is_file()
            if is_there and name in (arguments.only or [name]):
                with fresh_process() as own:  # and with it a fork server that has read this sweep's data
                    figures[name] = own.submit(of_sweep, name, table, Path(folder)).result()
                for kind, runs in figures[name].items():
                    for run in runs:
                        print(f"{name:<11} {kind:<8} memory {run['memory_factor']:.2f} time {run['time_factor']:.2f} ",
                              {part: [round(v, 2) for v in values] for part, values in run["parts"].items()},
                              [round(v, 3) for v in run["peak_gib"]], flush=True)  # fmt: skip
    worst = {
        kind: {what: [max(run[f"{what}_factor"] for sweep in figures.values() for run in sweep[kind]),
                      statistics.median(run[f"{what}_factor"] for sweep in figures.values() for run in sweep[kind])]
               for what in ("memory", "time")}
        for kind in TARGET
    }  # fmt: skip
    print(worst)
    if not arguments.only:
        print(write("plan", "cpu", {"target": TARGET}, {"worst_and_median": worst, "sweeps": figures}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import plan  # so that a run's process, too, finds what is to be run

    plan.main()
