"""Speed and memory of lorabench's training loop, all its measuring on, beside a plain PEFT loop and HF Trainer.

All three train the same model from the same initial weights on the same batches with the same optimizer; their
loss curves are checked against each other. Each in a process of its own, they take turns, ten steps each, so that a
busy machine slows all of them alike. Peak memory is measured apart from the timing, each contender in a fresh process.

    python benchmarks/training.py                                  # some minutes on a CPU
    python benchmarks/training.py --device cuda --dtype bfloat16   # on a GPU
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch
from contenders import CONTENDERS, DENOISERS, LOG_EVERY, Race, peak_bytes, reset_peak, resident_bytes, untrained_losses
from hardware import spread, write
from relay import Stopwatch, pass_on, relay, take_baton
from transformers.utils.logging import disable_progress_bar

from lorabench.data.dataset import read_data
from lorabench.methods.full import Full
from lorabench.methods.lora import Lora
from lorabench.spec.run_spec import RunSpec
from lorabench.tasks.completion import Completion
from lorabench.tasks.denoising import Denoising
from lorabench.tasks.image_classification import ImageClassification
from lorabench.tasks.text import Text
from lorabench.training.examples import prepare

TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}
"""Largest relative difference of two contenders' losses at the same step."""


def make_spec(arguments: argparse.Namespace, method: str) -> RunSpec:
    """Completions are four times as long as blocks of text at most, and twice as many make a step. Images as is."""
    if method in IMAGES:
        task: Any = ImageClassification(data="builtin:digits-turned", max_eval=1)
        return replace(make_spec(arguments, method.partition("-")[0]), task=task)
    if method in DIFFUSION:
        task = Denoising(data="builtin:digits-outlined", condition="label", max_eval=1)
        of_method = make_spec(arguments, method.partition("-")[0])
        return replace(of_method, task=task, model=arguments.denoiser)
    times = (4, 2) if method in COMPLETION else (1, 1)
    return RunSpec(
        method=Full() if method == "full" else Lora(rank=arguments.rank),
        task=completion() if method in COMPLETION else Text(data=arguments.data, max_eval=1),
        model=arguments.model,
        dtype=arguments.dtype,
        seq_len=times[0] * arguments.seq_len,
        batch_size=times[1] * arguments.batch_size,
        padding="free" if method == "lora-free" else "longest",
        steps=(arguments.rounds + 1) * LOG_EVERY,
        lr=arguments.lr,
        warmup=0.0,
        threads=arguments.threads,
    )


def completion() -> Completion:
    """Paragraphs of the built-in documents, each with the name of its document as a short response."""
    folder = Path(tempfile.gettempdir()) / "lorabench-benchmark-completion"
    folder.mkdir(exist_ok=True)
    for split, rows in read_data("builtin:english-docs").splits.items():
        pairs = [(text, row["source"]) for row in rows for text in row["text"].split("\n\n") if len(text) > 20]
        lines = [json.dumps({"prompt": f"{text}\n", "response": name}) + "\n" for text, name in pairs]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return Completion(data=str(folder), max_eval=1)


def check_agreement(curves: dict[str, list[float]], untrained: list[float], tolerance: float) -> float:
    """The largest relative difference between the contenders' losses; AssertionError past the tolerance."""
    reference = curves["lorabench"]
    for name, curve in curves.items():
        assert len(curve) == len(reference), f"{name}: {len(curve)} steps, lorabench: {len(reference)}"
        assert all(map(math.isfinite, curve)), f"{name}: a loss is not finite"  # `max` would pass over a NaN
    pairs = [pair for curve in curves.values() for pair in zip(curve, reference, strict=True)]
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    assert worst <= tolerance, f"the loss curves differ by {worst:.2g}: this is not the same work"
    half = len(reference) // 2
    assert sum(reference[half:]) < sum(untrained[half:]), "training has not brought the loss down"
    return worst


def check_alike(curves: dict[str, list[float]], tolerance: float) -> float:
    """The relative difference of the contenders' mean losses over the second half, each having noise of its own."""
    means = {name: sum(curve[len(curve) // 2 :]) / (len(curve) - len(curve) // 2) for name, curve in curves.items()}
    worst = max(means.values()) / min(means.values()) - 1
    assert worst <= tolerance, f"the mean losses differ by {worst:.2g}: this is not the same work"
    return worst


def measure_speed(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """Tokens/s of every round: a block of LOG_EVERY steps of each contender in turn."""
    spec = make_spec(arguments, method)
    contenders = DENOISERS if isinstance(spec.task, Denoising) else CONTENDERS
    rounds = [f"--rounds={arguments.rounds}", "--timed"]
    found = relay({name: [*child_command(arguments, method, name), *rounds] for name in contenders})
    timed = {name: json.loads(line) for name, line in found.items()}
    curves = {name: timed[name]["losses"] for name in contenders}
    if contenders is DENOISERS:
        worst, lengths = check_alike(curves, ALIKE), [1] * (spec.steps * spec.batch_size)
    else:
        race = Race(spec, prepare(spec), Stopwatch(LOG_EVERY, torch.device(arguments.device)))
        worst = check_agreement(curves, untrained_losses(race), TOLERANCE[spec.dtype])
        lengths = [len(row.get("input_ids", "1")) for row in race.rows()]  # or the image that it is
    size = LOG_EVERY * spec.batch_size
    tokens = [sum(lengths[first : first + size]) for first in range(size, len(lengths), size)]
    wall = {name: [*map(truediv, tokens, timed[name]["seconds"])] for name in contenders}
    cpu = {name: [*map(truediv, tokens, timed[name]["cpu_seconds"])] for name in contenders}
    longest = [max(lengths[first : first + spec.batch_size]) for first in range(0, len(lengths), spec.batch_size)]
    return {
        "padded_over_real_tokens": spec.batch_size * sum(longest) / sum(lengths),
        f"{spec.task.unit}_per_second": {name: spread(values) for name, values in wall.items()},
        "lorabench": ratios(wall, "") | ratios(cpu, "_by_cpu_time"),
        "largest_loss_difference": worst,
        "losses": curves["lorabench"],
    }


def ratios(speeds: dict[str, list[float]], suffix: str) -> dict[str, Any]:
    """How many times as fast lorabench was as each peer, round by round, and over all rounds together."""
    found = {}
    for peer in speeds:
        if peer != "lorabench":
            pairs = list(zip(speeds["lorabench"], speeds[peer], strict=True))
            overall = sum(1 / theirs for _, theirs in pairs) / sum(1 / ours for ours, _ in pairs)
            found[f"over_{peer}{suffix}"] = spread([a / b for a, b in pairs]) | {"overall": overall}
    return found


def measure_memory(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """Each contender in fresh processes of its own."""
    contenders = DENOISERS if method in DIFFUSION else CONTENDERS
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.memory_rounds):
        for name in contenders:
            command = [*child_command(arguments, method, name), "--rounds=2"]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows[name].append(json.loads(output.splitlines()[-1]))
    return {name: {key: spread([row[key] for row in found]) for key in found[0]} for name, found in rows.items()}


def child_command(arguments: argparse.Namespace, method: str, contender: str) -> list[str]:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in vars(arguments).items() if key in ARGUMENTS]
    return [sys.executable, __file__, *options, f"--methods={method}", f"--child={contender}"]


def child(arguments: argparse.Namespace) -> None:
    """Print as JSON one contender's times and losses, or the peak memory (MiB) of its training."""
    from transformers import Trainer  # noqa: F401  so that no contender is charged for imports that another makes

    device = torch.device(arguments.device)
    spec, run = make_spec(arguments, arguments.methods[0]), (CONTENDERS | DENOISERS)[arguments.child]
    if arguments.timed:
        race = Race(spec, prepare(spec), Stopwatch(LOG_EVERY, device, between=pass_on))
        take_baton()
        run(race)
        losses = [float(loss) for loss in race.losses]
        print(json.dumps({"seconds": race.watch.seconds, "cpu_seconds": race.watch.cpu_seconds, "losses": losses}))
        return
    race = Race(spec, prepare(spec), Stopwatch(LOG_EVERY, device, on_warm=partial(reset_peak, device)))
    before = resident_bytes()
    run(race)
    peak = max(peak_bytes(device), race.other_peak)
    above = {} if device.type == "cuda" else {"above_start_mib": (peak - before) / 2**20}
    print(json.dumps({"peak_mib": peak / 2**20} | above))


METHODS = ["lora", "full", "lora-completion", "lora-free"]
"""The last two train LoRA on short responses to prompts of all lengths; with the last, lorabench pads nothing."""
COMPLETION = METHODS[2:]
IMAGES = ["lora-images", "full-images"]
"""Of `vision.py`."""
DIFFUSION = ["lora-diffusion", "full-diffusion"]
"""Of `vision.py` too: a denoiser, beside diffusers' DreamBooth loop."""
ALIKE = 0.1
"""Of the mean losses of two contenders whose noise is not the same."""
ARGUMENTS: dict[str, Any] = {
    "model": "builtin:tiny-llama",
    "denoiser": "builtin:tiny-diffusion",
    "data": "builtin:python-code",
    "rank": 8,
    "batch_size": 4,
    "seq_len": 64,
    "lr": 3e-3,
    "threads": 1,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "dtype": "float32",
}


def parse(name: str, methods: list[str], defaults: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=(__doc__ or "").partition("\n")[0])
    for key, value in (ARGUMENTS | defaults).items():
        parser.add_argument(f"--{key.replace('_', '-')}", default=value, type=type(value), help=f"default: {value}")
    parser.add_argument("--rounds", default=40, type=int, help=f"of {LOG_EVERY} steps each (default: 40)")
    parser.add_argument("--memory-rounds", default=3, type=int, help="processes a contender (default: 3)")
    parser.add_argument("--methods", nargs="+", default=methods, choices=[*METHODS, *IMAGES, *DIFFUSION])
    parser.add_argument("--child", choices=list(CONTENDERS | DENOISERS), help=argparse.SUPPRESS)
    parser.add_argument("--timed", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main(name: str = "training", methods: list[str] = METHODS, **defaults: Any) -> None:
    arguments = parse(name, methods, defaults)
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    if arguments.child:
        child(arguments)
        return
    figures = {}
    for method in arguments.methods:
        figures[method] = measure_speed(arguments, method)
        figures[method]["memory"] = measure_memory(arguments, method)
        print_figures(method, figures[method])
    settings = {key: value for key, value in vars(arguments).items() if key not in ("child", "timed", "device")}
    specs = {method: asdict(make_spec(arguments, method)) for method in arguments.methods}
    settings |= {"optimizer": _optimizer(specs)}
    print(write(name, arguments.device, settings, {"methods": figures}))


def _optimizer(specs: dict[str, Any]) -> dict[str, Any]:
    keys = ("lr", "schedule", "weight_decay", "beta1", "beta2", "epsilon", "clip")
    return {method: {key: spec[key] for key in keys} for method, spec in specs.items()}


def print_figures(method: str, figures: dict[str, Any]) -> None:
    unit = next(unit for unit in ("tokens", "images") if f"{unit}_per_second" in figures)
    for name, speed in figures[f"{unit}_per_second"].items():
        memory = ", ".join(f"{key} {value['median']:.1f}" for key, value in figures["memory"][name].items())
        print(f"{method:15} {name:10} {speed['median']:9.0f} {unit}/s   {memory}")
    for peer, ratio in figures["lorabench"].items():
        others = ", ".join(f"{key} {ratio[key]:.3f}" for key in ("overall", "min", "max"))
        interval = " to ".join(f"{end:.3f}" for end in ratio["interval"] or ())
        print(f"{method:15} lorabench {peer} {ratio['median']:.3f} [{interval}] ({others})")


if __name__ == "__main__":
    main()
