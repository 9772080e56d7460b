"""Speed, memory and error of the ΔW analyses beside what people use: dense SVDs, double loops, WeightWatcher.

Every contender works on the same matrices and takes turns with the others; errors are against float64 on dense
matrices. Memory is measured in a fresh process.

    python benchmarks/analysis.py                  # 4096 x 4096 and 4096 x 11008: some ten minutes on two cores
    python benchmarks/analysis.py --size 512       # a look at whether all of it works
    python benchmarks/analysis.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorabench.processes.machine import PATIENT_THREADS, available_cores

os.environ.update(PATIENT_THREADS)

import numpy as np
import torch
from hardware import spread, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabench.linalg.decompose import similarities_of_all, spectrum_metrics, subspace_similarity, thin_svd
from lorabench.linalg.krylov import Dense, top_svd
from lorabench.updates import formats
from lorabench.updates.base import BaseLayer, Tuned, decompose, top_triplets
from lorabench.updates.layer import LayerSVD
from lorabench.updates.update import Update

LLAMA_7B = {"q_proj": (1, 1), "k_proj": (1, 1), "v_proj": (1, 1), "o_proj": (1, 1),
            "gate_proj": (2, 1), "up_proj": (2, 1), "down_proj": (1, 2)}  # fmt: skip
"""Shapes (M, N) of a block's linear layers: 1 is the hidden size, 2 that of the feed-forward."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="hidden size; the feed-forward's is 2.6875 times that")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(available_cores())
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of)))
        return
    d, wide = arguments.size, arguments.size * 43 // 16
    figures: dict[str, Any] = {}
    for section, race in {
        "spectra_rank_16": lambda: spectra(d, d, 16, arguments),
        "spectra_rank_64": lambda: spectra(d, wide, 64, arguments),
        "similarity_rank_16": lambda: similarity(d, 16, arguments),
        "similarity_rank_64": lambda: similarity(d, 64, arguments),
        "similarity_24_runs_rank_16": lambda: similarity_of_all(d, 16, 24, arguments),
        "similarity_24_runs_rank_64": lambda: similarity_of_all(d, 64, 24, arguments),
        "dense_top_16": lambda: dense_top(d, 16, arguments),
        "dense_values": lambda: dense_values(d, arguments),
        "intruders": lambda: intruders(d, arguments),
        "adapter_7b": lambda: adapter(d, wide, arguments),
    }.items():
        figures[section] = race()
        print(section, json.dumps(brief(figures[section])), flush=True)
    settings = {"size": d, "feed_forward": wide, "blocks": arguments.blocks, "rounds": arguments.rounds}
    print(write("analysis", arguments.device, settings, {"sections": figures}))


def take_turns(contenders: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, Any]:
    """Seconds of each contender, and its ratio to the first (lorabench) within each round.

    A call that takes less than a twentieth of a second is repeated, and the round's figure is the mean.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in list(contenders.values())[:1]:
        call()  # the first call pays for what is loaded when it is first used
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(seconds(call, device))
    ours = next(iter(times.values()))
    ratios = {name: [peer / own for peer, own in zip(taken, ours, strict=True)] for name, taken in times.items()}
    return {
        "seconds": {name: spread(taken) for name, taken in times.items()},
        "times_slower_than_lorabench": {name: spread(ratio) for name, ratio in list(ratios.items())[1:]},
    }


def seconds(call: Callable[[], Any], device: str) -> float:
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < 0.05:
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        count += 1
    return (time.perf_counter() - start) / count


def factors(M: int, N: int, r: int, device: str) -> tuple[Tensor, Tensor]:
    """B (M, r) and A (r, N) with singular values over four decades, as trained factors have them."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(r, N, generator=g) / N**0.5
    return (torch.randn(M, r, generator=g) * torch.logspace(0, -4, r)).to(device), A.to(device)


def spectra(M: int, N: int, r: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All singular values of B A, lorabench's with vectors."""
    B, A = factors(M, N, r, arguments.device)
    exact = thin_svd(B.double().cpu(), A.double().cpu()).S
    dense = (B.double() @ A.double()).cpu().numpy()
    found = {
        "lorabench thin_svd (U, S, V)": lambda: thin_svd(B, A).S.cpu(),
        "torch.linalg.svdvals(B @ A)": lambda: torch.linalg.svdvals(B @ A)[:r].cpu(),
        "torch.linalg.svd(B @ A) (U, S, V)": lambda: torch.linalg.svd(B @ A, full_matrices=False).S[:r].cpu(),
        "WeightWatcher (B A, ARPACK)": lambda: torch.tensor(weightwatcher(B.cpu().numpy(), A.cpu().numpy(), r)),
    }
    assert np.linalg.norm(dense) == exact.norm().item() or abs(np.linalg.norm(dense) / exact.norm() - 1) < 1e-9
    errors = {name: float(((call().double() - exact) / exact).abs().max()) for name, call in found.items()}
    return {"shape": [M, N], "rank": r, "largest_relative_error": errors} | take_turns(
        found, arguments.rounds, arguments.device
    )


def weightwatcher(B: np.ndarray, A: np.ndarray, r: int) -> np.ndarray:
    """What `WWPeftLayerIterator.update_peft_layers` and `combined_eigenvalues` do, with its own function."""
    from weightwatcher.RMT_Util import svd_values

    return np.sort(svd_values(np.dot(B, A).astype(float), k=r).flatten())[::-1].copy()


def similarity(d: int, r: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """φ(i, j) for all i, j <= r."""
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, r, generator=g)).Q.to(arguments.device) for _ in range(2))
    found = {
        "lorabench subspace_similarity": lambda: subspace_similarity(U, V),
        "double loop over i and j": lambda: double_loop(U, V),
    }
    exact = double_loop(U.double(), V.double())
    errors = {name: float((call().double() - exact).abs().max()) for name, call in found.items()}
    return {"dimension": d, "rank": r, "largest_error": errors} | take_turns(found, arguments.rounds, arguments.device)


def similarity_of_all(d: int, r: int, n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """φ(i, j) of every two of n runs; the double loop is timed on two of them, and multiplied."""
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(n, d, r, generator=g)).Q.to(arguments.device)
    pairs = n * (n - 1) // 2
    found = {
        "lorabench similarities_of_all": lambda: similarities_of_all(U),
        "double loop over i and j, one pair": lambda: double_loop(U[0], U[1]),
    }
    error = float((similarities_of_all(U)[0, 1] - double_loop(U[0].double(), U[1].double())).abs().max())
    raced = take_turns(found, arguments.rounds, arguments.device)
    (name, ratio), *_ = raced["times_slower_than_lorabench"].items()
    ratios = [pairs * value for value in ratio["rounds"]]
    raced["times_slower_than_lorabench"] = {f"double loop over i and j, {pairs} pairs": spread(ratios)}
    return {"dimension": d, "rank": r, "runs": n, "pairs": pairs, "largest_error": {name: error}} | raced


def double_loop(U: Tensor, V: Tensor) -> Tensor:
    """As notebooks write the LoRA paper's section 7.2."""
    phi = torch.empty(U.shape[1], V.shape[1], dtype=U.dtype)
    for i in range(1, U.shape[1] + 1):
        for j in range(1, V.shape[1] + 1):
            phi[i - 1, j - 1] = torch.linalg.norm(U[:, :i].T @ V[:, :j]) ** 2 / min(i, j)
    return phi


def dense_update(d: int, device: str) -> Tensor:
    """ΔW of full fine-tuning: a head σ_i = 3 i^-0.5 on a Gaussian bulk."""
    g = torch.Generator().manual_seed(0)
    count = d // 16
    U, V = (torch.linalg.qr(torch.randn(d, count, generator=g)).Q for _ in range(2))
    head = (U * (3 * torch.arange(1, count + 1) ** -0.5)) @ V.mT
    return (head + torch.randn(d, d, generator=g) * 0.2 / d**0.5).to(device)


def dense_top(d: int, k: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The k largest singular triplets of a dense ΔW."""
    from scipy.sparse.linalg import svds

    W = dense_update(d, arguments.device)
    matrix = W.cpu().numpy()
    found = {
        "lorabench top_svd": lambda: top_svd(Dense(W), k, tolerance=2e-3).S.cpu(),
        "torch.linalg.svd": lambda: torch.linalg.svd(W, full_matrices=False).S[:k].cpu(),
        "scipy svds (ARPACK)": lambda: torch.tensor(np.sort(svds(matrix, k=k)[1])[::-1].copy()),
        "torch.svd_lowrank (q = k + 8, 2 iterations)": lambda: torch.svd_lowrank(W, q=k + 8, niter=2)[1][:k].cpu(),
    }
    exact = torch.linalg.svdvals(W.double().cpu())[:k]
    errors = {name: float(((call().double() - exact) / exact).abs().max()) for name, call in found.items()}
    return {"shape": [d, d], "k": k, "largest_relative_error": errors} | take_turns(
        found, arguments.rounds, arguments.device
    )


def dense_values(d: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every singular value of a dense ΔW, lorabench's with the 64 top vectors of both sides."""
    W = dense_update(d, arguments.device)
    found = {
        "lorabench thin_svd, 64 vectors": lambda: thin_svd(W, keep=64).S.cpu(),
        "torch.linalg.svdvals": lambda: torch.linalg.svdvals(W).cpu(),
        "torch.linalg.svd": lambda: torch.linalg.svd(W, full_matrices=False).S.cpu(),
    }
    exact = torch.linalg.svdvals(W.double().cpu())
    errors = {name: float(((call().double() - exact) / exact).abs().max()) for name, call in found.items()}
    return {"shape": [d, d], "largest_relative_error": errors} | take_turns(found, 1, arguments.device)


def intruders(d: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Largest cosine of each of the top 10 left vectors of W0 + B A with any of W0, whose SVD lorabench has cached.

    ΔW is large enough for some of them to be intruders.
    """
    tuned = with_intruders(d)
    base = tuned.base
    found = {
        "lorabench, W0's SVD cached": lambda: cosines(tuned),
        "svd(W0 + B A), svd(W0) cached": lambda: dense_cosines(base, tuned.matrix.dense()),
    }
    ours, theirs = (call() for call in found.values())
    raced = take_turns(found, arguments.rounds, "cpu")
    epsilons = [0.3, 0.4, 0.5, 0.6, 0.7]
    return {
        "shape": [d, d],
        "rank": 16,
        "seconds_to_cache_one_base": seconds(lambda: decompose(base.weight), "cpu"),
        "cached_bytes": sum(t.nbytes for t in (base.left.half(), base.svd.U, base.svd.S, base.svd.Vh)),
        "largest_difference_of_a_cosine": float((ours - theirs).abs().max()),
        "counts": {f"{e}": [int((ours < e).sum()), int((theirs < e).sum())] for e in epsilons},
    } | raced


def with_intruders(d: int) -> Tuned:
    """W0 (d, d) with its SVD, and a ΔW of rank 16 that is large enough to be seen among the top directions."""
    B, A = factors(d, d, 16, "cpu")
    base = decompose(base_weight(d))
    B = B * (0.6 * float(base.svd.S[0]) / float(torch.linalg.matrix_norm(B @ A, 2)))
    layer = LayerSVD(parameter="w.weight", svd=thin_svd(B, A), rank=16, update=Update(parameter="w.weight", B=B, A=A))
    return Tuned(layer=layer, base=base)


def base_weight(d: int) -> Tensor:
    """A weight with a decaying head on a Gaussian bulk."""
    g = torch.Generator().manual_seed(1)
    count = d // 8
    U, V = (torch.linalg.qr(torch.randn(d, count, generator=g)).Q for _ in range(2))
    return (U * (8 * torch.arange(1, count + 1) ** -0.6)) @ V.mT + torch.randn(d, d, generator=g) / d**0.5


def cosines(tuned: Tuned, k: int = 10) -> Tensor:
    top = top_triplets(tuned.base, tuned.layer.svd, tuned.matrix, k)
    return tuned.base.largest_cosines(top.U)[0]


def dense_cosines(base: BaseLayer, W: Tensor, k: int = 10) -> Tensor:
    U = torch.linalg.svd(W, full_matrices=False).U
    return (base.left.float().mT @ U[:, :k]).abs().amax(0)


def adapter(d: int, wide: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A Llama-2-7B-shaped adapter of rank 16 on every linear layer: all spectra with their metrics, from the file."""
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), d, wide, arguments.blocks)
        file = Path(folder) / "adapter_model.safetensors"
        found = {
            "lorabench, all spectra and their metrics": lambda: all_spectra(Path(folder)),
            "reading the file": lambda: read(file),
        }
        from_disk = {name: partial(dropped, file, call) for name, call in found.items()}
        raced = take_turns(found, arguments.rounds, "cpu")
        command = [sys.executable, __file__, "--memory-of", folder]
        memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return {
            "layers": 7 * arguments.blocks,
            "rank": 16,
            "file_bytes": file.stat().st_size,
            "memory": memory
            | {"largest_layer_dense_bytes": 4 * d * wide, "largest_layer_factor_bytes": 64 * (d + wide)},
            "file_not_in_memory": take_turns(from_disk, arguments.rounds, "cpu"),
        } | raced


def dropped(file: Path, call: Callable[[], Any]) -> Any:
    """As the first time: the file's pages are dropped from memory before the call."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return call()


def write_adapter(folder: Path, d: int, wide: int, blocks: int) -> None:
    size, tensors = {1: d, 2: wide}, {}
    g = torch.Generator().manual_seed(0)
    for block in range(blocks):
        for kind, (m, n) in LLAMA_7B.items():
            part = "self_attn" if kind in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            name = f"base_model.model.model.layers.{block}.{part}.{kind}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(16, size[n], generator=g) / size[n] ** 0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(size[m], 16, generator=g) / 100
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": list(LLAMA_7B)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def all_spectra(folder: Path) -> list[dict[str, float | None]]:
    layers = formats.load_layers(formats.open_adapter(folder))
    return [spectrum_metrics(layer.svd.S.numpy(), layer.svd.numerical_rank) for layer in layers]


def read(file: Path) -> float:
    """Every byte of it, once."""
    return sum(float(tensor.sum()) for tensor in load_file(file).values())


def memory_of(folder: Path) -> dict[str, int]:
    """Bytes that analyzing an adapter takes beyond what the imports hold: private memory, and with the mapped file."""
    all_spectra(small := make_small())
    small.rename(small)
    before = status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")
    start = status("VmRSS")
    peak_private = 0
    for layer in formats.load_layers(formats.open_adapter(folder)):
        spectrum_metrics(layer.svd.S.numpy(), layer.svd.numerical_rank)
        peak_private = max(peak_private, status("RssAnon") - before)
    return {"peak_private_bytes": peak_private, "peak_resident_bytes": status("VmHWM") - start}


def make_small() -> Path:
    folder = Path(tempfile.mkdtemp())
    write_adapter(folder, 64, 172, 1)
    return folder


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def brief(section: dict[str, Any]) -> dict[str, Any]:
    """What is printed of a section: medians."""
    ratios = {name: round(values["median"], 1) for name, values in section["times_slower_than_lorabench"].items()}
    ours = next(iter(section["seconds"].values()))["median"]
    rest = {key: value for key, value in section.items() if "error" in key or "difference" in key or key == "memory"}
    return {"seconds": round(ours, 5), "times_slower": ratios} | rest


if __name__ == "__main__":
    main()
