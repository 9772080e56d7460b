"""What an adapter changed: every layer's ΔW in numbers beside chance, one layer in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lorabench.analyses.spectrum import Spectrum
from lorabench.config.decode import InputError
from lorabench.config.quote import counted
from lorabench.report.aggregate import plain
from lorabench.updates.advice import rank_pattern_for, smallest_rank
from lorabench.updates.formats import Adapter, load_layers
from lorabench.updates.layer import LayerSVD
from lorabench.updates.modules import all_models
from lorabench.updates.parts import fused_name, name_of_part
from lorabench.updates.update import DORA_PART
from lorabench.updates.weightfile import WeightFiles

ENERGIES = (0.9, 0.95, 0.99)
Row = dict[str, Any]


def inspect_adapter(
    adapter: Adapter,
    energy: float = 0.95,
    track: Callable[[Iterator[LayerSVD]], Iterable[LayerSVD]] = iter,
    base: WeightFiles | None = None,
) -> dict[str, Any]:
    """What `lorabench inspect --json` prints.

    `layers` has a row for each matrix ΔW: `spectrum`'s metrics, `null` with those of a random update of the same form
    and norm, `null_std` with their standard deviations and `singular_values`.
    `rank_advice` is by percent of ‖ΔW‖²: 90, 95, 99 and `energy`. `base` tells ‖W0‖ of layers of which the adapter
    does not. Raises InputError where a file is damaged.
    """
    if not adapter.entries:
        raise InputError(f"{adapter.source}: changed no matrix, vectors alone (biases, norms): there is no spectrum")
    rows = [_row(layer) for layer in on_base(track(load_layers(adapter)), adapter, base)]
    whole = [row for row in rows if row["part"] is None or row["part_of"] not in {other["layer"] for other in rows}]
    norms = [row["base_norm"] for row in whole]
    unknown = norms.count(None) if base else 0
    lacks = f"‖W0‖ of {counted(unknown, 'layer')} is not known: the base has no such weight, or a quantized one"
    norm = math.hypot(*(row["frobenius_norm"] for row in whole))
    return {
        "source": adapter.source,
        "format": adapter.format,
        "scale_source": adapter.scale_source,
        "notes": [*adapter.notes, *[lacks] * bool(unknown)],
        "num_layers": len(whole),
        "frobenius_norm": norm,
        "relative_norm": norm / math.hypot(*norms) if norms and None not in norms else None,
        "layers": rows,
        "rank_advice": {f"{100 * q:g}": rank_advice(rows, q) for q in sorted({*ENERGIES, energy})},
    }


def on_base(layers: Iterable[LayerSVD], adapter: Adapter, base: WeightFiles | None) -> Iterator[LayerSVD]:
    """The layers with ‖W0‖ by the base, where they have none and it has a weight of their name and shape."""
    models = all_models(adapter, base) if base else []
    model_of = {parameter: model for model in models for parameter in model.entries}
    for layer in layers:
        model = model_of.get(layer.parameter)
        weight = model.base_weight(layer.parameter) if model and layer.base_norm is None else None
        yield layer if weight is None else replace(layer, base_norm=float(torch.linalg.vector_norm(weight.double())))


def _row(layer: LayerSVD) -> Row:
    metrics = Spectrum().compute(layer)
    part, whole = _part_of(layer)
    return {
        "layer": layer.layer,
        "kind": layer.kind,
        "depth": layer.depth,
        "part": part,
        "part_of": whole,
        "shape": list(layer.shape),
        "rank": layer.rank,
        "scale": layer.scale,
        "scale_source": layer.scale_source,
        "precision": layer.precision,
        "base_norm": layer.base_norm,
        **{each["metric"]: _whole(each["metric"], each["value"]) for each in metrics},
        **{
            key: {each["metric"]: each[key] for each in metrics if each[key] is not None}
            for key in ("null", "null_std")
        },
        "singular_values": layer.svd.S.tolist(),
    }


def _part_of(layer: LayerSVD) -> tuple[str | None, str | None]:
    """`sBA` or `q`, and the layer that it is a part of; of a whole one nothing."""
    if fused := name_of_part(layer.parameter):
        return fused, fused_name(layer.parameter).removesuffix(".weight")
    part = layer.update.part if layer.update else None
    return part, layer.layer.removesuffix(f"[{part}]") if part else None


def _whole(metric: str, value: float | None) -> float | None:
    """A `rank_q` is a count."""
    return int(value) if metric.startswith("rank_") and value is not None else value


def rank_advice(rows: list[Row], energy: float) -> dict[str, Any]:
    """The smallest rank of each layer that keeps this share of its ‖ΔW‖², to be pasted into a PEFT configuration.

    `num_parameters` is what LoRA of these ranks would train, Σ k (M + N). Of a ΔW that is reported whole and in part
    (DoRA), the low-rank part counts; the parts of a fused one are no modules of PEFT's, and do not.
    """
    import numpy as np

    in_order = sorted(unfused(rows), key=lambda row: row["part"] is not None)
    named = {row["part_of"] or row["layer"]: row for row in in_order}
    ranks = {name: smallest_rank(np.array(row["singular_values"]), energy) for name, row in named.items()}
    usual, pattern = rank_pattern_for(dict(sorted(ranks.items())))
    count = sum(k * sum(named[name]["shape"]) for name, k in ranks.items())
    return {"energy": energy, "r": usual, "rank_pattern": pattern, "num_parameters": count}


def unfused(rows: list[Row]) -> list[Row]:
    """Without the parts of fused layers, which stand beside these."""
    return [row for row in rows if row["part"] in (None, DORA_PART)]


def current_parameters(rows: list[Row]) -> int | None:
    """What the factors hold now, Σ r (M + N); None where some ΔW is dense."""
    factored = [row for row in unfused(rows) if row["rank"] is not None]
    whole = {row["part_of"] or row["layer"] for row in factored} == {row["part_of"] or row["layer"] for row in rows}
    return sum(row["rank"] * sum(row["shape"]) for row in factored) if whole else None


def scale_text(found: dict[str, Any]) -> str:
    """`s = 2, from config`; a range where layers differ; what an assumption means."""
    scales = sorted({row["scale"] for row in found["layers"] if row["scale"] is not None})
    source = found["scale_source"]
    if source is None:
        return "none (ΔW is stored whole)"
    values = (
        f"s = {scales[0]:.4g}" if len(scales) == 1 else f"s from {scales[0]:.4g} to {scales[-1]:.4g}" if scales else "s"
    )
    words = {
        "config": "from the adapter's configuration",
        "file": "from the file itself",
        "--alpha": "from --alpha",
        "assumed": "ASSUMED, for the file keeps no alpha: norms are only as right as this guess (--alpha sets it)",
    }
    return f"{values}, {words.get(source, f'from {source}')}"


def by_kind(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of one kind of layer, in the order in which kinds first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["kind"], []).append(row)
    return groups


def largest_kinds(rows: list[Row], count: int) -> dict[str, list[Row]]:
    """Those of `by_kind` that hold the most of ‖ΔW‖²."""
    groups = by_kind(rows)
    sizes = {kind: sum(row["frobenius_norm"] ** 2 for row in group) for kind, group in groups.items()}
    return {kind: groups[kind] for kind in sorted(groups, key=lambda kind: -sizes[kind])[:count]}


def facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands at the top of the summary and of the page."""
    rows, relative = found["layers"], found["relative_norm"]
    share = f", {significant(100 * relative)}% of ‖W0‖" if relative is not None else ""
    return [
        ("format", found["format"]),
        ("scale", scale_text(found)),
        ("layers", f"{found['num_layers']} of {len(by_kind(unfused(rows)))} kinds, {ranks_text(rows)}"),
        ("‖ΔW‖", f"{plain(found['frobenius_norm'])}{share}"),
    ]


def ranks_text(rows: list[Row]) -> str:
    """`rank 8`, `ranks 4 to 8`, `dense`."""
    ranks = sorted({row["rank"] for row in rows if row["rank"] is not None})
    words = [] if not ranks else [f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"]
    return " and ".join([*words, *(["dense"] if any(row["rank"] is None for row in rows) else [])])


def significant(value: float, digits: int = 3) -> str:
    """So many digits, whole numbers in full: `3776`, not `3.78e+03`."""
    return f"{value:.0f}" if 10**digits - 0.5 <= abs(value) < 1e9 else f"{value:.{digits}g}"
