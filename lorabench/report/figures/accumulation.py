"""Intruder dimensions after each snapshot, or each task of a sequence, beside random directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.report.update_metrics import metric_rows, per_run
from lorabench.spec.figure import Axes, Canvas, Figure, Frame

GREY = "#CCCCCC"
PANELS = {"num_intruders": "Intruders in\n{}", "num_new": "New since the\nsnapshot before"}
"""Metric of the analysis `accumulation` -> label of its axis."""


@dataclass(frozen=True, kw_only=True)
class AccumulationCurves(Figure):
    """A panel a metric, a look a setting; counts are summed over the matrices that all runs have."""

    section: ClassVar[str] = "base"
    needs: ClassVar[str] = "runs with a ΔW and its W0 that kept snapshots (`snapshot_every`)"
    most: ClassVar[int] = 8

    def draw(self, results: Any) -> Canvas | None:
        import pandas as pd

        from lorabench.report import drawing
        from lorabench.report.figures._curves import draw_lines, settings
        from lorabench.report.results import shared

        counts = metric_rows(results, f"accumulation.{next(iter(PANELS))}")
        if counts.empty:
            return None
        rows = {metric: shared(metric_rows(results, f"accumulation.{metric}")) for metric in PANELS}
        matrices = rows["num_intruders"].groupby("run_id")["layer"].nunique()
        which = f"{matrices.max()} matrices" if matrices.nunique() == 1 else "its own matrices"
        sums = [per_run(results, part, ["step"], "sum").assign(metric=metric) for metric, part in rows.items()]
        found, looks = settings(results, pd.concat(sums), self.most)
        tasks = _tasks(results.runs.loc[found.index.unique()])
        with drawing.facets(PANELS, self.width, height=2.3, sharey=False) as grid:
            for metric, axes in grid.axes_dict.items():
                own = found[found["metric"] == metric]
                draw_lines(axes, own, looks, "step", within=(0, float("inf")))
                axes.set(title="", ylabel=PANELS[metric].format(which), ylim=(0, max(1.0, axes.get_ylim()[1])))
                drawing.whole_numbers(axes.yaxis)
                _mark_tasks(axes, tasks)
            grid.set_xlabels("After training on" if tasks else "Step")
            drawing.legend_below(grid.figure, looks, "random directions")
        return grid.figure

    def caption(self) -> str:
        return (
            "Intruder dimensions (of the top 10 left singular vectors of W0 + ΔW of a matrix, those of which |cos| "
            "with every one of W0 is below 0.5: Shuttleworth et al. 2024) after each snapshot, summed over the "
            "matrices that all runs have (where there is none: each run's own), and those of them that are like none "
            "of the top 32 directions of the snapshot before. Means over seeds. Dashed: the same singular values of "
            "ΔW in random directions. W0 itself has none."
        )


EXAMPLE = AccumulationCurves()


def _tasks(runs: Frame) -> dict[int, str]:
    """Step after which a task ends -> its name, where all runs go through tasks in as many steps each; of different
    tasks their number."""
    if "tasks" not in runs or not runs["tasks"].notna().all() or runs["steps"].nunique() > 1:
        return {}
    sequences, steps = [tasks.split(" > ") for tasks in dict.fromkeys(runs["tasks"])], int(runs["steps"].iloc[0])
    longest = max(sequences, key=len)
    names = longest if len(sequences) == 1 else [f"task {number}" for number in range(1, len(longest) + 1)]
    return {steps * number: name for number, name in enumerate(names, 1)}


def _mark_tasks(axes: Axes, tasks: dict[int, str]) -> None:
    """A line at the end of each task, and its name."""
    if tasks:
        axes.set_xticks([*tasks], [*tasks.values()], rotation=20, ha="right")
    for end in tasks:
        axes.axvline(end, color=GREY, linewidth=0.6, zorder=1)
