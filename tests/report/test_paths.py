"""Paths W0 + λ ΔW of the synthetic runs: as a table, and in the plane."""

from __future__ import annotations

import numpy as np
import pytest

from lorabench.report import drawing
from lorabench.report.figures.plane import Plane
from lorabench.report.paths import path_frame, path_sheet
from lorabench.report.results import Results
from tests import synthetic

SCALES = (0.0, 0.5, 1.0, 1.5)


@pytest.fixture(scope="module")
def results() -> Results:
    """Full fine-tuning alone has been evaluated along the way."""
    found = synthetic.shared()
    runs = found.runs[(found.runs["method.name"] == "full") & (found.runs["status"] == "done")]
    paths = {
        run_id: [{"lambda": s, "valid_loss": 4 - s + run["seed"] / 10, "forgetting": s**2} for s in SCALES]
        for run_id, run in runs.iterrows()
    }
    return synthetic.dataclasses.replace(found, paths=paths)


def test_the_table_has_the_mean_over_the_seeds_at_each_scale(results: Results) -> None:
    sheet, frame = path_sheet(results), path_frame(results)
    assert sheet is not None and len(frame) == len(SCALES) * len(results.paths)
    tidy = sheet.tidy[sheet.tidy["measure"] == "valid_loss"]
    assert set(tidy["method.name"]) == {"full"} and len(tidy) == len(SCALES) * frame["lr"].nunique()
    for row in tidy.to_dict("records"):
        seeds = frame[(frame["lr"] == row["lr"]) & (frame["lambda"] == row["lambda"])]["seed"]
        assert row["mean"] == pytest.approx(4 - row["lambda"] + np.mean([*seeds]) / 10)
        assert row["num_seeds"] == len(seeds)
    assert [line[-3] for line in sheet.rows[:4]] == ["0", "0.5", "1", "1.5"]
    assert path_sheet(synthetic.shared()) is None


def test_a_path_is_drawn_to_the_run_and_dotted_beyond(results: Results) -> None:
    canvas = Plane().draw(results)
    assert canvas is not None
    lines = [(line.get_linestyle(), line.get_xydata()) for line in canvas.axes[0].lines]
    assert len(lines) == 2 * len(results.paths)
    for style, points in lines:
        assert points[:, 0] == pytest.approx([0, 0.25, 1] if style == "-" else [1, 2.25])
    drawing.plt.close(canvas)
