"""Training curves: loss, gradient norm, learning rate and periodic evaluations over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.spec.figure import Canvas, Figure, Frame

MOST_POINTS = 30
"""Of one curve: each is the mean over so many steps that there are no more."""
POSITIVE = (0.0, float("inf"))
PANELS = {
    "loss": ("Training loss", True),
    "reward": ("Mean reward", True),
    "grad_norm": ("Gradient norm", False),
    "step_lr": ("Learning rate", False),
}
"""Column of the step logs -> what it is called, and whether it is smoothed as where runs are found to be unstable."""


@dataclass(frozen=True, kw_only=True)
class Curves(Figure):
    """A panel a number of the step logs, a look a setting."""

    section: ClassVar[str] = "training"
    needs: ClassVar[str] = "runs that are done, with the log of their steps"
    always: ClassVar[bool] = True
    most: ClassVar[int] = 8

    value: str | None = None
    """The measure of validation whose periodic evaluations are drawn; None: the one that settings are compared by."""

    def draw(self, results: Any) -> Canvas | None:
        from lorabench.report import drawing
        from lorabench.report.figures._curves import SERIES, draw_lines, settings

        runs = results.selection.done
        steps = results.steps[results.steps["run_id"].isin(runs.index)]
        if steps.empty:
            return None
        shown, looks = settings(results, runs.loc[runs.index.isin(steps["run_id"])], self.most)
        shown = shown.loc[:, [SERIES, "seed", *(name for name in ("unstable",) if name in shown)]]
        steps = steps[steps["run_id"].isin(shown.index)].astype({"run_id": str})
        panels = _panels(results, steps, self.value or f"valid_{results.quality}")
        with drawing.facets(panels, self.width, sharey=False) as grid:
            for title, axes in grid.axes_dict.items():
                rows, within = panels[title]
                draw_lines(axes, rows.join(shown, on="run_id"), looks, "step", within=within)
                axes.set(title="", ylabel=title)
                drawing.limit([axes])
            grid.set_xlabels("Step")
            drawing.legend_below(grid.figure, {label + _mark(shown, label): look for label, look in looks.items()})
        return grid.figure

    def caption(self) -> str:
        return (
            "Training over its steps, of the runs that are done: means over seeds. What is trained on is smoothed: the "
            f"mean over a tenth of the steps; all else are means over as many as leave at most {MOST_POINTS} points. "
            "Gradient norm: before clipping. Evaluations are single points, the untouched base at step 0."
        )


EXAMPLE = Curves()


def _panels(results: Any, steps: Frame, value: str) -> dict[str, tuple[Frame, tuple[float, float]]]:
    """Title -> a row a run and point, `run_id`, `step` and `value`; and within which bounds its intervals stay."""
    from lorabench.report.aggregate import FREE, bounds
    from lorabench.report.update_metrics import axis_label
    from lorabench.training.stability import WINDOWS

    present = {name: panel for name, panel in PANELS.items() if name in steps and steps[name].notna().any()}
    smooth = [name for name, (_, is_smooth) in present.items() if is_smooth]
    width = -(-int(results.runs["steps"].min()) // WINDOWS)
    means = steps.groupby("run_id")[smooth].rolling(width).mean().droplevel(0)
    apart = -(-int(steps["step"].max()) // MOST_POINTS)
    groups = steps.assign(point=-(-steps["step"] // apart), **means).groupby(["run_id", "point"], as_index=False)
    found = {
        title: (groups.agg(step=("step", "mean"), value=(name, "mean")), FREE if name == "loss" else POSITIVE)
        for name, (title, _) in present.items()
    }
    evaluated = _evaluations(results, steps, value)
    return found | ({axis_label(value): (evaluated, bounds(value))} if len(evaluated) else {})


def _evaluations(results: Any, steps: Frame, value: str) -> Frame:
    """What the periodic evaluations of a measure gave, with the base's and that at the end, as it is shown."""
    import pandas as pd

    from lorabench.report.labels import shown_factor

    if value not in steps or steps[value].isna().all():
        return steps.iloc[:0]
    inner = steps[["run_id", "step", value]].dropna().rename(columns={value: "value"})
    ends = [inner]
    if not results.sequences:  # whose last task alone has those in its record
        last = steps.groupby("run_id")["step"].max()
        runs = results.runs.loc[last.index]
        for name, at in ((f"base_{value}", 0), (value, last.to_numpy())):
            if name in runs:
                ends.append(pd.DataFrame({"run_id": runs.index, "step": at, "value": runs[name].to_numpy()}))
    found = pd.concat(ends).dropna()
    return found.assign(value=shown_factor(value) * found["value"].astype(float))


def _mark(shown: Frame, label: str) -> str:
    """` (unstable 1/3)`, of a setting with runs whose training was."""
    from lorabench.report.figures._curves import SERIES

    own = shown[shown[SERIES] == label]
    count = int(own["unstable"].sum()) if "unstable" in own else 0
    return f" (unstable {count}/{len(own)})" if count else ""
