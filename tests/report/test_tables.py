from __future__ import annotations

import dataclasses
import io
import math
import os
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lorabench.report import typeset
from lorabench.report.aggregate import Cell, cell, common_places, interval, places, plain, value_text
from lorabench.report.results import load_results, selected, with_analyses
from lorabench.report.tables import _shared, build_tables, subspace_table, write_tables
from lorabench.report.typeset import Column, Sheet
from lorabench.spec.sweep import parse_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from tests import synthetic
from tests.conftest import TOY
from tests.report.test_results import GRID, SELECT, load


@pytest.fixture
def results():
    return synthetic.shared()


def runs(values, seeds=None, status=None, name="valid_loss"):
    seeds, status = seeds or list(range(len(values))), status or ["done"] * len(values)
    return pd.DataFrame({name: values, "seed": seeds, "status": status})


def of(mean, half=None):
    return Cell(mean=mean, half=half, n=3, num_seeds=3, num_runs=3)


def sheet(results, name):
    return next(item for item in build_tables(results) if item.name == name)


@given(st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 6)), min_size=2, max_size=8, unique=True))
def test_interval_is_scipys_student_t(values):
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    assert half == pytest.approx((high - low) / 2, rel=1e-6)


def test_rounding_is_no_uncertainty():
    assert interval([12.7438344712275, 12.7438344712275 + 4e-15]) == (pytest.approx(12.7438344712275), 0.0)


def test_one_value_or_an_infinite_one_has_no_interval():
    assert interval([2.0]) == (2.0, None)
    assert interval([2.0, math.inf]) == (math.inf, None)


def test_runs_of_one_seed_are_averaged_first():
    item = cell(runs([1.0, 3.0, 2.0, 6.0], seeds=[0, 0, 1, 1]), "valid_loss")
    assert (item.mean, item.n, item.num_seeds) == (3.0, 4, 2)
    assert item.half == interval([2.0, 4.0])[1]


def test_only_done_runs_count_and_the_others_are_named():
    item = cell(runs([1.0, 2.0, 9.0, 9.0], status=["done", "done", "oom", "running"]), "valid_loss")
    assert (item.mean, item.n, item.num_failed, item.num_pending) == (1.5, 2, 1, 1)
    assert item.status_text == "oom 1/4, running 1/4"


def test_percentages_are_times_100():
    assert cell(runs([0.5, 0.7], name="valid_accuracy"), "valid_accuracy").mean == pytest.approx(60)


@pytest.mark.parametrize(("half", "decimals"), [(0.12, 2), (0.35, 2), (0.36, 1), (0.0099, 3), (120, -1), (4.0, 0)])
def test_the_interval_decides_the_digits(half, decimals):
    assert places(half) == decimals


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (of(2.34567, 0.0123), "2.346 ± 0.012"),
        (of(8412.3, 117.0), "8,410 ± 120"),
        (of(-0.0512, 0.004), "−0.051 ± 0.004"),
        (of(1_052_672.0, 0.0), "1,052,672"),
        (of(2.34567), "2.346"),
        (of(math.inf), "inf"),
        (Cell(mean=None, half=None, n=0, num_seeds=0, num_runs=3), ""),
    ],
)
def test_text_of_a_value(item, text):
    assert value_text(item) == text


def test_a_wide_interval_in_a_fine_column_keeps_few_digits():
    assert value_text(of(2.3456, 0.5), common=4) == "2.35 ± 0.50"
    assert value_text(of(2.3456, 0.0004), common=2) == "2.3456 ± 0.0004"


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1e12, "1.000e12"), (3.2e-6, "3.200e−6"), (0.0331247, "0.03312")]
)
def test_plain_numbers(value, text):
    assert plain(value) == text


def test_means_equal_pandas(results):
    tidy = sheet(results, "summary").tidy
    losses = tidy[tidy["measure"] == "valid_loss"].set_index(["method.name", "method.rank", "quantization"])["mean"]
    done = selected(results).done
    for (method, rank, quantization), mean in losses.items():
        same = done["method.rank"].isna() if pd.isna(rank) else done["method.rank"] == rank
        mine = done[(done["method.name"] == method) & same & (done["quantization"] == quantization)]
        assert mean == pytest.approx(mine["valid_loss"].mean())


def test_every_setting_has_a_row_with_its_runs_and_failures(results):
    rows = sheet(results, "summary").rows
    assert len(rows) == 9
    by_place = {tuple(row[:3]): row[-2:] for row in rows}
    assert by_place["lora", "64", "nf4"] == ["1/3", "oom 2/3"]
    assert by_place["lora", "4", "none"] == ["2/3", "failed 1/3"]
    assert by_place["full", "–", "none"] == ["3", "done"]


def test_cells_say_what_they_lack(results):
    rows = sheet(results, "valid_loss-method_rank").rows
    assert rows[1][5].endswith("(n = 1, oom 2/3)") and "±" not in rows[1][5]
    assert rows[2][2:6] == ["–"] * 4
    assert any("not part of the sweep" in note for note in sheet(results, "valid_loss-method_rank").notes)


def test_a_cell_without_any_result_names_its_status(tmp_path):
    table = '[[table]]\nrows = ["method.name"]\ncolumns = "method.rank"\nvalue = "valid_loss"\n'
    results = load(
        tmp_path, GRID + SELECT + table, lambda s: s.lr, lambda s: Status.OOM if s.method.rank == 4 else Status.DONE
    )
    assert build_tables(results)[1].rows[0][2] == "oom 2/2"


def test_the_best_at_the_edge_is_a_finding(results, tmp_path):
    assert any("9 of 9 settings" in note for note in sheet(results, "summary").notes)
    assert sheet(results, "summary").rows[0][3] == "0.003 ↑"
    inside = load(tmp_path, GRID + SELECT, lambda spec: abs(spec.lr - 1e-3))
    assert not any("edge" in note for note in sheet(inside, "summary").notes)


def test_what_a_cell_averages_over_is_said(tmp_path):
    table = '[[table]]\nrows = ["method.name"]\nvalue = "valid_loss"\n'
    results = load(tmp_path, GRID + SELECT + table, lambda spec: spec.lr)
    assert "Cells average over rank, within each seed first." in build_tables(results)[1].notes


def test_the_null_stands_beside_a_metric_of_the_update(results):
    tidy = sheet(results, "learning_and_forgetting").tidy
    full = tidy[(tidy["measure"] == "spectrum.rank_90") & (tidy["method.name"] == "full")].iloc[0]
    text = sheet(results, "learning_and_forgetting").rows[-1][-3]
    assert full["null"] > full["mean"]
    assert text.endswith(f"[{plain(full['null'])}]")


@pytest.mark.parametrize(
    ("value", "model"),
    [
        ("spectrum.rank_90", "random Gaussian updates"),
        ("intruders.num_intruders", "random directions in place of ΔW's"),
    ],
)
def test_the_notes_say_what_the_null_is_of(results, value, model):
    table = dataclasses.replace(results.sweep.tables[0], value=value)
    found = dataclasses.replace(results, sweep=dataclasses.replace(results.sweep, tables=(table,)))
    (note,) = [note for note in build_tables(found)[-1].notes if note.startswith("In brackets")]
    assert model in note


def test_same_results_same_bytes(tmp_path, results):
    synthetic.fill(Store(tmp_path / "store"), results.sweep)
    again = load_results(Store(tmp_path / "store"), results.sweep)
    for name in ("one", "two"):
        write_tables(again, build_tables(again), tmp_path / name)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert {"summary.csv", "summary.md", "summary.tex", "runs.csv"} <= set(one)


def test_runs_csv_has_every_run_and_its_exact_numbers(tmp_path, results):
    write_tables(results, [], tmp_path)
    table = pd.read_csv(tmp_path / "runs.csv", index_col="run_id", float_precision="round_trip")
    assert list(table.index) == list(results.runs.index)
    assert table["valid_loss"].equals(results.runs["valid_loss"].rename_axis("run_id"))


def test_whole_keys_stay_whole_in_csv(results):
    text = typeset.csv(sheet(results, "summary").tidy)
    assert set(pd.read_csv(io.StringIO(text), dtype=str)["method.rank"].dropna()) == {"1", "4", "16", "64"}


def test_subspace_table_is_the_mean_over_layers(results):
    table, frame = subspace_table(results), results.analyses["subspace"]
    assert set(table["i"]) | set(table["j"]) <= {1, 2, 4, 8, 16, 32, 64}
    row = table[(table["axis"] == "method.rank") & (table["value_a"] == 4) & (table["value_b"] == 16)].iloc[-1]
    ids = results.runs.index[results.runs["quantization"] == row["quantization"]]
    same = frame[frame["run_a"].isin(ids)]
    for key in ("axis", "value_a", "value_b", "kind", "i", "j"):
        same = same[same[key] == row[key]]
    assert row["phi"] == pytest.approx(same["phi"].mean())
    assert row["num_layers"] == same["layer"].nunique() == 2


@pytest.mark.parametrize(
    ("a", "b", "shared"), [(4, 4, 4), (None, 4, 4), (4, None, 4), (None, None, None), (4, 16, None)]
)
def test_the_setting_of_a_pair_is_what_its_runs_share(a, b, shared):
    assert _shared(a, b) == shared


def test_markdown_has_one_cell_a_column():
    text = typeset.markdown(odd_sheet())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {3}


HOSTILE = r"""$x_1$ 50% & {a|b} \ ~^# <ΔW> σ²² $$ \$ \end{table} `code` *a* [3cm] {{ }} %"""
HOSTILE_LABELS = [
    HOSTILE.replace("}", ""), "[2cm] first", "* star", "a\n\n\nb", "\x1b[31mred\x07", "中文 ελληνικά Ünïcödé", "ąđ",
    "🙂", "\\", "$", "_", "–−×±", "$\\frac$", "<script>", "\u202eright to left", "\u2028", "²²", "{", "%", "$$",
]  # fmt: skip


def latex_here():
    """pdflatex; where there is none the test is skipped, but never where LORABENCH_TEST_LATEX asks for it."""
    latex = shutil.which("pdflatex")
    if latex is None and not os.environ.get("LORABENCH_TEST_LATEX"):
        pytest.skip("no pdflatex here")
    assert latex, "LORABENCH_TEST_LATEX is set, and there is no pdflatex"
    return latex


def test_latex_is_accepted_by_latex(tmp_path, results):
    """Every table of a sweep with hostile labels, captions and values; twice, for the list of tables."""
    tables = [
        {"rows": ["label"], "value": ["valid_loss", "storage_bytes"], "caption": "5%\n\n\n$\\frac {a"},
        {"rows": ["seed"], "columns": "label", "value": "valid_loss", "name": "é_中, +"},
    ]
    grid = [{"label": label, "method": {"rank": rank}, "seed": [0, 1]} for rank, label in enumerate(HOSTILE_LABELS, 1)]
    base = TOY | {"method": {"name": "lora"}}
    sweep = parse_sweep({"base": base, "grid": grid, "table": tables})
    hostile = load_results(Store(tmp_path), synthetic.fill(Store(tmp_path), sweep))
    body = "\\clearpage".join(map(typeset.latex, [*build_tables(results), *build_tables(hostile), odd_sheet()]))
    text = rf"\documentclass{{article}}\usepackage{{booktabs,graphicx}}\begin{{document}}{body}\listoftables"
    (tmp_path / "t.tex").write_text(text + r"\end{document}")
    command = [latex_here(), "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stdout[-1500:].decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("5% & more_of #1", r"5\% \& more\_of \#1"),
        ("2 ± 1 ↑", r"2 $\pm$ 1 $\uparrow$"),
        ("a\\b", r"a\textbackslash{}b"),
        ("$$ and $", r"\$\$ and \$"),
        ("σ²²", r"$\sigma {}^2{}^2$"),
        ("one\n\n  two", "one two"),
        ("é中", r"é{\ifdefined\Umathchar 中\else {[}U+4E2D{]}\fi}"),
    ],
)
def test_latex_escapes(text, tex):
    assert typeset.escape_tex(text) == tex


def odd_sheet():
    odd = HOSTILE
    columns = [Column(label=odd, numeric=False), Column(label="v", unit="%", span="x_1")]
    return Sheet(
        name="odd_name", caption=odd, columns=columns, rows=[[odd, "−1 ± 2"]], notes=[odd], tidy=pd.DataFrame()
    )  # fmt: skip


def test_notes_say_over_which_layers_a_mean_is(tmp_path):
    table = '[[table]]\nrows = ["method.rank"]\nvalue = ["spectrum.rank_90", "valid_loss"]\n'
    results = load(tmp_path, GRID + table, lambda spec: spec.lr)
    rows = [(run, f"layers.0.{'q' if rank == 2 else 'up'}", 1.0) for run, rank in results.runs["method.rank"].items()]
    apart = pd.DataFrame(rows, columns=["run_id", "layer", "value"]).assign(metric="rank_90", depth=0)
    same = apart.assign(layer="layers.0.q")
    for frame, text in ((apart, "No layer was changed in all runs: metrics"), (same, "that all runs have")):
        notes = build_tables(with_analyses(results, {"spectrum": frame}))[-1].notes
        assert [text in note for note in notes if "layer" in note] == [True]


def test_notes_say_what_was_stored_of_another_rank_than_trained(tmp_path):
    table = '[[table]]\nrows = ["method.init"]\nvalue = ["storage_bytes"]\n'
    text = GRID.replace("rank = [2, 4]", 'init = ["kaiming", "pissa"]') + table
    notes = build_tables(load(tmp_path, text, lambda spec: spec.lr, measure="storage_bytes"))[-1].notes
    (note,) = [note for note in notes if "2r" in note]
    assert "pissa" in note and "kaiming" not in note


def test_the_summary_says_once_that_what_chose_flatters_what_was_chosen(results):
    sheets = build_tables(results)
    (note,) = [note for sheet in sheets for note in sheet.notes if "a little too good" in note]
    assert note in sheets[0].notes and "the test loss took no part" in note


def test_an_interval_wider_than_the_measure_can_be_is_called_useless():
    def row(seed, value):
        return {"seed": seed, "status": "done", "valid_accuracy": value, "valid_loss": value}

    runs = pd.DataFrame([row(0, 0.415), row(1, 0.585)])
    assert value_text(cell(runs, "valid_accuracy")) == "50 (n = 2: no useful interval)"
    assert value_text(cell(runs, "valid_loss")) == "0.5 ± 1.1"
    assert common_places([cell(runs, "valid_accuracy")]) is None


@pytest.mark.parametrize(("share", "said"), [(0, None), (2, "of 2 of"), (10**6, "are each run's share")])
def test_costs_of_packed_runs_are_said_to_be_shares(results, share, said):
    done = list(results.selection.done.index)
    packed = {run_id: {"packed": 4} for run_id in done[:share]}
    marked = dataclasses.replace(results, environments={run_id: packed.get(run_id, {}) for run_id in done})
    notes = [note for note in sheet(marked, "summary").notes if "Packed" in note]
    assert (not notes) if said is None else (len(notes) == 1 and said in notes[0] and "peak" in notes[0])
