"""Training curves against the logs that they are drawn from."""

import json

import numpy as np
import pytest

from lorabench.report import drawing
from lorabench.report.comparisons import instabilities
from lorabench.report.figures.curves import MOST_POINTS, Curves
from tests import synthetic

WINDOW = synthetic.STEPS // 10


@pytest.fixture(scope="module")
def panels():
    """Axes by the label of y; and the legend's labels."""
    figure = Curves().draw(synthetic.logged())
    yield {axes.get_ylabel(): axes for axes in figure.axes}, [text.get_text() for text in figure.legends[0].get_texts()]
    drawing.plt.close("all")


def logs(method, rank=None):
    """The rows of each seed's log."""
    runs = [spec for spec in synthetic.logged().sweep.runs if spec.method.name == method]
    specs = [spec for spec in runs if getattr(spec.method, "rank", None) == rank]
    return [[json.loads(line) for line in synthetic.step_lines(spec)] for spec in specs]


def has_line(axes, x, y):
    lines = (line.get_xydata() for line in axes.lines)
    return any(xy.shape == (len(x), 2) and np.allclose(xy, np.stack([x, y], axis=1)) for xy in lines)


@pytest.mark.parametrize("setting", [("lora", 1), ("lora", 4), ("full", None)])
def test_every_panel_has_the_mean_over_seeds(panels, setting):
    seeds = logs(*setting)
    apart = -(-synthetic.STEPS // MOST_POINTS)
    for title, name in {"Training loss": "loss", "Gradient norm": "grad_norm", "Learning rate": "lr"}.items():
        values = np.mean([[row[name] for row in rows if name in row] for rows in seeds], axis=0)
        steps = np.arange(1.0, synthetic.STEPS + 1)
        if name == "loss":  # by hand: the mean over the last tenth of the steps, once there are so many
            values = np.array([values[i - WINDOW : i].mean() for i in range(WINDOW, len(values) + 1)])
            values = np.concatenate([np.full(WINDOW - 1, np.nan), values])
        points = [slice(i, i + apart) for i in range(0, len(steps), apart)]
        found = [(steps[p].mean(), np.nanmean(values[p])) for p in points if np.isfinite(values[p]).any()]
        assert has_line(panels[0][title], *zip(*found, strict=True)), title


def test_evaluations_begin_with_the_base_and_end_with_what_was_measured_last(panels):
    seeds = logs("lora", 4)
    inner = np.mean([[row["valid_loss"] for row in rows if "valid_loss" in row] for rows in seeds], axis=0)
    axes = panels[0]["Validation loss (nats)"]
    assert has_line(axes, [0, 10, 20, 30, synthetic.STEPS], [4.0, *inner, 3.1])


def test_settings_with_unstable_runs_are_marked_and_named(panels):
    assert panels[1] == ["lora, rank 1 (unstable 1/3)", "lora, rank 4", "full"]
    (text,) = instabilities(synthetic.logged())
    assert text.startswith("Training was unstable in 1 of 9 runs (lora, rank 1): ") and "1 of them stands" in text


def test_it_needs_logs():
    assert Curves().draw(synthetic.shared()) is None and Curves().draw(synthetic.sequences()) is None
