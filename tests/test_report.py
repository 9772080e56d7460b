from __future__ import annotations

import dataclasses
import re

import pytest

from lorabench.figure import SECTIONS
from lorabench.figures.heat_map import HeatMap
from lorabench.figures.rank_quality import RankQuality
from lorabench.figures.survival import SurvivalCurves
from lorabench.record import Store
from lorabench.report import MANIFEST, read_header, write_report
from lorabench.results import load_results
from tests import synthetic

LIGHT = '[[figure]]\nname = "rank_quality"\n'


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Results of a sweep with one figure, so that a report is quick."""
    return synthetic.make(tmp_path_factory.mktemp("store"), synthetic.TEXT + LIGHT, analyzed=False)


@pytest.fixture(scope="module")
def page(light, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(light, folder)
    return (folder / "report.html").read_text("utf-8")


def test_everything_is_written(light, tmp_path):
    files = write_report(light, tmp_path)
    names = {str(file.relative_to(tmp_path)) for file in files}
    assert {"sweep.toml", "report.html", "tables/summary.tex", "figures/rank_quality.pdf"} <= names
    assert all(file.stat().st_size for file in files)
    assert (tmp_path / "sweep.toml").read_text() == light.sweep.text


def test_page_needs_no_other_file(page):
    assert not re.search(r'(?:src|url\()\s*=?\s*"?(?!data:)(?:https?:|//|figures)', page)
    assert "<script" not in page and "<link" not in page
    assert "data:image/png;base64," in page


def test_page_says_what_was_asked_and_what_failed(page):
    assert "how do rank and quantization change what LoRA learns" in page
    assert "OutOfMemoryError" in page and "loss is NaN at step 61" in page
    assert page.index("Not everything succeeded") < page.index("<h2>Summary</h2>")
    assert "uncommitted changes" in page
    assert "torch 2.13.0" in page and "5f2b09c3d41e" in page


def test_text_from_runs_is_escaped(page):
    assert "<b>GPU</b>" not in page and "&lt;b&gt;GPU&lt;/b&gt;" in page


def test_figures_stand_under_headings_and_changes_after_the_summary(tmp_path):
    results = synthetic.shared()
    figures = (RankQuality(), SurvivalCurves(), HeatMap())
    write_report(dataclasses.replace(results, sweep=dataclasses.replace(results.sweep, figures=figures)), tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    headings = re.findall(r"<h[23]>(.*?)</h[23]>", page)
    start = headings.index("Summary")
    assert headings[start : start + 6] == [
        "Summary", "What changed in the weights, by kind of module", "Figures",
        SECTIONS["cost"], SECTIONS["spectra"], SECTIONS["base"],
    ]  # fmt: skip
    assert page.index(SECTIONS["spectra"]) < page.index('alt="heat_map"') < page.index(SECTIONS["base"])
    assert (tmp_path / "tables" / "changes.csv").is_file()


def test_same_results_same_bytes(light, tmp_path):
    one, two = (
        {file.name: file.read_bytes() for file in write_report(light, tmp_path / name)} for name in ("one", "two")
    )
    assert one == two


def test_a_second_report_of_the_same_results_writes_nothing(light, tmp_path):
    times = [[file.stat().st_mtime_ns for file in write_report(light, tmp_path)] for _ in range(2)]
    assert times[0] == times[1]


def test_a_deleted_file_is_made_again_and_a_stale_one_goes(light, tmp_path):
    write_report(light, tmp_path)
    (tmp_path / "report.html").unlink()
    manifest = tmp_path / MANIFEST
    (tmp_path / "tables" / "old.csv").write_text("stale")
    manifest.write_text(manifest.read_text().replace('"files": [', '"files": ["tables/old.csv",'))
    write_report(light, tmp_path)
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "tables" / "old.csv").exists()


def test_report_of_a_sweep_that_has_not_run(tmp_path):
    results = load_results(Store(tmp_path / "store"), synthetic.read(synthetic.TEXT))
    write_report(results, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "54 missing" in text
    assert "Nothing to draw from these runs" in text and "No run has been recorded yet" in text


def test_header_of_a_sweep_file():
    assert read_header(synthetic.TEXT) == {
        "Question": "how do rank and quantization change what LoRA learns, beside full fine-tuning?",
        "Cost": "about 3 minutes on 2 CPU cores.",
        "Expect": "LoRA at its own best lr comes within 0.05 nats of full fine-tuning from rank 16 on.",
    }
    assert read_header('name = "x"') == {}
