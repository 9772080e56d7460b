"""Merges written as LoRA adapters in PEFT's format, which it loads on the runs' base."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorabench.adapters.merging.adapters import Adapter
from lorabench.adapters.merging.bodies import DENSE, MERGED, Body
from lorabench.adapters.merging.compose import Bench, flat_factors, run_name
from lorabench.config.decode import InputError
from lorabench.linalg.decompose import thin_svd
from lorabench.methods._peft import tuner_layers
from lorabench.updates.peftfile import Beside, Target, carried, configuration, save_adapter, whole_folder
from lorabench.updates.readers._entry import CONFIG_FILE, read_json
from lorabench.updates.weightfile import some


@dataclass(frozen=True, kw_only=True)
class Written:
    """A merge's adapter, which has the scale 1. `distance` is ‖merge − Σ w ΔW‖ / ‖Σ w ΔW‖ over all layers: of `svd`,
    the error of its truncation."""

    body: str
    folder: str
    ranks: list[int]
    """Smallest and largest; of a dense merge, that of the whole matrix: its factors are ΔW and the identity."""
    distance: float
    is_whole: bool
    left_out: list[str]
    """By run: what it has trained beside its factors (a task head), which no combination merges."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def text(self) -> str:
        rank = "-".join(map(str, dict.fromkeys(self.ranks)))
        whole = ", stored whole (--rank cuts it)" if self.is_whole else ""
        return f"{self.body}: rank {rank}{whole}, {self.distance:.2g} from Σ w ΔW (relative): {self.folder}"


def merge_folders(wanted: Sequence[Body], output: Path) -> dict[Body, Path]:
    """`output` for one merge, below it `BY` or `BY-seed-S` for each of several. InputError where a folder is not
    empty."""
    merges = list(dict.fromkeys(body for body in wanted if body.weights))
    counts = Counter(body.by for body in merges)
    names = {body: body.by if counts[body.by] == 1 else f"{body.by}-seed-{body.seed}" for body in merges}
    folders = {body: output / name if len(merges) > 1 else output for body, name in names.items()}
    full = [path for path in folders.values() if path.exists() and (not path.is_dir() or any(path.iterdir()))]
    if full:
        raise InputError([f"--output {path}: is there already, and not empty" for path in full])
    return folders


def write_merges(adapters: Sequence[Adapter], folders: dict[Body, Path], device: torch.device) -> list[Written]:
    """Merge again, and write each to its folder; memory holds one."""
    bench = Bench(adapters, device)
    config = carried(read_json(adapters[0].folder / CONFIG_FILE))
    left_out = [f"{adapter.record.run_id}: {some(sorted(adapter.head))}" for adapter in adapters if adapter.head]
    if left_out:
        config["task_type"] = None  # PEFT would look for a head
    written = []
    for body, folder in folders.items():
        with bench.merged(body) as model:
            layers = dict(tuner_layers(model))
            targets = [_target(name, layer) for name, layer in layers.items()]
            beside = Beside(config=config)
            with whole_folder(folder) as temporary:
                save_adapter(temporary, targets, beside, configuration(targets, beside))
            ranks = [target.rank for target in targets]
            distance = _distance([*layers.values()], body.weights or ())
        seed = "" if body.seed is None else f", seed {body.seed}"
        written.append(
            Written(
                body=body.label + seed, folder=str(folder), ranks=[min(ranks), max(ranks)], distance=distance,
                is_whole=body.by in DENSE and body.rank is None, left_out=left_out,
            )
        )  # fmt: skip
    return written


def _target(name: str, layer: Any) -> Target:
    B, A = flat_factors(layer, MERGED)
    kernel = () if MERGED in layer.lora_embedding_A else tuple(layer.lora_A[MERGED].weight.shape[2:])
    return Target(
        module=name,
        B=B * layer.scaling[MERGED],
        A=A,
        rank=len(A),
        kernel=kernel,
        embedding=MERGED in layer.lora_embedding_A,
    )


def _distance(layers: Sequence[Any], weights: Sequence[float]) -> float:
    squares = [0.0, 0.0]
    for layer in layers:
        pairs = [
            (flat_factors(layer, run_name(i)), weight * layer.scaling[run_name(i)]) for i, weight in enumerate(weights)
        ]
        merged_B, merged_A = flat_factors(layer, MERGED)
        B, A = torch.cat([scale * B for (B, _), scale in pairs], 1), torch.cat([A for (_, A), _ in pairs])
        both = torch.cat([B, -layer.scaling[MERGED] * merged_B], 1), torch.cat([A, merged_A])
        for i, factors in enumerate((both, (B, A))):
            squares[i] += float(thin_svd(*factors).S.square().sum())
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
