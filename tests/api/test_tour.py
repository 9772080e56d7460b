"""The notebook of `examples/` runs as it is, and what it leaves is what other readers of the files find in them."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient
from safetensors.numpy import load_file

import lorabench
from lorabench.spec.sweep import read_sweep

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The notebook, run in a folder of its own, and that folder."""
    folder, notebook = tmp_path_factory.mktemp("tour"), nbformat.read(TOUR, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook, folder


@pytest.fixture(scope="module")
def results(tour):
    return lorabench.results(tour[1] / "results" / "tour")


def texts(notebook) -> list[str]:
    """What each cell shows as text, less what no two runs have in common."""
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    return [
        "".join(o.data.get("text/plain", "") for o in each if o.output_type == "execute_result") for each in outputs
    ]


def test_what_is_committed_is_what_it_shows(tour):
    committed = nbformat.read(TOUR, 4)
    shown = [(a, b) for a, b in zip(texts(committed), texts(tour[0]), strict=True) if "peak" not in a]
    assert sum(bool(a) for a, _ in shown) > 4
    for a, b in shown:
        numbers = [[float(word) for word in text.split() if word.replace(".", "", 1).isdigit()] for text in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-2) and a.split()[:2] == b.split()[:2]
    assert sum("image/png" in o.get("data", {}) for cell in committed.cells for o in cell.get("outputs", [])) == 2
    assert TOUR.stat().st_size < 200_000 and "/tmp/" not in TOUR.read_text()


def test_progress_is_shown_in_its_cell_and_stays_there(tour):
    shown = [o.data["text/plain"] for cell in tour[0].cells for o in cell.get("outputs", []) if "data" in o]
    assert any("tour 6/6" in text and "[6/6]  done" in text for text in shown)
    assert not any(o.output_type in ("error", "stream") for cell in tour[0].cells for o in cell.get("outputs", []))


def test_the_dict_is_kept_as_a_file_that_explains_the_runs(results):
    sweep = read_sweep(results.folder / "sweep.toml")
    assert [spec.id for spec in sweep.runs] == [*results.runs.index]
    assert {file.name for file in (results.path / "runs").glob("[a-z]*")} == {*results.runs.index}


def test_runs_are_what_the_records_say(results):
    runs = results.runs
    for run_id, run in runs.iterrows():
        record = json.loads((results.path / "runs" / run_id / "record.json").read_text())
        assert run["valid_loss"] == record["measures"]["valid_loss"] and run["seed"] == record["spec"]["seed"]
        assert run["method.name"] == record["spec"]["method"]["name"] and run["status"] == "done"
    assert [*runs["method.name"].cat.categories] == ["lora", "full"] and runs["method.name"].cat.ordered
    assert pd.api.types.is_numeric_dtype(runs["method.rank"]) and runs["selected"].all()


def test_steps_are_what_the_logs_say(results):
    steps = results.steps
    for run_id, own in steps.groupby("run_id", observed=True):
        lines = (results.path / "runs" / run_id / "steps.jsonl").read_text().splitlines()
        assert [*own["loss"].dropna()] == [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert {"method.name", "method.rank", "seed", "lr", "step_lr"} <= {*steps}


def test_spectra_are_numpys_of_the_saved_factors(results):
    lora = results.runs.query("`method.rank` == 2 and seed == 1").index[0]
    factors = load_file(results.path / "runs" / lora / "updates" / "adapter_model.safetensors")
    own = results.spectra[results.spectra["run_id"] == lora]
    for layer, rows in own.groupby("layer", observed=True):
        a, b = (factors[f"base_model.model.{layer}.lora_{side}.weight"].astype(float) for side in "AB")
        s = np.linalg.svd(2 * b @ a, compute_uv=False)[:2]  # alpha is twice the rank
        assert rows["value"].to_numpy() == pytest.approx(s, rel=1e-4) and [*rows["index"]] == [1, 2]
    assert len(own) == 2 * 28 and (own["method.rank"] == 2).all() and own["method.name"].dtype == "category"


def test_metrics_and_pairs_follow_from_the_spectra_and_from_their_runs(results):
    norms = results.metrics.query("analysis == 'spectrum' and metric == 'frobenius_norm'")
    squares = results.spectra.assign(value=results.spectra["value"] ** 2)
    expected = squares.groupby(["run_id", "layer"], observed=True)["value"].sum() ** 0.5
    lora = norms[norms["method.name"] == "lora"].set_index(["run_id", "layer"])["value"]
    assert lora.to_numpy() == pytest.approx(expected.loc[lora.index].to_numpy(), rel=1e-4)
    phi = results.pairs.query("metric == 'phi' and i == 1 and j == 1 and axis == 'seed' and `method.name` == 'lora'")
    row = phi.iloc[0]
    a, b = (lorabench.load(results.path / "runs" / row[run] / "updates")[row["layer"]] for run in ("run_a", "run_b"))
    first = {"input": lambda svd: svd.Vh[0], "output": lambda svd: svd.U[:, 0]}[row["side"]]
    assert row["value"] == pytest.approx(float(first(a) @ first(b)) ** 2, rel=1e-3)
    assert row["null"] == pytest.approx(1 / len(first(a)), rel=1e-3)
    assert (row["seed"], row["value_a"], row["value_b"]) == (0, 0, 1)


def test_a_figure_on_ones_own_axes_shows_the_means_of_the_runs(results):
    figure, axes = plt.subplots()
    assert results.figure("rank_quality", ax=axes) is figure
    means = results.runs.query("`method.name` == 'lora'").groupby("method.rank")["valid_loss"].mean()
    assert any(np.allclose(line.get_ydata(), means) for line in axes.lines if len(line.get_ydata()) == 2)
    assert axes.get_legend() is not None and axes.get_xlabel() == "Rank"
    with pytest.raises(lorabench.InputError, match=r"ax: the figure has \d panels; give it fig=, a Figure or a SubFig"):
        results.figure("subspace_grid", ax=axes)
    with pytest.raises(lorabench.InputError, match=r"unknown figure 'rank_qality'. Did you mean 'rank_quality'"):
        results.figure("rank_qality")
    with pytest.raises(lorabench.InputError, match="unknown key 'colour'"):
        results.figure("rank_quality", colour="red")
    with pytest.raises(lorabench.InputError, match="nothing to draw"):
        results.figure("transfer")
    plt.close("all")


def test_panels_stand_in_a_subfigure_as_in_the_reports_figure(results):
    (top, below) = plt.figure(figsize=(8, 8), layout="constrained").subfigures(2, 1)
    results.figure("subspace_grid", fig=top)
    results.figure("depth_profile", fig=below)
    for part, name in ((top, "subspace_grid"), (below, "depth_profile")):
        own = results.figure(name)
        assert [axes.get_title() for axes in part.axes] == [axes.get_title().replace("\n", " ") for axes in own.axes]
        assert [len(axes.lines) for axes in part.axes] == [len(axes.lines) for axes in own.axes]
    assert len(plt.get_fignums()) == 1  # no notebook shows what was returned a second time
    plt.close("all")


def test_they_tell_what_they_are(results, tour):
    assert repr(results) == f"<lorabench results of tour in {results.path}: 6 done>"
    html = results._repr_html_()
    assert all(run_id in html for run_id in results.runs.index) and "valid_loss" in html
    plan = lorabench.plan(results.folder / "sweep.toml", results.path, device="cpu")
    assert [*plan.runs["basis"]] == ["measured"] * 6 and plan.totals["num_to_run"] == 0
    assert [*plan.runs["seconds"]] == [*results.runs["total_seconds"]]
    assert all(run_id in repr(plan) and run_id in plan._repr_html_() for run_id in plan.runs.index)


def test_what_is_up_to_date_is_left_and_found_by_name_by_folder_and_by_table(results):
    before = {file: file.stat().st_mtime_ns for file in results.folder.rglob("*.*")}
    for made in (lorabench.analyze(results.folder), lorabench.analyze(results.path, "tour")):
        assert made.whole and {file.name for file in made.files} >= {"report.html", "rank_quality.pdf"}
    assert before == {file: file.stat().st_mtime_ns for file in before}
    (first, *_) = (spec for spec in results.sweep.runs if spec.method.name == "lora")
    table = {"name": "part", "base": {key: value for key, value in first.flat.items() if value is not None}}
    assert [*lorabench.results(results.path, table).runs["status"]] == ["done"]


def test_which_sweep_is_meant_must_be_told_where_there_are_several(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.toml").write_text("")
    with pytest.raises(lorabench.InputError, match=r"sweep: is missing, and .* holds several: one, two"):
        lorabench.results(tmp_path)
    with pytest.raises(lorabench.InputError, match=r"unknown sweep 'on'. Did you mean 'one'"):
        lorabench.results(tmp_path, "on")
    with pytest.raises(lorabench.InputError, match=r"RESULTS = .*nowhere: no such folder"):
        lorabench.analyze(tmp_path / "nowhere")


@pytest.mark.parametrize("wrong, text", [({"workers": 0}, "workers = 0: must be at least 1"),
                                         ({"limit": 0}, "limit = 0: must be at least 1"),
                                         ({"retry": ["gone"]}, "--retry gone: unknown status 'gone'"),
                                         ({"device": "gpu"}, "--device gpu: must be")])  # fmt: skip
def test_wrong_arguments_are_told_before_anything_is_written(wrong, text, tmp_path):
    table = {"base": {"model": "builtin:tiny-llama", "task": {"name": "text", "data": "builtin:python-code"}}}
    with pytest.raises(lorabench.InputError, match=text):
        lorabench.run(table | {"grid": [{"method.name": "lora"}]}, tmp_path / "results", **wrong)
    assert not (tmp_path / "results" / "sweep").exists()
