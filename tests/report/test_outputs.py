from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest

from lorabench.report import outputs, tables
from lorabench.report.figures.heat_map import HeatMap
from lorabench.report.figures.rank_quality import RankQuality
from lorabench.report.figures.survival import SurvivalCurves
from lorabench.report.freshness import STAMP_FILE, SweepFile
from lorabench.report.outputs import MANIFEST, read_header, write_report
from lorabench.report.results import load_results
from lorabench.spec.figure import SECTIONS
from lorabench.store.store import Store
from tests import synthetic

LIGHT = '[[figure]]\nname = "rank_quality"\n'


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Results of a sweep with one figure, so that a report is quick."""
    return synthetic.make(tmp_path_factory.mktemp("store"), synthetic.TEXT + LIGHT, analyzed=False)


@pytest.fixture(scope="module")
def bare(light):
    """With one that has nothing to draw: quicker still."""
    return dataclasses.replace(light, sweep=dataclasses.replace(light.sweep, figures=(SurvivalCurves(),)))


@pytest.fixture(scope="module")
def report(light, tmp_path_factory):
    """A folder with the report of `light`, and the files of it; not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    return folder, {file.relative_to(folder) for file in write_report(light, folder).files}


@pytest.fixture(scope="module")
def page(report):
    return (report[0] / "report.html").read_text("utf-8")


@pytest.fixture
def again(report, tmp_path):
    """A copy of that folder, to be changed."""
    return shutil.copytree(report[0], tmp_path / "again")


@pytest.fixture(scope="module")
def bare_report(bare, tmp_path_factory):
    """A folder with the report of `bare`; not to be changed."""
    folder = tmp_path_factory.mktemp("bare")
    write_report(bare, folder)
    return folder


def test_everything_is_written(light, report):
    folder, files = report
    assert {"sweep.toml", "report.html", "tables/summary.tex", "figures/rank_quality.pdf"} <= {*map(str, files)}
    assert all((folder / file).stat().st_size for file in files)
    assert (folder / "sweep.toml").read_text() == light.sweep.text


def test_page_needs_no_other_file(page):
    assert not re.search(r'(?:src|url\()\s*=?\s*"?(?!data:)(?:https?:|//|figures)', page)
    assert "<script src" not in page and "<link" not in page
    assert "data:image/svg+xml;base64," in page and "default-src 'none'" in page


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


def test_same_results_same_bytes(light, report, tmp_path):
    folder, files = report
    one = {file.name: (folder / file).read_bytes() for file in files}
    two = {file.name: file.read_bytes() for file in write_report(light, tmp_path).files}
    assert one == two


def test_a_second_report_of_the_same_results_writes_nothing(light, report, again):
    before = {again / file: (again / file).stat().st_mtime_ns for file in report[1]}
    assert {file: file.stat().st_mtime_ns for file in write_report(light, again).files} == before


def test_a_deleted_file_is_made_again_and_a_stale_one_goes(light, again):
    (again / "report.html").unlink()
    manifest = again / MANIFEST
    (again / "tables" / "old.csv").write_text("stale")
    manifest.write_text(manifest.read_text().replace('"files": [', '"files": ["tables/old.csv",'))
    write_report(light, again)
    assert (again / "report.html").exists()
    assert not (again / "tables" / "old.csv").exists()


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


class Mistake(Exception):
    pass


def fails(*_args, **_options):
    raise Mistake("a <b>mistake</b>")


PLACES = {
    "figure rank_quality": (RankQuality, "draw"),
    "table changes": (outputs, "changes_sheet"),
    "table summary": (tables, "summary"),
    "table learning_and_forgetting": (tables, "declared"),
    "table long tables": (tables, "long_tables"),
    "page": (outputs, "render"),
    "digest": (outputs, "_digest"),
    "report": (outputs, "build_tables"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_raises_stands_on_the_page_and_the_rest_is_made(light, report, tmp_path, monkeypatch, name):
    folder, whole = report
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(*PLACES[name], fails)
    (tmp_path / MANIFEST).write_text("{}")
    found = write_report(light, tmp_path)
    assert name in found.errors and "Mistake: a <b>mistake</b> (test_outputs.py, line" in found.errors[name]
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "a &lt;b&gt;mistake&lt;/b&gt;" in page and "<b>mistake" not in page
    kept = {file.relative_to(tmp_path) for file in found.files}
    assert kept <= whole and (name == "report" or len(whole) - len(kept) <= 7)
    monkeypatch.undo()
    again = write_report(light, tmp_path)
    assert not again.errors and {file.relative_to(tmp_path) for file in again.files} == whole, "it was not finished"
    assert "mistake" not in (tmp_path / "report.html").read_text("utf-8")


def test_an_analysis_that_raised_is_told_and_made_again(light, tmp_path):
    found = write_report(dataclasses.replace(light, broken={"spectrum": "Mistake: none"}), tmp_path)
    assert found.errors == {"analysis spectrum": "Mistake: none"}
    assert "Mistake: none" in (tmp_path / "report.html").read_text("utf-8")
    assert json.loads((tmp_path / MANIFEST).read_text())["inputs"] is None


@pytest.mark.parametrize(
    "name", ["../kept.txt", "/tmp/../{kept}", "link", "folder/kept.txt", "tables", "a\0b", "x" * 300]
)
def test_only_files_below_the_folder_are_ever_deleted(bare, bare_report, tmp_path, name):
    """Not what a manifest names elsewhere, nor by way of a link."""
    kept, folder = tmp_path / "kept.txt", tmp_path / "report"
    kept.write_text("mine")
    shutil.copytree(bare_report, folder)
    (folder / "link").symlink_to(kept)
    (folder / "folder").symlink_to(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    for inputs in (None, manifest["inputs"]):
        names = [name.format(kept=str(kept)[1:]), *manifest["files"]]
        (folder / MANIFEST).write_text(json.dumps({"inputs": inputs, "files": names}))
        assert not write_report(bare, folder).errors
        assert kept.read_text() == "mine" and (folder / "link").is_symlink() and (folder / "tables").is_dir()


@pytest.mark.parametrize(
    "text",
    ["[]", "7", '{"files": 3}', '{"inputs": [], "files": []}', '{"files": [1]}', '{"files": ["\\ud800"]}', "[" * 10000,
     '{"inputs": 1' + "0" * 5000 + "}", '{"inputs"', "", "\0"],
)  # fmt: skip
def test_a_damaged_manifest_ends_nothing(bare, tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    (tmp_path / STAMP_FILE).write_text(text)
    assert not write_report(bare, tmp_path).errors and (tmp_path / "report.html").is_file()
    assert SweepFile(file=tmp_path / "sweep.toml").up_to_date(Store(tmp_path.parent)) is None


def test_curves_stand_in_every_report_and_unstable_runs_are_named(light, page, tmp_path):
    assert [*outputs.named_figures(light)] == ["rank_quality", "curves"] and "Nothing to draw" not in page
    logged = synthetic.make_logged(tmp_path / "store")
    asked = dataclasses.replace(logged, sweep=dataclasses.replace(logged.sweep, figures=(SurvivalCurves(),)))
    files = {file.name for file in write_report(asked, tmp_path).files}
    assert {"curves.pdf", "steps.parquet"} <= files
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "Training was unstable in 1 of 9 runs (lora, rank 1)" in text and "unstable: loss " in text
    assert "Nothing to draw from these runs: survival." in text
    assert "unstable 1/3" in (tmp_path / "tables" / "summary.md").read_text("utf-8")
