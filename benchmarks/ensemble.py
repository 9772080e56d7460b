"""One subspace for many adapters, as `lorabench compare` finds it: 500 of rank 16 on a 7B model, beside the dense way.

One block's seven layers are written, read and compared, and multiplied by the number of blocks; what all layers have in
common (opening every adapter, matching its names, random frames of the null) is timed apart and counted once. The dense
way forms every ΔW, adds up both Gram matrices and takes their eigenvalues; it is timed on two adapters of one layer.

    python benchmarks/ensemble.py                             # some three minutes on two cores, 1.3 GB of files
    python benchmarks/ensemble.py --size 256 --adapters 50    # a look at whether all of it works
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorabench.processes.machine import PATIENT_THREADS, available_cores

os.environ.update(PATIENT_THREADS)

import torch
from analysis import LLAMA_7B
from hardware import spread, write
from safetensors.torch import save_file

from lorabench.adapters.examine.ensemble import common_layers, compare_many
from lorabench.linalg.ensemble import explained
from lorabench.updates.formats import open_adapter

RANK = 16
TIMED = 2
"""Adapters of the dense way."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="hidden size; the feed-forward's is 2.6875 times that")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    sizes = {1: arguments.size, 2: arguments.size * 43 // 16}
    shapes = {kind: (sizes[m], sizes[n]) for kind, (m, n) in LLAMA_7B.items()}
    sections = {"opening": opening(arguments), "a_block": a_block(shapes, arguments)}
    sections["accuracy"] = accuracy(arguments)
    sections["all_blocks"] = multiplied(sections, arguments)
    sections["dense_way"] = dense_way(arguments)
    print(json.dumps(sections, indent=1))
    print(write("ensemble", "cpu", vars(arguments), {"sections": sections}))


def opening(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every adapter with all its names, in a model of width 16: headers, and which layers all have."""
    shapes = dict.fromkeys(LLAMA_7B, (16, 16))
    with tempfile.TemporaryDirectory() as folder:
        adapters = written(Path(folder), shapes, arguments.blocks, arguments.adapters, rank=1)
        return {"layers": 7 * arguments.blocks, **timed(lambda: common_layers([*map(open_adapter, adapters)]), 1)}


def a_block(shapes: dict[str, tuple[int, int]], arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        adapters = [open_adapter(each) for each in written(Path(folder), shapes, 1, arguments.adapters)]
        first = timed(lambda: compare_many(adapters), 1)
        return {"first": first, "again": timed(lambda: compare_many(adapters), arguments.rounds)}


def written(folder: Path, shapes: dict[str, tuple[int, int]], blocks: int, count: int, rank: int = RANK) -> list[Path]:
    """PEFT's files in bfloat16; singular values over two decades, as trained factors have them."""
    g = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -2, rank)
    for number in range(count):
        tensors = {}
        for block in range(blocks):
            for kind, (m, n) in shapes.items():
                name = f"base_model.model.model.layers.{block}.{kind}"
                tensors[f"{name}.lora_A.weight"] = (torch.randn(rank, n, generator=g) / n**0.5).bfloat16()
                tensors[f"{name}.lora_B.weight"] = (torch.randn(m, rank, generator=g) * decay).bfloat16()
        (folder / str(number)).mkdir()
        save_file(tensors, folder / str(number) / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(shapes)}
        (folder / str(number) / "adapter_config.json").write_text(json.dumps(config))
    return [folder / str(number) for number in range(count)]


def timed(call: Callable[[], Any], rounds: int) -> dict[str, Any]:
    walls, used = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        used.append(time.process_time() - cpu)
    return {"seconds": spread(walls), "cpu_seconds": spread(used)}


def multiplied(sections: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    """The first block has the random frames; every further one is as the median of those that came again."""
    first, again, opening = (
        {kind: figures[kind]["median"] for kind in ("seconds", "cpu_seconds")}
        for figures in (sections["a_block"]["first"], sections["a_block"]["again"], sections["opening"])
    )
    return {kind: opening[kind] + first[kind] + (arguments.blocks - 1) * again[kind] for kind in first}


def accuracy(arguments: argparse.Namespace) -> dict[str, float]:
    """Of the explained curve against all eigenvalues in float64, where nothing is shared and they lie closest."""
    g, S = torch.Generator().manual_seed(0), torch.logspace(0, -2, RANK, dtype=torch.float64)
    some = [torch.linalg.qr(torch.randn(arguments.size, RANK, generator=g)).Q for _ in range(arguments.adapters)]
    found = explained(some, [S / S.norm()] * len(some))
    X = torch.cat([frame.double() * (S / S.norm()) for frame in some], 1)
    exact = torch.linalg.eigvalsh(X @ X.mT).flip(-1)[: len(found)].cumsum(0) / len(some)
    errors = (found - exact) / exact
    return {"relative_error_of_the_first": float(errors[0]), "of_the_sum_of_32": float(errors[-1])}


def dense_way(arguments: argparse.Namespace) -> dict[str, float]:
    """One layer of `size`², both sides: TIMED adapters, multiplied, and the two sets of eigenvalues."""
    d, g = arguments.size, torch.Generator().manual_seed(0)
    B, A = torch.randn(d, RANK, generator=g), torch.randn(RANK, d, generator=g)
    grams = [torch.zeros(d, d), torch.zeros(d, d)]
    start = time.perf_counter()
    for _ in range(TIMED):
        delta = B @ A
        grams[0].addmm_(delta.mT, delta)
        grams[1].addmm_(delta, delta.mT)
    each = (time.perf_counter() - start) / TIMED
    for gram in grams:
        torch.linalg.eigvalsh(gram)
    return {"seconds_of_an_adapter": each, "seconds": time.perf_counter() - start + (arguments.adapters - TIMED) * each}


if __name__ == "__main__":
    main()
