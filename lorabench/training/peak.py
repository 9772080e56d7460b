"""FLOP per second that a device can reach: by its data sheet, else as fast as a matrix product has ever been on it.

A product beside other processes only seems slower, never faster. So the best of many counts, of this process and of all
before: it is kept in the user's cache folder, for it is the machine's and no results folder's, by what it depends on.
Every later run adds a few products, so that a first measurement on a busy machine is put right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.durable import cache_folder
from lorabench.training.environment import cpu_name

if TYPE_CHECKING:
    import torch

PEAK_FLOPS = {  # dense, per second, from the data sheets: bfloat16, float32 (TF32 off)
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "A10G": (70e12, 31.2e12),
    "V100": (0.0, 15.7e12),
    "RTX 4090": (165e12, 82.6e12),
}
SIZES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192)}
"""Of the square matrices: small products find a moment in which nothing else runs, large ones use all of the device."""
FIRST, LATER = 40, 4
"""Products of each size: where the machine is not known yet, or a run was faster; and of every other run."""
SECONDS = 2.0
"""After which no further product is begun."""


def peak_flops(device: torch.device, dtype: str, beyond: float = 0.0) -> tuple[float, str]:
    """What utilization is measured against, and where the figure comes from.

    A rate `beyond` that a run has reached has it measured at length again.
    """
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, (bf16, fp32) in PEAK_FLOPS.items():
            if key in name and (bf16 if dtype == "bfloat16" else fp32):
                return (bf16 if dtype == "bfloat16" else fp32), f"data sheet of {key}, {dtype}"
    machine = _machine(device, dtype)
    file = cache_folder() / "peak_flops" / f"{hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]}.json"
    kept = _read(file)
    rate = max(kept, _measure(device, dtype, LATER if kept > beyond else FIRST))
    if rate > kept:
        _write(file, machine | {"flop_per_second": rate})
    threads = f", {machine['threads']} threads" if device.type == "cpu" else ""
    sizes = "/".join(f"{size}²" for size in SIZES[device.type])
    product = f"product of {sizes} {dtype} matrices{threads}"
    return rate, f"measured: the fastest {product} that {machine['device']} has shown"


def _machine(device: torch.device, dtype: str) -> dict[str, Any]:
    """All that the rate depends on."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return {"device": name, "torch": torch.__version__, "dtype": dtype, "threads": threads}


def _measure(device: torch.device, dtype: str, repeats: int) -> float:
    """FLOP per second of the fastest product."""
    import torch

    generator = torch.Generator(device).manual_seed(0)  # its own: a run's random numbers must not depend on this
    best, end = 0.0, time.perf_counter() + SECONDS
    for size in SIZES[device.type]:
        a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype), generator=generator)
        for number in range(repeats):
            if number and time.perf_counter() > end:
                break
            best = max(best, 2 * size**3 / _seconds(a))
    return best


def _seconds(a: torch.Tensor) -> float:
    """Of A Aᵀ, as a linear layer has it: A A takes ten times as long in bfloat16 on some CPUs."""
    import torch

    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    wait()
    begin = time.perf_counter()
    torch.nn.functional.linear(a, a)
    wait()
    return time.perf_counter() - begin


def _read(file: Path) -> float:
    """The rate that is kept; 0 where there is none: it is measured again."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        rate = float(json.loads(file.read_text())["flop_per_second"])
        return rate if 0 < rate < math.inf else 0.0
    return 0.0


def _write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all; where nothing can be written, the next run measures anew."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, file)
