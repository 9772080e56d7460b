"""How ΔW grows over training: the metrics of each snapshot, and how near its subspace is to the final one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.analyses.spectrum import Spectrum
from lorabench.analyses.subspace import MAX_DIRECTIONS, directions
from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.updates.layer import LayerSVD

SETTLED_SIMILARITY = 0.9
RISEN_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Dynamics(Analysis):
    """Rows {step, metric, value, null, null_std} of each snapshot and of the end, then of milestones, with no step.

    Metrics and nulls of `spectrum`. `phi_*` is φ(k, k) of `subspace` with k directions that hold 90% of the final
    energy, at most 64; of fewer, p, that a ΔW has, φ(p, k). Null: chance. Both sides of a zero ΔW are left out.

    Milestones are known to the step of a snapshot: what they tell came about after the one before. They are None
    where ΔW ends at zero.
    """

    needs: ClassVar[Literal["trajectory"]] = "trajectory"
    version: ClassVar[int] = 2
    metrics: ClassVar[dict[str, str]] = Spectrum.metrics | {
        "phi_final_input": "similarity of the input directions with the final ones, in [0, 1]",
        "phi_final_output": "similarity of the output directions with the final ones, in [0, 1]",
        "phi_previous_input": "similarity of the input directions with those of the snapshot before, in [0, 1]",
        "phi_previous_output": "similarity of the output directions with those of the snapshot before, in [0, 1]",
        "norm_share": "Frobenius norm over the final one's",
        "cosine_final": "⟨ΔW, final ΔW⟩ over the product of their norms, in [-1, 1]; 0 by chance",
        "settled_step": "first snapshot from which on phi_final_input is never below 0.9",
        "settled_step_output": "first snapshot from which on phi_final_output is never below 0.9",
        "rank_rise_step": "first snapshot from which on effective_rank_entropy is never below 90% of its final value",
    }
    per_layer: ClassVar[dict[str, str]] = dict.fromkeys(
        ("settled_step", "settled_step_output", "rank_rise_step"), "steps"
    )

    def compute(self, *layers: LayerSVD) -> list[dict[str, Any]]:
        final, rows = layers[-1], []
        k = _num_directions(final)
        for before, layer in zip([None, *layers], layers, strict=False):
            found = [*Spectrum().compute(layer), *_similarities(layer, final, k, "final")]
            if before is not None:
                found += _similarities(layer, before, k, "previous")
            rows += [{"step": layer.step} | row for row in [*found, *_beside(layer, final)]]
        return rows + [{"step": None} | _row(key, value) for key, value in _milestones(rows)]


def inner_product(a: LayerSVD, b: LayerSVD) -> float | None:
    """⟨ΔW_a, ΔW_b⟩_F without forming them; None where only some singular vectors were kept."""
    from lorabench.linalg import decompose

    first, second = _factors(a), _factors(b)
    return decompose.inner_product(*first, *second) if first and second else None


def first_lasting(values: Sequence[tuple[int, float | None]], level: float) -> int | None:
    """The first step from which on no value, by step, is below `level` or missing; None where the last one is."""
    found = None
    for step, value in reversed(values):
        if value is None or value < level:
            break
        found = step
    return found


def _num_directions(final: LayerSVD) -> int:
    """How many hold 90% of the energy, at most MAX_DIRECTIONS; 0 for a zero ΔW."""
    from lorabench.linalg.decompose import rank_energies

    S = final.svd.S
    return min(int(rank_energies((S / S[0]).square().numpy())["rank_90"] or 0), MAX_DIRECTIONS) if S.any() else 0


def _similarities(layer: LayerSVD, other: LayerSVD, k: int, name: str) -> Iterator[dict[str, Any]]:
    from lorabench.linalg.decompose import subspace_similarity
    from lorabench.linalg.nulls import similarity_chance

    for side, a, b in directions(layer, other) if k else ():
        mine, theirs = a[:, :k], b[:, :k]
        phi = subspace_similarity(mine, theirs)[-1, -1]
        chance = (float(grid[-1, -1]) for grid in similarity_chance(mine.shape[1], theirs.shape[1], len(a)))
        yield _row(f"phi_{name}_{side}", float(phi), *chance)


def _beside(layer: LayerSVD, final: LayerSVD) -> Iterator[dict[str, Any]]:
    """The size and the direction of all of ΔW beside the final one's."""
    norm, end = float(layer.svd.S.norm()), float(final.svd.S.norm())
    yield _row("norm_share", norm / end if end else None)
    product = inner_product(layer, final) if norm and end else None
    cosine = None if product is None else max(-1.0, min(1.0, product / (norm * end)))
    M, N = layer.shape
    yield _row("cosine_final", cosine, 0.0, (M * N) ** -0.5)


def _row(metric: str, value: float | None, null: float | None = None, null_std: float | None = None) -> dict[str, Any]:
    return {"metric": metric, "value": value, "null": null, "null_std": null_std}


def _factors(layer: LayerSVD) -> tuple[Tensor, Tensor | None] | None:
    if layer.update is not None:
        return layer.update.B, layer.update.A
    if not layer.is_complete:
        return None
    return layer.svd.U * layer.svd.S[: layer.svd.U.shape[1]], layer.svd.Vh


def _milestones(rows: list[dict[str, Any]]) -> Iterator[tuple[str, int | None]]:
    steps = list(dict.fromkeys(row["step"] for row in rows))
    values = {(row["metric"], row["step"]): row["value"] for row in rows}
    at = {metric: [(step, values.get((metric, step))) for step in steps]
          for metric in ("phi_final_input", "phi_final_output", "effective_rank_entropy")}  # fmt: skip
    yield "settled_step", first_lasting(at["phi_final_input"], SETTLED_SIMILARITY)
    yield "settled_step_output", first_lasting(at["phi_final_output"], SETTLED_SIMILARITY)
    _, risen = at["effective_rank_entropy"][-1]
    yield "rank_rise_step", first_lasting(at["effective_rank_entropy"], RISEN_SHARE * (risen or 0.0))


EXAMPLE = Dynamics()
