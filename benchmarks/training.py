"""Speed and memory of lorabench's training loop, all its measuring on, beside a plain PEFT loop and HF Trainer.

All three train the same model from the same initial weights on the same batches with the same optimizer; their
loss curves are checked against each other first. Tokens/s are taken over the same steps, the first few left out,
in rounds that take turns, so that a busy machine slows all of them alike. Peak memory is measured apart from the
timing, each contender in a fresh process.

    python benchmarks/training.py                                  # a minute or two on a CPU
    python benchmarks/training.py --device cuda --dtype bfloat16   # on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hardware
import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from lorabench import claim
from lorabench import meter as meters
from lorabench.examples import Examples, Order, prepare
from lorabench.methods.full import Full
from lorabench.methods.lora import Lora
from lorabench.model import load_base
from lorabench.spec import RunSpec
from lorabench.steps import StepLog
from lorabench.tasks.text import Text
from lorabench.train import Stop, Training, make_optimizer, train

LOG_EVERY = 10
"""Steps between two looks at the loss, of each contender: lorabench's own habit, see `train.FLUSH_EVERY`."""
TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}
"""Largest relative difference of two contenders' losses at the same step."""


@dataclass
class Window:
    """The time between the end of step `skip` and the end of step `steps`, waiting for the device at both."""

    skip: int
    steps: int
    device: torch.device
    seen: int = 0
    times: list[float] = field(default_factory=list)

    def tick(self) -> None:
        """Call at the end of each step."""
        self.seen += 1
        if self.seen in (self.skip, self.steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())
        if self.seen == self.skip:  # what loading and the first steps took is no part of the peak
            reset_peak(self.device)

    @property
    def seconds(self) -> float:
        begin, end = self.times
        return end - begin


@dataclass
class Race:
    """What every contender is given, and the losses that it must fill in."""

    spec: RunSpec
    examples: Examples
    window: Window
    losses: list[Any] = field(default_factory=list)
    """One a step; tensors are read after the clock has stopped."""
    other_peak: int = 0
    """Bytes of the peak that the contender's own measuring saw, which resets the counter on the way."""

    def model(self) -> nn.Module:
        torch.manual_seed(self.spec.seed)
        base = load_base(self.spec, self.window.device, self.examples.model_options)
        return self.spec.method.attach(base)

    def rows(self) -> list[dict[str, torch.Tensor]]:
        """The training examples in the order in which lorabench visits them."""
        rows = self.examples.splits["train"]
        order = Order(len(rows), self.spec.batch_size, self.spec.seed)
        visited = [rows[i] for step in range(self.spec.steps) for i in order.indices(step)]
        return [{key: torch.tensor(value) for key, value in row.items()} for row in visited]


class TickingLog(StepLog):
    """The run's own step log, which the loop asks at the end of each step whether a checkpoint is due."""

    window: Window

    def checkpoint_due(self) -> bool:
        self.window.tick()
        return super().checkpoint_due()


def run_lorabench(race: Race) -> None:
    model, meter = race.model(), meters.Meter(race.window.device, race.spec.steps)
    training = Training(race.spec, model, make_optimizer(race.spec, model), meter)
    with tempfile.TemporaryDirectory() as folder:
        hold = claim.take(Path(folder))
        assert hold is not None
        log = TickingLog(Path(folder) / "steps.jsonl", 0, 60.0)
        log.window = race.window
        with hold:
            meter.start_training()
            train(training, race.examples, log, Stop(), lambda: None, hold)
            meter.end_training()
    race.losses = training.losses
    baseline = 0 if race.window.device.type == "cuda" else meter.baseline_gib
    race.other_peak = int((meter.memory()[0]["peak_gib"] + baseline) * meters.GIB)


def run_plain(race: Race) -> None:
    """The loop that people write."""
    from torch.utils.data import DataLoader
    from transformers import default_data_collator, get_linear_schedule_with_warmup

    spec, device, model = race.spec, race.window.device, race.model()
    loader = DataLoader(race.rows(), batch_size=spec.batch_size, collate_fn=default_data_collator)  # type: ignore[arg-type]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, spec.steps)
    model.train()
    for step, batch in enumerate(loader, 1):
        batch = {key: tensor.to(device) for key, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        race.losses.append(loss.detach())
        if step % LOG_EVERY == 0:
            loss.item()
        race.window.tick()


def run_trainer(race: Race) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    spec = race.spec

    class Ticking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            race.window.tick()

    class Noting(Trainer):
        def training_step(self, *inputs: Any, **options: Any) -> torch.Tensor:
            race.losses.append(super().training_step(*inputs, **options))
            return race.losses[-1]

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.lr,
            lr_scheduler_type="linear",
            weight_decay=spec.weight_decay,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=spec.dtype == "bfloat16",
            use_cpu=race.window.device.type == "cpu",
            train_sampling_strategy="sequential",
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Noting(
            race.model(), arguments, train_dataset=race.rows(), data_collator=default_data_collator, callbacks=[Ticking()]
        )  # type: ignore[arg-type]
        for callback in ("PrinterCallback", "ProgressCallback"):
            trainer.callback_handler.callbacks = [
                kept for kept in trainer.callback_handler.callbacks if type(kept).__name__ != callback
            ]
        trainer.train()


CONTENDERS: dict[str, Callable[[Race], None]] = {
    "lorabench": run_lorabench,
    "plain": run_plain,
    "trainer": run_trainer,
}


def make_spec(arguments: argparse.Namespace, method: str) -> RunSpec:
    return RunSpec(
        method=Lora(rank=arguments.rank) if method == "lora" else Full(),
        task=Text(data=arguments.data, max_eval=1),
        model=arguments.model,
        dtype=arguments.dtype,
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
        steps=arguments.steps,
        lr=1e-3 if method == "lora" else 1e-4,
        warmup=0.0,
        threads=arguments.threads,
    )


def race_once(name: str, spec: RunSpec, device: torch.device, skip: int) -> tuple[Race, list[float]]:
    race = Race(spec, prepare(spec), Window(skip, spec.steps, device))
    CONTENDERS[name](race)
    return race, [float(loss) for loss in race.losses]


def check_agreement(curves: dict[str, list[float]], tolerance: float) -> float:
    """The largest relative difference between the contenders' losses; AssertionError past the tolerance."""
    reference = curves["lorabench"]
    worst = 0.0
    for name, curve in curves.items():
        assert len(curve) == len(reference), f"{name}: {len(curve)} steps, lorabench: {len(reference)}"
        worst = max([worst, *(abs(a - b) / abs(b) for a, b in zip(curve, reference, strict=True))])
    assert worst <= tolerance, f"the loss curves differ by {worst:.2g}: this is not the same work"
    assert reference[-1] < reference[0], "the loss has not fallen"
    return worst


def measure_speed(spec: RunSpec, device: torch.device, skip: int, rounds: int) -> dict[str, Any]:
    """Tokens/s of every round; the first round of all is for warming up and for comparing the losses."""
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    tokens = (spec.steps - skip) * spec.batch_size * spec.seq_len
    worst = 0.0
    for number in range(rounds + 1):
        names = list(CONTENDERS)
        names = names[number % 3 :] + names[: number % 3]  # nobody always goes first
        races = {name: race_once(name, spec, device, skip) for name in names}
        worst = max(worst, check_agreement({name: losses for name, (_, losses) in races.items()}, TOLERANCE[spec.dtype]))
        if number:
            for name, (race, _) in races.items():
                speeds[name].append(tokens / race.window.seconds)
    ratios = {
        f"over_{peer}": spread([ours / theirs for ours, theirs in zip(speeds["lorabench"], speeds[peer], strict=True)])
        for peer in ("plain", "trainer")
    }
    return {
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "lorabench": ratios,
        "largest_loss_difference": worst,
    }


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def measure_memory(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """Each contender in a fresh process of its own."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in vars(arguments).items() if key in ARGUMENTS]
    figures = {}
    for name in CONTENDERS:
        command = [sys.executable, __file__, *options, "--steps=30", f"--methods={method}", f"--child={name}"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        figures[name] = json.loads(output.splitlines()[-1])
    return figures


def child(arguments: argparse.Namespace) -> None:
    """Print the peak memory (MiB) of one contender's training as JSON."""
    from transformers import Trainer  # noqa: F401  so that no contender is charged for imports that another makes

    device = torch.device(arguments.device)
    spec = make_spec(arguments, arguments.methods[0])
    prepare(spec)
    before = _status("VmRSS")
    race, _ = race_once(arguments.child, spec, device, arguments.skip)
    if device.type == "cuda":
        peak = max(torch.cuda.max_memory_allocated(), race.other_peak)
        print(json.dumps({"allocated_peak_mib": peak / 2**20}))
        return
    peak = max(_status("VmHWM"), race.other_peak)
    print(json.dumps({"peak_mib": peak / 2**20, "above_start_mib": (peak - before) / 2**20}))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"{key} is not in /proc/self/status"
    return int(found[1]) * 1024


ARGUMENTS: dict[str, Any] = {
    "model": "builtin:tiny-llama",
    "data": "builtin:python-code",
    "rank": 8,
    "batch_size": 4,
    "seq_len": 64,
    "steps": 60,
    "threads": 1,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "dtype": "float32",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for key, value in ARGUMENTS.items():
        parser.add_argument(f"--{key.replace('_', '-')}", default=value, type=type(value), help=f"default: {value}")
    parser.add_argument("--rounds", default=7, type=int, help="default: 7")
    parser.add_argument("--skip", default=10, type=int, help="steps left out of each round's time (default: 10)")
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    if arguments.child:
        child(arguments)
        return
    figures = {}
    for method in arguments.methods:
        spec = make_spec(arguments, method)
        figures[method] = measure_speed(spec, torch.device(arguments.device), arguments.skip, arguments.rounds)
        figures[method]["memory"] = measure_memory(arguments, method)
        print_figures(method, figures[method])
    settings = {key: value for key, value in vars(arguments).items() if key not in ("child", "device")}
    specs = {method: asdict(make_spec(arguments, method)) for method in arguments.methods}
    print(hardware.write("training", arguments.device, settings | {"optimizer": _optimizer(specs)}, {"methods": figures}))


def _optimizer(specs: dict[str, Any]) -> dict[str, Any]:
    keys = ("lr", "schedule", "weight_decay", "beta1", "beta2", "epsilon", "clip")
    return {method: {key: spec[key] for key in keys} for method, spec in specs.items()}


def print_figures(method: str, figures: dict[str, Any]) -> None:
    for name, speed in figures["tokens_per_second"].items():
        memory = ", ".join(f"{key} {value:.1f}" for key, value in figures["memory"][name].items())
        print(f"{method:5} {name:10} {speed['median']:9.0f} tokens/s   {memory}")
    for peer, ratio in figures["lorabench"].items():
        print(f"{method:5} lorabench {peer} {ratio['median']:.3f} (min {ratio['min']:.3f}, max {ratio['max']:.3f})")


if __name__ == "__main__":
    main()
