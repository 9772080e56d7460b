"""How far two adapters changed the same directions: every layer that both have, beside chance, one in memory at a time.

Shapes: d the width of a side, p and q the meaningful directions of A's and B's ΔW.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabench.analyses.overlap import energy_share
from lorabench.analyses.subspace import MAX_DIRECTIONS, directions
from lorabench.linalg.decompose import grassmann_distance, one_thread, principal_angles, subspace_similarity
from lorabench.linalg.nulls import angle_chance, energy_chance, similarity_chance
from lorabench.linalg.permutation import corrected, permutation_p_value
from lorabench.updates.formats import Adapter, load_layer
from lorabench.updates.layer import LayerSVD
from lorabench.updates.other_names import diffusers_name
from lorabench.updates.weightfile import flat_name

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]
Names = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Parameters of A with their counterparts in B, and those that have none; `notes` where names differ."""

    pairs: list[Names]
    only_a: list[str]
    only_b: list[str]
    notes: list[str] = field(default_factory=list)


def compare_adapters(
    a: Adapter, b: Adapter, track: Callable[[Iterator[Names], int], Iterable[Names]] = lambda pairs, _: pairs
) -> dict[str, Any]:
    """What `lorabench compare --json` prints.

    `layers` has two rows for each layer that both have, of its `input` and its `output` side: `phi` and `chance`
    (min(p, 64), min(q, 64)), angles and distances of the same directions, energy shares of all p and q. `_chance` is
    what random subspaces give on average, `_chance_std` its standard deviation; where `_chance` is simulated,
    `_chance_error` is the standard error of that mean. `p_value_corrected` is over all rows. Raises InputError where a
    file is damaged.
    """
    matches = match_layers(list(a.entries), list(b.entries))
    shapes = {names: (a.entries[names[0]].shape, b.entries[names[1]].shape) for names in matches.pairs}
    alike = [names for names, (first, second) in shapes.items() if first == second]
    rows, unchanged = [], []
    for name_a, name_b in track(iter(alike), len(alike)):
        layers = load_layer(a.entries[name_a]), load_layer(b.entries[name_b])
        with one_thread():
            found = [_row(layers, side, U, V) for side, U, V in directions(*layers, limit=None)]
        rows += found
        if not found:
            unchanged.append(layers[0].layer)
    tests = corrected([row["p_value"] for row in rows])
    return {
        "a": _about(a),
        "b": _about(b),
        "notes": [*matches.notes, *_scale_notes(a, b)],
        "only_a": matches.only_a,
        "only_b": matches.only_b,
        "different_shapes": [
            {"layer": names[0], "a": list(pair[0]), "b": list(pair[1])}
            for names, pair in shapes.items()
            if pair[0] != pair[1]
        ],
        "unchanged": unchanged,
        "layers": [row | {"p_value_corrected": float(p)} for row, p in zip(rows, tests, strict=True)],
    }


def _about(adapter: Adapter) -> dict[str, Any]:
    return {
        "source": adapter.source,
        "format": adapter.format,
        "scale_source": adapter.scale_source,
        "notes": list(adapter.notes),
        "num_layers": adapter.num_layers,
    }


def _scale_notes(a: Adapter, b: Adapter) -> list[str]:
    assumed = " and ".join(name for name, adapter in (("A", a), ("B", b)) if adapter.scale_source == "assumed")
    return [f"The scale of {assumed} is assumed; nothing here depends on it."] if assumed else []


def _row(layers: tuple[LayerSVD, LayerSVD], side: str, U: Tensor, V: Tensor) -> Row:
    """`U` (d, p) and `V` (d, q) as `subspace.directions` gives them."""
    a, b = layers
    (d, p), q = U.shape, V.shape[1]
    top_a, top_b = U[:, :MAX_DIRECTIONS], V[:, :MAX_DIRECTIONS]
    chance, chance_std = similarity_chance(top_a.shape[1], top_b.shape[1], d)
    angles = principal_angles(top_a, top_b)
    angle, distance = angle_chance(*sorted((top_a.shape[1], top_b.shape[1])), d)
    in_b, in_a = (energy_chance(layer.svd.S.numpy(), count, d) for layer, count in ((a, q), (b, p)))
    return {
        "layer": a.layer,
        "layer_b": b.layer,
        "kind": a.kind,
        "depth": a.depth,
        "side": side,
        "width": d,
        "dim_a": p,
        "dim_b": q,
        "phi": subspace_similarity(top_a, top_b).tolist(),
        "chance": chance.tolist(),
        "chance_std": chance_std.tolist(),
        "p_value": permutation_p_value(top_a, top_b),
        "principal_angles_radians": angles.tolist(),
        "principal_angles_chance": angle.mean.tolist(),
        "principal_angles_chance_std": angle.std.tolist(),
        "principal_angles_chance_error": angle.error.tolist(),
        "grassmann": grassmann_distance(angles),
        "grassmann_chance": float(distance.mean),
        "grassmann_chance_std": float(distance.std),
        "grassmann_chance_error": float(distance.error),
        "energy_of_a_in_b": energy_share(a, side, V),
        "energy_of_b_in_a": energy_share(b, side, U),
        "energy_chance": {"a_in_b": in_b[0], "b_in_a": in_a[0]},
        "energy_chance_std": {"a_in_b": in_b[1], "b_in_a": in_a[1]},
    }


def match_layers(names_a: list[str], names_b: list[str]) -> Matches:
    """By equal names; then where one is the other's ending (`model.` before it or not), the longest and only one; then
    the same without `language_model.`, which stands in names of a text model that is a part of another; then those of a
    denoiser whatever the file calls it, and with `_` for `.`, as kohya's files have it."""
    same = {*names_a} & {*names_b}
    rest_a, rest_b = ([name for name in names if name not in same] for names in (names_a, names_b))
    pairs = _nearest(rest_a, rest_b)
    matched_a, matched_b = {a for a, _ in pairs}, {b for _, b in pairs}
    inner = [_without_part(names, matched) for names, matched in ((rest_a, matched_a), (rest_b, matched_b))]
    parts = [(name, name) for name in inner[0] if name in inner[1]] or _nearest([*inner[0]], [*inner[1]])
    parts = [(inner[0][a], inner[1][b]) for a, b in parts]
    matched_a, matched_b = matched_a | {a for a, _ in parts}, matched_b | {b for _, b in parts}
    flat = [_by_flat_name(names, matched) for names, matched in ((rest_a, matched_a), (rest_b, matched_b))]
    kohya = [(name, flat[1][key]) for key, name in flat[0].items() if key in flat[1]]
    matched_a, matched_b = matched_a | {a for a, _ in kohya}, matched_b | {b for _, b in kohya}
    counted = ((_PART_NOTE, parts), (_FLAT_NOTE, kohya))
    return Matches(
        pairs=[(name, name) for name in names_a if name in same] + pairs + parts + kohya,
        only_a=[name for name in rest_a if name not in matched_a],
        only_b=[name for name in rest_b if name not in matched_b],
        notes=[*_prefix_notes(pairs), *(note.format(len(found)) for note, found in counted if found)],
    )


_PART = "language_model."
_PART_NOTE = f"{{}} layers are matched without the `{_PART}` in their names."


_FLAT_NOTE = "{} layers are matched by the denoiser's own names of them, which one of the files writes otherwise."
_OF_PIPELINE = re.compile(r"^(unet|transformer)\.")


def _by_flat_name(names: list[str], matched: set[str]) -> dict[str, str]:
    """What kohya's files call a layer, without their prefix -> name, of those that are not matched yet."""
    found: dict[str, list[str]] = {}
    for name in names:
        if name not in matched:
            own = diffusers_name(name) or name
            flat = flat_name(own) or _OF_PIPELINE.sub("", own).removesuffix(".weight")
            found.setdefault(flat.replace(".", "_"), []).append(name)
    return {flat: alike[0] for flat, alike in found.items() if len(alike) == 1}


def _nearest(names_a: list[str], names_b: list[str]) -> list[Names]:
    """Pairs that are each other's longest."""
    near = _by_ending(names_a, names_b)
    chosen_a, chosen_b = (_longest(near, side) for side in (0, 1))
    return [(a, b) for a, b in chosen_a.items() if chosen_b.get(b) == a]


def _without_part(names: list[str], matched: set[str]) -> dict[str, str]:
    """Name without `language_model.` -> name, of those that are not matched yet."""
    return {name.replace(_PART, "", 1): name for name in names if name not in matched}


def _prefix_notes(pairs: list[Names]) -> list[str]:
    left_off: Counter[Names] = Counter()
    for a, b in pairs:
        who, longer = ("A", a) if len(a) > len(b) else ("B", b)
        left_off[who, longer[: abs(len(a) - len(b))]] += 1
    return [
        f"{count} layers are matched without the `{prefix}` that only {who}'s names begin with."
        for (who, prefix), count in left_off.items()
    ]


def _by_ending(names_a: list[str], names_b: list[str]) -> list[Names]:
    """All pairs of which one is the other's ending after a dot."""
    in_a, in_b = {*names_a}, {*names_b}
    found = [(a, ending) for a in names_a for ending in _endings(a) if ending in in_b]
    return found + [(ending, b) for b in names_b for ending in _endings(b) if ending in in_a]


def _endings(name: str) -> Iterator[str]:
    """`a.b.weight` -> `b.weight`: an ending of a parameter's name that names a module."""
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(1, len(parts) - name.endswith(".weight")))


def _longest(pairs: list[Names], side: int) -> dict[str, str]:
    """Name -> its partner of the longest shared ending, where there is only one such."""
    lengths: dict[str, dict[str, int]] = defaultdict(dict)
    for pair in pairs:
        lengths[pair[side]][pair[1 - side]] = min(map(len, pair))
    best = {name: [b for b, size in found.items() if size == max(found.values())] for name, found in lengths.items()}
    return {name: partners[0] for name, partners in best.items() if len(partners) == 1}


def mean_grid(rows: list[Row], key: str = "phi") -> np.ndarray:
    """(largest p, largest q), at most 64 each: the mean of a grid over the layers that reach so far; NaN where none."""
    grids = [np.array(row[key]) for row in rows]
    total = np.zeros([max(sizes) for sizes in zip(*(grid.shape for grid in grids), strict=True)])
    counts = np.zeros(total.shape)
    for grid in grids:
        total[: grid.shape[0], : grid.shape[1]] += grid
        counts[: grid.shape[0], : grid.shape[1]] += 1
    with np.errstate(invalid="ignore"):
        return total / counts
