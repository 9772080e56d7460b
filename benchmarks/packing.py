"""A step of K runs in one pass beside K steps one after another, and beside what the base's own pass takes.

For models of random weights (4 layers of a Llama, hidden width 64 to 1024, LoRA of rank 8 on all linear layers) and 32
to 2,048 tokens a run: seconds of a packed step of K runs; of K steps of the same runs alone, by lorabench's own loop;
and of the floor, the base's forward pass on the same tokens, the loss, and the backward pass to its input, which no
packing can be quicker than. Contenders take turns, and the CPU time of the process is what counts on a CPU.

    python benchmarks/packing.py                 # some minutes on one CPU core
    python benchmarks/packing.py --device cuda
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hardware import spread, write
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lorabench.config.decode import decode
from lorabench.models.base_model import BUILTIN
from lorabench.processes.distributed import ALONE, Gradients
from lorabench.spec.run_spec import RunSpec
from lorabench.training.base import SharedBase, twin
from lorabench.training.meter import Meter
from lorabench.training.packed.meter import Clock
from lorabench.training.packed.pack import PackedModel, Seat, joined
from lorabench.training.packed.rows import Rows
from lorabench.training.state import Training
from lorabench.training.step import Pass, forward_backward, update

SHAPES = [(64, 1, 32), (64, 8, 256), (256, 1, 32), (256, 2, 64), (256, 4, 128), (256, 8, 256), (1024, 1, 32)]
"""Hidden width, examples and tokens of each."""
MOST = 2**19
"""Hidden width times all runs' tokens at most: more runs of a shape are left out."""
SIZES = (1, 2, 4, 8, 16)


def make_model(folder: Path, hidden: int) -> Path:
    """A Llama of random weights with the built-in tokenizer, kept in a folder."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1024,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUILTIN / "tiny-llama").save_pretrained(folder)
    return folder


def open_base(model: Path, examples: int, tokens: int, device: torch.device) -> SharedBase:
    """The model in a folder, and data in batches of so many examples of so many tokens."""
    return SharedBase.open(make_spec(str(model), examples, tokens), device, Meter(device, 1))


def make_spec(model: str, examples: int, tokens: int, **more: Any) -> RunSpec:
    table = {
        "model": model,
        "method": {"name": "lora", "rank": 8},
        "task": {"name": "text", "max_train": 64, "max_eval": 4},
        "batch_size": examples,
        "seq_len": tokens,
    }
    return decode(RunSpec, table | more)


class Race:
    """K runs on a base, ready to take a step in each way."""

    def __init__(self, base: SharedBase, size: int):
        device = base.device
        specs = [replace(base.spec, seed=seed) for seed in range(size)]
        self.trainings = [Training.attach(spec, base.of(spec), Meter(device, 1)) for spec in specs]
        self.seats = [Seat(iter(()), Clock(), device) for _ in specs]  # type: ignore[arg-type]
        for seat, training in zip(self.seats, self.trainings, strict=True):
            batches = training.spec.objective.batches(training, lambda: None)
            parts, _ = batches.next()
            seat.request = Pass(training=training, batches=batches, parts=parts, gradients=Gradients([], ALONE))
        self.rows, self.packed = Rows(self.trainings), PackedModel(self.trainings[0])
        self.packed.put(self.rows.layers)
        for row in range(size):
            self.rows.push(row)
        whole = joined([seat.request.parts[0] for seat in self.seats], 2)  # type: ignore[union-attr]
        self.whole = {key: tensor.to(device) for key, tensor in whole.items()}
        self.base, self.task = twin(base.whole).requires_grad_(False).train(), base.stages[0].task

    def pack(self) -> None:
        self.packed.losses_and_gradients(self.seats)
        self.rows.step()

    def alone(self) -> None:
        for seat, training in zip(self.seats, self.trainings, strict=True):
            assert isinstance(seat.request, Pass)
            training.model.train()
            forward_backward(training, seat.request.parts, seat.request.batches)
            update(training)

    def floor(self) -> None:
        embedding: nn.Module = self.base.get_input_embeddings()  # type: ignore[operator]
        inputs: Tensor = embedding(self.whole["input_ids"]).requires_grad_()
        self.task.loss(self.base(inputs_embeds=inputs, use_cache=False).logits, self.whole).backward()


def seconds(call: Callable[[], None], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begin = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def measure(race: Race, rounds: int, device: torch.device) -> dict[str, Any]:
    ways = {"packed": race.pack, "alone": race.alone, "floor": race.floor}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, call in ways.items():
            found = seconds(call, device)
            if number >= 2:
                times[name].append(found)
    pairs = list(zip(*times.values(), strict=True))
    return {
        "seconds": {name: min(found) for name, found in times.items()},
        "over_alone": spread([alone / packed for packed, alone, _ in pairs]),
        "of_floor": spread([floor / packed for packed, _, floor in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", default=9, type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, figures = torch.device(arguments.device), {}
    with tempfile.TemporaryDirectory() as folder:
        for hidden, examples, tokens in SHAPES:
            model = Path(folder) / str(hidden)
            if not model.exists():
                make_model(model, hidden)
            for size in [size for size in SIZES if size * hidden * examples * tokens <= MOST]:
                name = f"hidden {hidden}, {examples} x {tokens} tokens, {size} runs"
                race = Race(open_base(model, examples, tokens, device), size)
                found = measure(race, arguments.rounds, device)
                figures[name] = found
                gain, share = found["over_alone"]["median"], found["of_floor"]["median"]
                print(f"{name}: {gain:.2f} times as fast as alone, {share:.0%} of the floor's speed", flush=True)
    headline = "hidden 256, 1 x 32 tokens, 8 runs"
    print(write("packing", arguments.device, {"rank": 8, "layers": 4, "rounds": arguments.rounds},
                {"headline": headline, "steps": figures}))  # fmt: skip


if __name__ == "__main__":
    main()
