"""What interventions have shown: means over the runs of a setting, as a table and as a figure, and a correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorabench.adapters.intervention.directions import INTRUDERS, KINDS
from lorabench.adapters.intervention.intervene import BASE, TUNED, Intervention
from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.report.aggregate import Cell, interval, number, plain, value_text
from lorabench.report.labels import capitalized, key_label, measure, measure_label, shown_factor, value_label
from lorabench.report.page import Part, drawn
from lorabench.spec.run_spec import brief, canonical_json, flatten, swept_keys
from lorabench.terminal.text import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("valid_loss", "valid_accuracy", "retain_loss", "forgetting")
CHANGES = {name: f"{name}_change" for name in ("valid_loss", "valid_accuracy", "forgetting")}
"""What is also given as a change relative to λ = 1, in %, as the paper does; None where it is not above 0 there."""
FEWEST = 5
"""Settings for a rank correlation: of four the smallest p is 1/12."""
FAR = 0.01
"""Relative difference of λ = 1 from the run's own record of which the table speaks: float32 is not the run's dtype."""
UNCHANGED = Cell(mean=0.0, half=0.0, n=1, num_seeds=1, num_runs=1)
"""λ = 1 in the figure, by definition."""
ABOUT = (
    "λ scales the singular values of all intruders, of as many other directions (control), or changes the weights",
    "by as much in random directions; means ± 95% intervals over runs, Δ: change relative to λ = 1",
)
CAPTION = (
    "Change of the task's loss and of forgetting with λ, relative to λ = 1; hollow: runs are too few for an interval."
)
FIGURE_SUFFIXES = (".pdf", ".png")

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of directions at one λ, over the runs of a setting: cells by the names in SHOWN and CHANGES."""

    setting: str
    scaled: str
    scale: float | None
    num_directions: float | None
    """Mean over the runs."""
    cells: dict[str, Cell]

    def to_json(self) -> dict[str, Any]:
        about = {"setting": self.setting, "scaled": self.scaled, "lambda": self.scale}
        cells = {name: {"mean": cell.mean, "half": cell.half, "n": cell.n} for name, cell in self.cells.items()}
        return about | {"num_directions": self.num_directions} | cells


def make_rows(records: Sequence[Record], wanted: Intervention) -> list[Row]:
    """The settings in their order, and of each the base, λ = 1 and every wanted λ of every kind."""
    groups = by_setting(records)
    rows = []
    for setting, group in groups.items():
        points = {(point["scaled"], point["lambda"]): None for record in group for point in wanted.points(record)}
        rows += [_row(setting, group, scaled, scale) for scaled, scale in points]
    return rows


def by_setting(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of runs that differ in nothing but the seed, by what sets them apart from the others."""
    flats = [{k: v for k, v in flatten(record["spec"]).items() if k != "seed"} for record in records]
    differing = swept_keys(flats)
    groups: dict[bytes, tuple[str, list[Record]]] = {}
    for flat, record in zip(flats, records, strict=True):
        words = [f"{key_label(k)} {value_label(brief(flat[k]))}" for k in differing if flat.get(k) is not None]
        key = canonical_json({k: v for k, v in record["spec"].items() if k != "seed"})
        groups.setdefault(key, (", ".join([str(flat["method.name"]), *words]), []))[1].append(record)
    return dict(groups.values())


def _row(setting: str, group: list[Record], scaled: str, scale: float | None) -> Row:
    """Runs without such directions have no such point, and are not counted."""
    having = [record for record in group if scaled in (BASE, TUNED) or record[f"num_{scaled}"]]
    pairs = [(_point(record, scaled, scale), _point(record, TUNED, 1.0)) for record in having]
    numbers = [record[f"num_{scaled}"] for record in having] if scaled in KINDS else []
    cells = {}
    for name in (name for name in SHOWN if all(name in point for pair in pairs for point in pair)):
        factor = shown_factor(name)
        cells[name] = _cell([factor * point[name] for point, _ in pairs])
        if name in CHANGES and scaled in KINDS:
            cells[CHANGES[name]] = _cell([_change(point[name], tuned[name]) for point, tuned in pairs])
    count = sum(numbers) / len(numbers) if numbers else None
    return Row(setting=setting, scaled=scaled, scale=scale, num_directions=count, cells=cells)


def _point(record: Record, scaled: str, scale: float | None) -> dict[str, Any]:
    return next(p for p in record["points"] if p["scaled"] == scaled and p["lambda"] == scale)


def _change(value: float, tuned: float) -> float | None:
    """In %, relative to λ = 1."""
    return 100 * (value - tuned) / tuned if tuned > 0 and math.isfinite(tuned) else None


def _cell(values: list[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    mean, half = interval(known) if len(known) == len(values) else (None, None)
    return Cell(mean=mean, half=half, n=len(known), num_seeds=len(known), num_runs=len(values))


def correlation(records: Sequence[Record]) -> dict[str, Any]:
    """Spearman's ρ of the number of intruders with forgetting, or `why_not` (the paper: 0.971 on RoBERTa).

    Over the settings' means: seeds of one setting are no evidence of their own.
    """
    from scipy.stats import spearmanr

    having = [record for record in records if "forgetting" in _point(record, TUNED, 1.0)]
    groups = by_setting(having).values()
    numbers = [fmean(record["num_intruders"] for record in group) for group in groups]
    forgetting = [fmean(_point(record, TUNED, 1.0)["forgetting"] for record in group) for group in groups]
    found: dict[str, Any] = {"num_settings": len(numbers), "num_runs": len(having)}
    found |= {"rho": None, "p": None, "why_not": None}
    if len(numbers) < FEWEST:
        lacking = "" if len(having) == len(records) else " with a retention set (task.retain)"
        return found | {"why_not": f"needs at least {FEWEST} settings{lacking}, and has {len(numbers)}"}
    if len(set(numbers)) == 1 or len(set(forgetting)) == 1:
        same = f"number of intruders ({numbers[0]:g})" if len(set(numbers)) == 1 else "forgetting"
        return found | {"why_not": f"is not defined, for all {len(numbers)} settings have the same {same}"}
    rho, p = spearmanr(numbers, forgetting)
    return found | {"rho": float(rho), "p": float(p)}


def intervention_text(records: Sequence[Record], rows: Sequence[Row]) -> str:
    """Settings, kinds and λ by measures, and what the correlation is."""
    return "\n".join([*ABOUT, _table(rows).text, *_remarks(records)])


def intervention_part(records: Sequence[Record], rows: Sequence[Row]) -> Part:
    """A page's section: the same, with the figure where there is one."""
    top, epsilon = (records[0]["key"][name] for name in ("top", "epsilon"))
    figure = _figure(rows)
    return Part(
        title=f"Interventions on intruders (top {top}, ε = {epsilon:g})",
        text=f"{' '.join(ABOUT)}.",
        tables=[_table(rows)],
        figures=[drawn("interventions", CAPTION, figure)] if figure else [],
        notes=_remarks(records),
    )


def _table(rows: Sequence[Row]) -> TextTable:
    names = [name for name in SHOWN if any(name in row.cells for row in rows)]
    several = len({row.setting for row in rows}) > 1
    table = [({"setting": row.setting} if several else {}) | _text_row(row) for row in rows]
    return TextTable(title="", heads=_heads(names, several), rows=table)


def _heads(names: list[str], several: bool) -> list[str]:
    measures = [head for name in names for head in (_head(name), f"Δ {name} (%)")[: 1 + (name in CHANGES)]]
    return [*(["setting"] if several else []), "scaled", "λ", "directions", *measures]


def _head(name: str) -> str:
    unit = measure(name).unit
    return f"{name} ({unit})" if unit == "%" else name


def _text_row(row: Row) -> dict[str, str]:
    cells = {_head(name): value_text(row.cells[name]) for name in SHOWN if name in row.cells}
    cells |= {f"Δ {name} (%)": value_text(row.cells[key]) for name, key in CHANGES.items() if key in row.cells}
    count = {} if row.num_directions is None else {"directions": plain(row.num_directions)}
    return {"scaled": row.scaled, "λ": "" if row.scale is None else f"{row.scale:g}"} | count | cells


def _remarks(records: Sequence[Record]) -> list[str]:
    """What is to be known beside the numbers."""
    lines = []
    for setting, group in by_setting(records).items():
        none = [record for record in group if not record["num_intruders"]]
        if not any(record["num_matrices"] for record in group):
            lines.append(f"{setting}: no matrix that has changed is in the base's files, so none can have an intruder")
        elif none:
            where = f"{none[0]['key']['top']} of each matrix at ε = {none[0]['key']['epsilon']:g}"
            lines.append(f"{setting}: {len(none)} of {len(group)} runs have no intruder among the top {where}")
        if any(record["num_control"] < record["num_intruders"] for record in group):
            lines.append(f"{setting}: some matrices have more intruders than other directions to hold against them")
    for record in records:
        here, recorded = _point(record, TUNED, 1.0)["valid_loss"], record["recorded"]["valid_loss"]
        if not abs(here - recorded) <= FAR * abs(recorded):
            lines.append(f"{record['key']['run_id']}: at λ = 1 valid_loss is {plain(here)} here, "
                         f"and {plain(recorded)} in the run's record")  # fmt: skip
    found = correlation(records)
    text = (
        found["why_not"] or f"= {number(found['rho'], 3)} (p = {found['p']:.2g}) over {found['num_settings']} settings"
    )
    return [*lines, f"Spearman's ρ of the number of intruders with forgetting {text}"]


def check_figure(file: Path) -> None:
    """InputError where a figure cannot be written by that name."""
    if file.suffix not in FIGURE_SUFFIXES:
        raise InputError(f"--figure {show_path(file)}: must end in {' or '.join(FIGURE_SUFFIXES)}")


def draw(rows: Sequence[Row], file: Path) -> list[Path]:
    """The figure, if there is anything to draw; the files, pdf and png."""
    from lorabench.report import drawing

    figure = _figure(rows)
    return drawing.save(figure, file.with_suffix("")) if figure else []


def _figure(rows: Sequence[Row]) -> Figure | None:
    """λ against the change of task loss and of forgetting, a row of panels a setting."""
    from lorabench.report import drawing

    settings = list(dict.fromkeys(row.setting for row in rows if row.scaled == INTRUDERS))
    names = [name for name in ("valid_loss", "forgetting") if any(CHANGES[name] in row.cells for row in rows)]
    if not settings or not names:
        return None
    looks, drawn = drawing.looks(KINDS), set()
    panels = {f"{setting} {name}": (setting, name) for setting in settings for name in names}
    width = "column" if len(names) == 1 else "page"
    with drawing.facets(panels, width, height=2.0, columns=len(names), sharey=False) as grid:
        for (setting, name), axes in zip(panels.values(), grid.axes.flat, strict=True):
            own = [row for row in rows if row.setting == setting and row.cells.get(CHANGES[name])]
            drawn |= _draw_panel(axes, own, CHANGES[name], looks)
            axes.set_ylabel(f"{capitalized(measure_label(name))}\nchange (%)")
            axes.set_title(setting if name == names[0] else "", loc="left")
            axes.set_title("")
        grid.set_xlabels("λ")
        drawing.legend_below(grid.figure, {kind: look for kind, look in looks.items() if kind in drawn})
    return grid.figure


def _draw_panel(axes: Any, rows: Sequence[Row], name: str, looks: dict[str, Any]) -> set[str]:
    """One setting's kinds, each through 0 at λ = 1; hollow where there is no interval. The kinds that are there."""
    import pandas as pd
    import seaborn as sns

    from lorabench.report import drawing
    from lorabench.report.figures._curves import draw_points

    kinds = set()
    for position, kind in enumerate(KINDS):
        found = {row.scale: row.cells[name] for row in rows if row.scaled == kind and row.scale is not None}
        found = {scale: cell for scale, cell in found.items() if _drawable(cell)}
        if not found:
            continue
        kinds.add(kind)
        look, seeds = looks[kind], max(cell.num_seeds for cell in found.values())
        points = pd.DataFrame([
            {"x": scale + 0.008 * (position - 1), "y": cell.center, "half": cell.drawn_half or 0.0,
             "seeds": seeds if scale == 1 else cell.num_seeds, "color": look.color, "marker": look.marker}
            for scale, cell in (found | {1.0: UNCHANGED}).items()
        ])  # fmt: skip
        ends = {"x_low": points["x"], "x_high": points["x"]}
        ends |= {"y_low": points["y"] - points["half"], "y_high": points["y"] + points["half"]}
        sns.lineplot(points, x="x", y="y", ax=axes, color=look.color, linestyle=look.dashes, errorbar=None)
        draw_points(axes, points.assign(**ends))
    drawing.limit([axes], logs=False)
    axes.axhline(0, color=drawing.REFERENCE, linewidth=0.7, zorder=1)
    axes.axvline(1, color=drawing.REFERENCE, linewidth=0.7, zorder=1)
    return kinds


def _drawable(cell: Cell) -> bool:
    return cell.mean is not None and math.isfinite(cell.mean)
