"""The page of a report as a reader uses it, in a browser: tables, runs that open, figures, widths, colours, size."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from lorabench.report import hover, tables
from lorabench.report.figures.cost_quality import CostQuality, pareto_front
from lorabench.report.figures.heat_map import HeatMap
from lorabench.report.outputs import Content, notes_once, render, write_report
from lorabench.report.page import MOST_ROWS, Part, compact, drawn, parts_page
from lorabench.report.results import load_results, with_analyses
from lorabench.report.run_details import cost_against_quality, run_details
from lorabench.report.typeset import Sheet
from lorabench.store.store import RunState, Store
from lorabench.terminal.text import TextTable
from tests import synthetic
from tests.browser import visit

STEPS = 200


def layers(results):
    """A spectrum of two layers of each run that is compared, the depth as its value."""
    places = [(run, f"model.layers.{d}.self_attn.q_proj", d) for run in results.selection.done.index for d in range(2)]
    rows = [
        {"run_id": run, "layer": layer, "kind": "q_proj", "depth": depth, "metric": "relative_norm",
         "value": 0.25 * (depth + 1), "null": np.nan}
        for run, layer, depth in places
    ]  # fmt: skip
    return {"spectrum": pd.DataFrame(rows)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """With logs: of the first run a loss that falls by 0.01 a step, evaluated at step 100."""
    folder = tmp_path_factory.mktemp("store")
    results = synthetic.make(folder, analyzed=False)
    run = folder / "runs" / results.runs.index[0]
    rows = [{"step": step, "loss": 5 - step / 100, "lr": 0.1} for step in range(1, STEPS + 1)]
    rows.insert(100, {"step": 100, "valid_loss": 4.5})
    (run / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "log.txt").write_text("first\n" + "bar 1%\rbar <100%>\n" + "the last line\n")
    results = load_results(Store(folder), results.sweep)
    results = with_analyses(results, layers(results))
    return dataclasses.replace(results, sweep=dataclasses.replace(results.sweep, figures=(CostQuality(), HeatMap())))


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    part = Part(title="Merges of a and b", tables=[TextTable(title="by body", heads=["body"], rows=[{"body": "svd"}])])
    assert not write_report(results, folder, [part]).errors
    return folder / "report.html"


@pytest.fixture(scope="module")
def used(page, results):
    """What a reader finds who uses all of the page once, on a wide screen."""
    script = """
      const out = {}, run = RUN;
      const summary = $("#summary .table"), rows = () => [...summary.querySelectorAll("tbody tr")];
      const heads = [...summary.querySelectorAll("thead tr:last-child th")];
      const column = (name) => heads.findIndex((th) => th.textContent.startsWith(name));
      const cells = (name) => rows().map((row) => row.cells[column(name)].textContent);
      const sort = heads[column("validation loss")].querySelector("button");
      out.sections = $$("nav a").map((a) => a.textContent);
      out.targets = $$("nav a").every((a) => $(a.getAttribute("href")));
      out.before = cells("validation loss");
      sort.focus();
      sort.click();
      out.up = cells("validation loss");
      out.aria = sort.closest("th").getAttribute("aria-sort");
      sort.click();
      out.down = cells("validation loss");
      sort.click();
      out.again = cells("validation loss");
      const search = summary.querySelector("input[type=search]");
      search.value = "full";
      search.dispatchEvent(new Event("input"));
      out.filtered = cells("method");
      search.value = "";
      search.dispatchEvent(new Event("input"));
      const menu = summary.querySelector(".menu");
      menu.open = true;
      await new Promise((done) => setTimeout(done, 50));
      const line = [...menu.querySelectorAll("div > div")].find((each) => each.textContent.startsWith("quantization"));
      line.querySelector("select").value = "nf4";
      line.querySelector("select").dispatchEvent(new Event("change"));
      out.chosen = cells("quantization");
      line.querySelector("input").click();
      out.hidden = [...summary.querySelectorAll("tr")].map((row) => row.cells[column("quantization")].hidden);
      document.body.click();
      out.menu = menu.open;
      $("#runs details").open = true;
      $(`#${run} button`).click();
      const detail = $(`#${run}`).nextSibling;
      out.expanded = $(`#${run} button`).getAttribute("aria-expanded");
      out.detail = detail.textContent;
      out.links = [...detail.querySelectorAll("a")].map((a) => a.getAttribute("href"));
      out.curve = detail.querySelector("polyline").getAttribute("points").split(" ").length;
      out.bold = [...detail.querySelectorAll("dl b")].map((b) => b.parentNode.previousSibling.textContent);
      location.hash = out.links.find((link) => link.startsWith("#"));
      await new Promise((done) => setTimeout(done, 50));
      out.followed = $(location.hash).querySelector("button").getAttribute("aria-expanded");
      out.focus = document.activeElement.closest("tr").id;
      const costs = $("#costs"), [cost, gain] = costs.querySelectorAll("select");
      out.front = costs.querySelector("[role=status]").textContent;
      out.circles = costs.querySelectorAll("circle").length;
      costs.querySelector("input[type=checkbox]").click();
      out.alone = costs.querySelectorAll("circle").length;
      const plot = $("#figure-cost_quality .plot");
      plot.focus();
      plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
      out.tip = $("#tip").innerText;
      const dot = $("#figure-cost_quality .dot").getBoundingClientRect();
      plot.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
      out.gone = $("#tip").hidden;
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX: dot.x + 8, clientY: dot.y + 5 }));
      out.pointed = $("#tip").innerText;
      plot.querySelector("[aria-label='Zoom in']").click();
      out.zoomed = plot.firstElementChild.style.transform.includes("scale(1.5)");
      const heat = $("#figure-heat_map .plot");
      heat.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
      out.cell = $("#tip").innerText;
      const dark = getComputedStyle(document.body).backgroundColor;
      $("#theme").click();
      out.colours = [dark, getComputedStyle(document.body).backgroundColor];
      out.unnamed = $$("button, input, select, summary, img, table, .plot").filter((each) => !(each.textContent.trim()
        || each.getAttribute("aria-label") || each.alt || each.labels?.length)).map((each) => each.outerHTML);
      return out;
    """
    return visit(page, script.replace("RUN", json.dumps(results.runs.index[0])))


def number(text: str) -> float:
    return float(text.split(" ")[0].replace("−", "-"))


def test_contents_lead_to_each_section(used):
    found = used["found"]
    assert found["sections"][-6:] == [
        "Figures", "Tables", "Merges of a and b", "Runs", "Provenance", "How the numbers were made"
    ]  # fmt: skip
    assert found["targets"]


def test_tables_sort_by_numbers_up_and_down_and_back(used):
    found = used["found"]
    assert found["up"] == sorted(found["before"], key=number) != found["before"]
    assert found["down"] == sorted(found["before"], key=number, reverse=True)
    assert found["again"] == found["before"] and found["aria"] == "ascending"


def test_tables_filter_and_hide_columns(used):
    found = used["found"]
    assert set(found["filtered"]) == {"full"}
    assert set(found["chosen"]) == {"nf4"} and found["hidden"] and all(found["hidden"])
    assert not found["menu"], "a click elsewhere closes the menu"


def test_a_run_opens_to_all_that_is_known_of_it(used, results):
    found, first = used["found"], results.runs.index[0]
    assert found["expanded"] == "true"
    assert next(link for link in found["links"] if first in link) == f"../runs/{first}/spec.json"
    assert found["curve"] == 60, "of 200 steps"
    assert "bar <100%>" in found["detail"] and "bar 1%" not in found["detail"] and "the last line" in found["detail"]
    assert {"method.rank", "lr", "seed"} <= {*found["bold"]} and "steps" not in found["bold"]


def test_neighbours_are_the_runs_that_differ_in_one_key(used, results):
    specs = {spec.id: spec.flat for spec in results.sweep.runs}
    own = specs[results.runs.index[0]]
    near = [
        run for run, flat in specs.items() if sum(own.get(key) != flat.get(key) for key in {**own, **flat}) == 1
    ]  # fmt: skip
    assert sorted(link[1:] for link in used["found"]["links"] if link[0] == "#") == sorted(near)
    assert used["found"]["followed"] == "true" and used["found"]["focus"] in near


def test_the_front_is_drawn_and_can_stand_alone(used, results):
    data = cost_against_quality(results)
    names = [measure["name"] for measure in data["measures"]]
    assert len(data["points"]) == 9 == used["found"]["circles"]
    pairs = [[point["values"][names.index(name)] for name in ("peak_gib", "valid_loss")] for point in data["points"]]
    best = [
        point["name"] for point, (x, y) in zip(data["points"], pairs, strict=True)
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in pairs)
    ]  # fmt: skip
    told = used["found"]["front"].partition(": ")[2].split("; ")
    assert sorted(told) == sorted(best) and used["found"]["alone"] == len(best)


def test_figures_tell_their_values_and_zoom(used, results):
    found = used["found"]
    name, x, y = found["tip"].split("\n")
    assert found["pointed"] == found["tip"] and found["gone"] and found["zoomed"]
    runs = dict(synthetic_settings(results))[name]
    assert number(x.rpartition(": ")[2]) == pytest.approx(runs["peak_gib"].mean(), rel=1e-3)
    assert number(y.rpartition(": ")[2]) == pytest.approx(runs["valid_loss"].mean(), rel=1e-3)
    assert found["cell"].split("\n")[1:] == ["Module: q_proj", "Block: 0", "0.25"]


def synthetic_settings(results):
    from lorabench.report.labels import series_label
    from lorabench.report.results import grouped

    for values, runs in grouped(results.selection.done, results.settings):
        yield series_label(results.settings, values), runs


def test_colours_switch_and_everything_has_a_name(used):
    assert used["found"]["colours"] == ["rgb(255, 255, 255)", "rgb(22, 22, 22)"]
    assert used["found"]["unnamed"] == []


@pytest.mark.parametrize(("width", "flags"), [(500, ["--blink-settings=preferredColorScheme=0"]), (1400, [])])
def test_nothing_is_wider_than_the_window(page, width, flags):
    """With all that can be opened open; and the colours are those that the system prefers."""
    script = """
      $$("details").forEach((each) => { each.open = true; });
      $("#all-runs tbody button").click();
      return { paper: getComputedStyle(document.body).backgroundColor, runs: $$("#all-runs tr.detail").length };
    """
    outcome = visit(page, script, width, 900, *flags)
    assert outcome["overflow"] <= 0 and outcome["found"]["runs"] == 1
    assert outcome["found"]["paper"] == ("rgb(22, 22, 22)" if flags else "rgb(255, 255, 255)")


def test_ten_thousand_runs_open_quickly(tmp_path):
    """In a page below 10 MB, of which each run can be found and opened."""
    text = synthetic.TEXT.partition("[select]")[0].replace("seed = [0, 1, 2]", f"seed = {list(range(1000))}")
    sweep = synthetic.read(text)
    sweep = dataclasses.replace(sweep, runs=sweep.runs[:10_000])
    known = {spec.id: synthetic.record(spec) for spec in sweep.runs}
    states = [
        RunState(run_id=run_id, status=record.status, spec=record.spec, record=record, error=record.error)
        for run_id, record in known.items()
    ]
    results = load_results(Store(tmp_path / "store"), sweep, states=states)
    places = np.repeat(np.arange(len(states)), STEPS)
    results.__dict__["steps"] = pd.DataFrame({
        "run_id": pd.Categorical.from_codes(places, list(results.runs.index)),
        "step": np.tile(np.arange(STEPS), len(states)), "loss": np.linspace(5, 3, len(places)),
    })  # fmt: skip
    content = Content(
        summary=tables.summary(results, results.selection), changes=None, tables=[], figures={}, empty={}, errors={},
        details=run_details(results), costs=cost_against_quality(results),
    )  # fmt: skip
    page, last = tmp_path / "report.html", results.runs.index[-1]
    page.write_text(render(results, content), "utf-8")
    assert page.stat().st_size < 10e6
    script = f"""
      const shown = $$("#all-runs tbody tr").length, search = $("#all-runs input[type=search]");
      search.value = "{last}";
      search.dispatchEvent(new Event("input"));
      $("#all-runs tbody button").click();
      return {{ shown, found: $$("#all-runs tr[id]").map((row) => row.id), drawn: $$("#all-runs polyline").length }};
    """
    outcome = visit(page, script, wait=False)
    assert outcome["found"] == {"shown": MOST_ROWS, "found": [last], "drawn": 1}
    assert outcome["milliseconds"] < 3000


def test_curves_of_many_runs_have_fewer_points(results):
    few = run_details(results)["curves"]
    assert [len(steps) for steps in few["grids"]] == [60] and few["grids"][0][0] == 1 and few["grids"][0][-1] == STEPS
    grid, losses, evaluated = few["runs"][0]
    assert losses == pytest.approx([5 - step / 100 for step in few["grids"][grid]], rel=1e-3)
    assert evaluated == [[100, 4.5]]


@pytest.mark.parametrize("more", [(False, False), (True, False), (True, True)])
def test_the_front_is_what_no_other_point_beats(more):
    points = [tuple(pair) for pair in np.random.default_rng(0).integers(0, 12, (60, 2)).tolist()]
    signs = [-1 if better else 1 for better in more]
    costs = [tuple(sign * value for sign, value in zip(signs, point, strict=True)) for point in points]
    best = [
        place for place, (x, y) in enumerate(costs) if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in costs)
    ]
    assert sorted(pareto_front(points, more)) == best


def test_hover_tells_what_a_figure_shows():
    """Lines by their legend, thinned but with their ends; a line that only marks a place is none."""
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot(range(1, 1001), np.arange(1, 1001) ** 2.0, color="red", label="squares")
    axes.axhline(5)
    axes.set(xscale="log", xlabel="n", ylabel="n²")
    axes.legend()
    figure.draw_without_rendering()
    (panel,) = hover.values(figure)
    (series,) = panel["series"]
    assert series["name"] == "squares" and panel["labels"] == ["n", "n²"] and panel["x"][2] == 1
    assert len(series["points"]) == hover.MOST_POINTS
    assert [series["points"][0], series["points"][-1]] == [[1, 1], [1000, 1e6]]
    box = axes.get_position()
    assert panel["box"] == pytest.approx([box.x0, 1 - box.y1, box.width, box.height], rel=1e-4)


def test_a_note_stands_once():
    frame = pd.DataFrame()
    one, two = (
        Sheet(name=name, caption=name.upper(), columns=[], rows=[], notes=notes, tidy=frame)
        for name, notes in (("one", ["a", "b"]), ("two", ["b", "c"]))
    )
    assert notes_once([one, two]) == {"one": (["a", "b"], []), "two": (["c"], ["ONE"])}


def test_data_cannot_end_the_script_they_stand_in():
    text = {"a": "</script><!--\u2028"}
    assert "<" not in compact(text) and json.loads(compact(text)) == text


def test_a_drawing_too_large_as_vectors_has_pixels(monkeypatch):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2])
    assert drawn("a", "b", figure).source.startswith("data:image/svg+xml;base64,")
    monkeypatch.setattr("lorabench.report.page.MOST_BYTES", 10)
    assert drawn("a", "b", figure).source.startswith("data:image/png;base64,")


def test_pages_of_commands_have_contents_and_escape_what_they_show():
    part = Part(title="<i>", tables=[TextTable(title="t", heads=["a", "b"], rows=[{"a": "<b>"}])], notes=["n"])
    text = parts_page("Title", [("name", "<u>")], [part])
    assert '<li><a href="#part-1">&lt;i&gt;</a></li>' in text and "<td>&lt;b&gt;</td>" in text and "&lt;u&gt;" in text
