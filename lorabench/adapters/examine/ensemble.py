"""One subspace for many adapters: every layer that all have, beside chance and beside their mean adapter alone.

Shapes: M out features, N in features, d the width of a side, k directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorabench.adapters.examine.comparison import match_layers
from lorabench.analyses.factors import factor_cosine
from lorabench.config.decode import InputError
from lorabench.linalg.decompose import ThinSVD, one_thread
from lorabench.linalg.ensemble import explained, explained_by_chance, left_out, sampled
from lorabench.processes.machine import available_cores
from lorabench.updates.formats import Adapter, load_layer
from lorabench.updates.layer import LayerSVD

if TYPE_CHECKING:
    from lorabench.updates.readers._entry import Entry

Row = dict[str, Any]
Layers = list["Entry"]
SIDES = ("input", "output")


def compare_many(
    adapters: Sequence[Adapter],
    track: Callable[[Iterator[list[Row]], int], Iterable[list[Row]]] = lambda rows, _: rows,
) -> dict[str, Any]:
    """What `lorabench compare A B C ... --json` prints.

    `layers` has two rows for each layer that all adapters have in one shape, of its `input` and its `output` side:
    `explained` and `explained_chance` (k = 1, 2, …), and, of adapters that are left out in turn, the means that
    `linalg.ensemble.LeftOut` defines, at `k` directions: as many as one adapter has (of a dense ΔW its top 64 stand for
    it). Memory holds one layer of all adapters a core. Raises InputError for fewer than two adapters, where none has a
    layer in common, and for damage.
    """
    if len(adapters) < 2:
        raise InputError(f"ADAPTER = {adapters[0].source if adapters else ''}: needs another to be compared with")
    common, missing = common_layers(adapters)
    if not common:
        raise InputError(f"ADAPTER: no layer that all {len(adapters)} have in one shape: {', '.join(missing[:3])} …")
    with one_thread(), ThreadPoolExecutor(available_cores()) as pool:
        found = [*track(pool.map(_rows, common.values()), len(common))]
    rows = [row for each in found for row in each]
    return {
        "adapters": [
            {"source": each.source, "format": each.format, "num_layers": each.num_layers} for each in adapters
        ],
        "not_in_all": missing,
        "unchanged": [layer for layer, each in zip(common, found, strict=True) if not each],
        "layers": rows,
    }


def common_layers(adapters: Sequence[Adapter]) -> tuple[dict[str, Layers], list[str]]:
    """The first adapter's layers -> that of each, where all have it in one shape; and its other ones."""
    first = adapters[0]
    found = {name: [entry] for name, entry in first.entries.items()}
    for other in adapters[1:]:
        for name, theirs in match_layers(list(first.entries), list(other.entries)).pairs:
            if other.entries[theirs].shape == first.entries[name].shape:
                found[name].append(other.entries[theirs])
    common = {name: entries for name, entries in found.items() if len(entries) == len(adapters)}
    return common, [name for name in found if name not in common]


def _rows(entries: Layers) -> list[Row]:
    """Of one layer; empty where fewer than two adapters have changed it."""
    layers = [_light(load_layer(entry)) for entry in entries]
    layers = [layer for layer in layers if layer.svd.numerical_rank]
    if len(layers) < 2:
        return []
    some = [layers[place] for place in sampled([layer.svd.U.shape[1] for layer in layers])]
    k = max(layer.svd.U.shape[1] for layer in some)
    tests = left_out([layer.svd for layer in some], k)
    first, rows = layers[0], []
    values = [layer.svd.S[: layer.svd.U.shape[1]] / layer.svd.S.norm() for layer in layers]
    chance = {d: explained_by_chance(d, values).tolist() for d in set(first.shape)}
    for side in SIDES:
        d = first.shape[side == "input"]
        frames = [layer.svd.Vh.mT if side == "input" else layer.svd.U for layer in layers]
        test = tests[side]
        rows.append(
            {
                "layer": first.layer,
                "kind": first.kind,
                "depth": first.depth,
                "side": side,
                "width": d,
                "num_adapters": len(layers),
                "explained": explained(frames, values).tolist(),
                "explained_chance": chance[d],
                "num_left_out": len(some),
                "k": k,
                "left_out": test.shared,
                "mean_directions": test.mean_directions,
                "beyond_mean": test.beyond_mean,
                "chance": min(1.0, k / d),
                "mean_adapter": test.mean,
                "mean_adapter_chance": 1 / (first.shape[0] * first.shape[1]),
                "factor_cosine": factor_cosine(some, side),
            }
        )
    return rows


def _light(layer: LayerSVD) -> LayerSVD:
    """With the meaningful directions alone; of factors they are all that is kept."""
    svd, rank = layer.svd, layer.svd.numerical_rank
    return replace(layer, svd=ThinSVD(U=svd.U[:, :rank], S=svd.S, Vh=svd.Vh[:rank]))
