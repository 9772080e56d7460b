"""What runs reach along W0 + λ ΔW, as `lorabench intervene --update` has evaluated it: a table by setting and λ."""

from __future__ import annotations

import pandas as pd

from lorabench.report.aggregate import cell, common_places, value_text
from lorabench.report.labels import key_label, measure, measure_label, value_label
from lorabench.report.results import Results, grouped
from lorabench.report.typeset import Column, Sheet

SCALE = "lambda"


def path_frame(results: Results) -> pd.DataFrame:
    """By run id, a row a λ: `lambda`, what was measured there, and the run's settings, seed and status."""
    rows = [{"run_id": run_id} | point for run_id in results.runs.index for point in results.paths.get(run_id, ())]
    if not rows:
        return pd.DataFrame(columns=[SCALE])
    found = pd.DataFrame(rows).set_index("run_id")
    about = results.runs[list(dict.fromkeys([*results.setting_keys, "status"]))]
    return about.drop(columns=found.columns, errors="ignore").join(found, how="inner")


def shown(results: Results, found: pd.DataFrame) -> list[str]:
    """The measures of a path that are shown, the task's first."""
    names = [f"valid_{results.quality}", "valid_loss", "forgetting"]
    return [name for name in dict.fromkeys(names) if name in found and found[name].notna().any()]


def path_sheet(results: Results) -> Sheet | None:
    """A row a setting and λ; its seeds' runs are those that were evaluated. None where none was."""
    found = path_frame(results)
    if found.empty:
        return None
    keys = [key for key in results.setting_keys if key != "seed"]
    names = shown(results, found)
    groups = [(*values, scale) for values, chunk in grouped(found, keys) for scale in sorted(chunk[SCALE].unique())]
    chunks = {(*values[:-1], values[-1]): chunk for values, chunk in grouped(found, [*keys, SCALE])}
    cells = {place: [cell(chunks[place], name) for name in names] for place in groups}
    places = [common_places(line[at] for line in cells.values()) for at in range(len(names))]
    tidy = [
        dict(zip([*keys, SCALE], place, strict=True))
        | {"measure": name, "unit": measure(name).unit, "mean": c.mean, "half_width": c.half}
        | {"low": c.low, "high": c.high, "n": c.n, "num_seeds": c.num_seeds}
        for place, line in cells.items()
        for name, c in zip(names, line, strict=True)
    ]
    return Sheet(
        name="paths",
        caption="Along W0 + λ ΔW, from the untouched base (λ = 0) through the runs themselves (λ = 1)",
        columns=[
            *(Column(label=key_label(key), numeric=False) for key in keys),
            Column(label="λ"),
            *(Column(label=measure_label(name), unit=measure(name).unit) for name in names),
        ],
        rows=[
            [*map(value_label, place[:-1]), f"{place[-1]:g}", *map(value_text, line, places)]
            for place, line in cells.items()
        ],
        notes=[
            "Mean ± 95% interval (Student t) over the seeds that were evaluated there, in float32 with λ ΔW merged."
        ],
        tidy=pd.DataFrame(tidy, dtype=object),
    )
