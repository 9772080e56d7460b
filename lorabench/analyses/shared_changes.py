"""Whether two runs change the same weights, as bfloat16 stores them, beside a random update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorabench.spec.analysis import Analysis

if TYPE_CHECKING:
    from lorabench.updates.base import Tuned


@dataclass(frozen=True, kw_only=True)
class SharedChanges(Analysis):
    """Rows {metric, value, null, null_std}, of the weights that each run changes (see `sparsity`).

    Shares of one set that lie in the other (Mukherjee et al. 2025, arXiv 2505.11711, the overlap of subnetworks).
    `null`: random updates on the same W0 in the place of the other one, mean and standard deviation over the draws of
    `Tuned.nulls`; it is above `expected`, which the paper takes for chance and which so has none itself, since
    rounding lets the smallest weights change first in any update. Of the largest entries chance is 0.3, their share,
    whatever W0 is; its standard deviation is that of the draws. Without changes there is no row.
    """

    needs: ClassVar[Literal["base_pair"]] = "base_pair"
    version: ClassVar[int] = 3
    max_pairs: ClassVar[int] = 256
    metrics: ClassVar[dict[str, str]] = {
        "changed_a_in_b": "share of the weights that run a changes in bfloat16 that run b changes too",
        "changed_b_in_a": "share of the weights that run b changes that run a changes too",
        "expected_a_in_b": "share of all weights that run b changes: changed_a_in_b, were the sets independent",
        "expected_b_in_a": "share of all weights that run a changes",
        "largest": "share of the 30% largest entries of ΔW_a that are among the 30% largest of ΔW_b",
    }

    def compute(self, *layers: Tuned) -> list[dict[str, Any]]:
        from lorabench.linalg.nulls import over_draws
        from lorabench.updates.stored import count

        a, b = layers
        rows: list[tuple[str, float, Any, Any]] = []
        for name, one, other in (("a_in_b", a, b), ("b_in_a", b, a)):
            mine = one.seen.changed
            if size := count(mine):
                null = over_draws([count(mine, each.seen.changed) / size for each in other.nulls])
                rows.append((f"changed_{name}", count(mine, other.seen.changed) / size, *null))
                rows.append((f"expected_{name}", other.seen.share_changed, None, None))
        if size := count(a.seen.largest):
            chance = count(b.seen.largest) / b.seen.num_entries
            _, std = over_draws([count(a.seen.largest, each.seen.largest) / size for each in b.nulls])
            rows.append(("largest", count(a.seen.largest, b.seen.largest) / size, chance, std))
        return [dict(zip(("metric", "value", "null", "null_std"), row, strict=True)) for row in rows]


EXAMPLE = SharedChanges()
