from __future__ import annotations

import dataclasses

from lorabench.report import drawing
from lorabench.report.figures.pictures import BASE, Pictures
from tests import synthetic


def test_a_strip_a_setting_below_the_base_s():
    results = synthetic.pictured()
    (axes,) = Pictures().draw(results).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == BASE and len(names) == 1 + len({*names[1:]}) > 2
    assert [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()] == [
        "a dog", "a dog at sea", "a cat", "a house",
    ]  # fmt: skip
    assert axes.get_xlabel() == "Prompts: 2 of what was trained, then 2 of what was not"
    image, shown = axes.images[0].get_array(), [round(tick) for tick in axes.get_xticks()]
    rows = [round(tick) for tick in axes.get_yticks()]
    assert [image[rows[0], x, 0] for x in shown] == [40, 80, 120, 160]
    assert all([image[y, x, 0] for x in shown] == [50, 90, 130, 170] for y in rows[1:])
    drawing.plt.close("all")


def test_as_many_of_each_prompt_and_prompts_as_are_asked_for():
    (axes,) = Pictures(each=2, columns=3).draw(synthetic.pictured()).axes
    assert len(axes.get_xticks()) == 6
    drawing.plt.close("all")


def test_what_stands_below_a_narrow_strip_is_not_cut_off():
    figure = Pictures(columns=1, each=1).draw(synthetic.pictured())
    figure.canvas.draw()
    assert figure.axes[0].xaxis.label.get_window_extent().x1 <= figure.bbox.x1
    drawing.plt.close("all")


def test_what_cannot_be_read_is_not_shown(tmp_path):
    results = synthetic.pictured()
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    torn = dataclasses.replace(results, drawn=dict.fromkeys(results.drawn, tmp_path / "torn.png"))
    assert Pictures().draw(torn) is None
