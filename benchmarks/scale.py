"""Large models: a LoRA extracted from a full fine-tuning of 224 layers, and intruders beside PEFT's own function.

python benchmarks/scale.py                       # Llama-2-7B's shapes: some ten minutes on two cores
python benchmarks/scale.py --size 512 --blocks 2 # a look at whether all of it works
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from lorabench.processes.machine import PATIENT_THREADS, available_cores

os.environ.update(PATIENT_THREADS)

import torch
from analysis import LLAMA_7B, cosines, seconds, status, take_turns, with_intruders
from hardware import write
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import save_file
from torch import Tensor, nn

from lorabench.linalg.krylov import Dense, top_svd

RANK = 16
EPSILON = 0.5
"""Below which cosine a direction is an intruder: PEFT's default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="hidden size; the feed-forward's is 2.6875 times that")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--only", help="one section: extraction_7b, intruders_beside_peft")
    parser.add_argument("--extract", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = {1: arguments.size, 2: arguments.size * 43 // 16}
    shapes = {kind: (sizes[m], sizes[n]) for kind, (m, n) in LLAMA_7B.items()}
    if arguments.extract:
        print(json.dumps(extract(shapes, arguments.blocks)))
        return
    figures = {}
    for section, measure in {
        "extraction_7b": lambda: extraction(shapes, arguments),
        "intruders_beside_peft": lambda: intruders(arguments),
    }.items():
        if arguments.only not in (None, section):
            continue
        figures[section] = measure()
        print(section, json.dumps(figures[section]), flush=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "extract"}
    print(write("scale", "cpu", settings, {"sections": figures}))


def extraction(shapes: dict[str, tuple[int, int]], arguments: argparse.Namespace) -> dict[str, Any]:
    """All layers in a fresh process, beside full SVDs of one layer a shape, multiplied by the number of its layers."""
    options = [*(f"--{key}={getattr(arguments, key)}" for key in ("size", "blocks", "threads")), "--extract"]
    output = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    svds, kept = 0.0, []
    for shape in dict.fromkeys(shapes.values()):
        W = update(shape, 0)
        count = arguments.blocks * [*shapes.values()].count(shape)
        svds += count * seconds(lambda W=W: torch.linalg.svd(W, full_matrices=False), "cpu")
        exact = torch.linalg.svdvals(W.double())[:RANK]
        kept.append(float(top(W)[1].double().square().sum() / exact.square().sum()))
    return found | {
        "energy_over_the_best_of_this_rank": min(kept),
        "seconds_of_full_svds": svds,
        "times_slower_than_lorabench": svds / found["seconds"],
    }


def extract(shapes: dict[str, tuple[int, int]], blocks: int) -> dict[str, Any]:
    """The best LoRA of every layer, one layer in memory at a time; seconds without those of making the layer."""
    for shape in dict.fromkeys(shapes.values()):
        template(shape)
    top(torch.randn(64, 64))
    begin, taken, tensors = status("VmRSS"), 0.0, {}
    Path("/proc/self/clear_refs").write_text("5")
    for number in range(blocks * len(shapes)):
        kind, shape = [*shapes.items()][number % len(shapes)]
        W = update(shape, number)
        start = time.perf_counter()
        U, S, Vh = top(W)
        root = S.sqrt().to(U)
        tensors[f"{number}.{kind}.lora_B.weight"] = (U * root).contiguous()
        tensors[f"{number}.{kind}.lora_A.weight"] = (root[:, None] * Vh).contiguous()
        taken += time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        taken += time.perf_counter() - start
    return {
        "layers": blocks * len(shapes),
        "rank": RANK,
        "seconds": taken,
        "peak_bytes": status("VmHWM") - begin,
        "adapter_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "largest_layer_bytes": max(4 * m * n for m, n in shapes.values()),
    }


def top(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = top_svd(Dense(W), RANK, tolerance=2e-3)
    return found.U, found.S, found.Vh


@cache
def template(shape: tuple[int, int]) -> Tensor:
    """ΔW (M, N) of full fine-tuning: a head σ_i = 3 i^-0.5 on a Gaussian bulk."""
    m, n = shape
    g = torch.Generator().manual_seed(0)
    count = min(shape) // 16
    U, V = (torch.linalg.qr(torch.randn(size, count, generator=g)).Q for size in shape)
    bulk = torch.randn(m, n, generator=g) * (0.2 / max(shape) ** 0.5)
    return bulk.addmm_(U * (3 * torch.arange(1, count + 1) ** -0.5), V.mT)


def update(shape: tuple[int, int], number: int) -> Tensor:
    """A layer's own: that of its shape with other signs of its columns, for to draw it takes longer than its SVD."""
    signs = torch.randint(2, (shape[1],), generator=torch.Generator().manual_seed(number))
    return template(shape) * (2.0 * signs - 1)


class OneLayer(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.layer = nn.Linear(*reversed(weight.shape), bias=False)
        self.layer.weight.data = weight


class Counted(Exception):
    """PEFT has told how many there are: what it does to them then takes a third SVD."""


def intruders(arguments: argparse.Namespace) -> dict[str, Any]:
    """How many of the top 10 left vectors of W0 + B A are intruders; lorabench has W0's SVD in its cache."""
    tuned = with_intruders(arguments.size)
    made = tuned.layer.update
    assert made is not None and made.A is not None
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])
    model: Any = get_peft_model(OneLayer(tuned.base.weight), config)  # type: ignore[arg-type]
    lora = model.base_model.model.layer
    lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = made.A, made.B

    def peft() -> int:
        told: list[str] = []

        def sink(text: str) -> None:
            told.append(text)
            raise Counted

        try:
            reduce_intruder_dimension(model, top_k=10, threshold_epsilon=EPSILON, logging_sink=sink)
        except Counted:
            model.delete_adapter("intruder_reduced")
        return 0 if told[0].endswith("No intruders") else int(told[0].rpartition(" ")[2])

    found = {
        "lorabench, W0's SVD cached": lambda: int((cosines(tuned) < EPSILON).sum()),
        "peft's reduce_intruder_dimension, until it has counted": peft,
    }
    counts = {name: call() for name, call in found.items()}
    assert len({*counts.values()}) == 1, f"the counts differ: {counts}"
    return {"shape": [arguments.size] * 2, "rank": RANK, "counts": counts} | take_turns(found, arguments.rounds, "cpu")


if __name__ == "__main__":
    main()
