"""The page of published figures made again, from made-up results; and claims of places in an analysis' table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorabench.adapters.intervention import intervene
from lorabench.cli import main
from lorabench.config.decode import InputError
from lorabench.report import papers
from lorabench.report.claims import FAILS, HOLDS, judge, not_intervened
from lorabench.report.outputs import write_report
from lorabench.report.papers import papers_page, repeated
from lorabench.report.results import Results
from lorabench.report.update_metrics import at_place
from lorabench.spec.claim import Claim
from lorabench.spec.known import known_measures
from lorabench.spec.reported import untestable
from tests import synthetic

CLAIM = '[[claim]]\nsays = "{says}"\nmeasure = "valid_loss"\nwhere = {{ method.rank = {rank} }}\n{bound}\n{reported}\n'
PAPER = """
[[figure]]
name = "rank_quality"
[paper]
title = "LoRA <again>"
source = "Hu et al. 2021"
[[paper.reports]]
item = "Table 6"
says = "Rank one suffices."
caption = "Accuracy (%)"
numbers = [["r = 1", "r = 64"], [73.4, 73.5]]
shown_by = ["valid_loss-method_rank", "rank_quality"]
[[paper.reports]]
item = "Section 9"
says = "It never fails."
"""
RUNS = """# Question: what?
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "builtin:python-code"
seed = [0, 1, 2]
method.name = "lora"
method.rank = [4, 16]
[[table]]
rows = ["method.name"]
columns = "method.rank"
value = "valid_loss"
"""
TEXT = RUNS + "".join([
    CLAIM.format(says="it learns", rank=16, bound="at_most = 99", reported='reported = "Table 6"'),
    CLAIM.format(says="it learns all", rank=16, bound="at_most = 0.001", reported='reported = "Table 6"'),
    CLAIM.format(says="by the way", rank=4, bound="at_most = 99", reported=""), PAPER,
])  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return synthetic.make(tmp_path_factory.mktemp("store"), TEXT, analyzed=False)


def test_each_report_stands_beside_its_tables_figures_and_verdicts(results: Results) -> None:
    assert results.sweep.paper
    found = repeated(results, results.sweep.paper)
    table, section = found.shown
    assert [row[0] for row in table.beside.claims] == ["it learns", "it learns all"]
    assert (table.beside.shows, table.beside.counts) == ("not the same", "1 holds, 1 does not hold")
    assert section.beside.shows == "not put to the test" and not section.figures
    assert [figure.name for figure in table.figures] == ["quickstart-rank_quality"] and len(table.tables) == 1
    assert found.errors == {} and sum(found.counts.values()) == found.num_runs == len(results.runs)
    page = papers_page([found])
    assert "LoRA &lt;again&gt;" in page and "<again>" not in page
    assert page.count('alt="quickstart-rank_quality"') == 1 and "73.4" in page and "It never fails." in page
    assert "by the way" not in page


def test_what_raises_is_told_in_its_place_and_a_table_has_its_spans(results: Results, monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no <such> thing")

    monkeypatch.setattr(papers, "draw_figure", fails)
    assert results.sweep.paper
    found = repeated(results, results.sweep.paper)
    page = papers_page([found])
    told = "<b>figure rank_quality</b> could not be made: <code>ValueError: no &lt;such&gt; thing"
    assert page.count(told) == 1 and page.index("<h3>Table 6</h3>") < page.index(told) < page.index("<h3>Section")
    (sheet,) = found.shown[0].tables
    spans = [f'<th colspan="{width}" scope="colgroup" class="span">{span}</th>' for span, width in sheet.spans if span]
    assert spans and all(span in page for span in spans) and f"<caption>{sheet.caption}</caption>" in page


def test_the_sweeps_own_report_has_it_beside_the_figure(results: Results, tmp_path: Path) -> None:
    write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.index("It never fails.") < page.index('id="figure-rank_quality"') < page.index("Rank one suffices.")
    assert page.count("Rank one suffices.") == 2 + 1, "beside the figure, beside the table, in the sweep file"


def run(store: Path, *words: str) -> int:
    return main(["paper", str(store), *words])


def test_the_command_writes_the_page_and_its_verdicts_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic.make(tmp_path, TEXT, analyzed=False)
    (tmp_path / "mine.toml").write_text(TEXT)
    assert run(tmp_path, str(tmp_path / "mine.toml"), "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["title"] == "LoRA <again>" and told["reports"][0]["shows"] == "not the same"
    assert [claim["Verdict"] for claim in told["reports"][0]["claims"]] == [HOLDS, FAILS]
    assert (tmp_path / "papers.html").is_file() and (tmp_path / "mine" / "report.html").is_file()
    assert run(tmp_path, "--html", str(tmp_path / "own.html"), "--check") == 1, "of all with a [paper], and one fails"
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'own.html'}\n" and err.endswith("does not hold: it learns all\n")


def test_what_has_no_paper_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain.toml").write_text(RUNS)
    assert run(tmp_path, str(tmp_path / "plain.toml")) == 2
    assert "has no [paper] section" in capsys.readouterr().err
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "sweep.toml").write_text(RUNS)
    assert run(tmp_path) == 2 and "holds no sweep with a [paper] section" in capsys.readouterr().err
    assert run(tmp_path / "none") == 2 and "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measure", "at"),
    [
        ("subspace.phi", {"axis": "method.rank", "value_a": 4, "value_b": 64, "i": 1, "j": [1, 2], "side": "input"}),
        ("subspace.phi:null", {"axis": "seed", "i": 2, "j": 3, "kind": "q_proj"}),
        ("intruders.count", {"epsilon": 0.3, "k": 10}),
        ("intruders.count:null", {"epsilon": [0.3, 0.5], "k": 5}),
    ],
)
def test_a_place_is_the_mean_of_its_rows(measure: str, at: dict[str, Any], whole: Results) -> None:
    """Counted by hand, row by row, over the runs that are compared."""
    name, _, metric = measure.removesuffix(":null").partition(".")
    column = {"phi": "chance" if measure.endswith(":null") else "phi"}.get(
        metric, "null" if ":" in measure else "value"
    )
    by_hand: dict[str, list[float]] = {}
    compared, frame = set(whole.selection.done.index), whole.analyses[name]
    wanted = {key: value if isinstance(value, list) else [value] for key, value in at.items()}
    runs = [key for key in ("run_id", "run_a", "run_b") if key in frame]
    fixed = {"metric": [metric]} if "metric" in frame else {}
    for row in zip(*(frame[key] for key in [*wanted, *fixed, *runs, column]), strict=True):
        *places, value = row
        fits = all(map(_is_one_of, places, (wanted | fixed).values()))
        own = places[-len(runs) :]
        if fits and set(own) <= compared:
            by_hand.setdefault(own[0], []).append(value)
    found = at_place(whole, measure, at)
    assert by_hand and found.to_dict() == pytest.approx({run: sum(all_) / len(all_) for run, all_ in by_hand.items()})


def _is_one_of(value: Any, wanted: list[Any]) -> bool:
    return any(abs(value - item) < 1e-6 if isinstance(item, float) else value == item for item in wanted)


@pytest.fixture
def whole() -> Results:
    return synthetic.shared()


def test_a_claim_of_a_place_is_judged_over_seeds_and_chance_can_stand_against_it(whole: Results) -> None:
    at = {"axis": "method.rank", "value_a": 4, "value_b": 64, "i": 1, "j": 1, "side": "input"}
    own = {"quantization": "none"}
    held = own | {"measure": "subspace.phi:null"}
    claim = Claim(says="so", measure="subspace.phi", where=own, at=at, at_least=0, minus=held)
    found = judge(claim, whole)
    phi, chance = (at_place(whole.of(own), name, at) for name in ("subspace.phi", "subspace.phi:null"))
    assert found.estimate and found.estimate.value == pytest.approx(
        (phi - chance).groupby(whole.runs["seed"]).mean().mean()
    )
    nothing = judge(Claim(says="so", measure="subspace.phi", at={"axis": "nothing"}, at_least=0), whole)
    assert nothing.why == 'no run of "where" is done and has the measure'


def test_a_claim_of_scaled_intruders_is_judged_by_what_intervene_has_kept(whole: Results) -> None:
    """Full fine-tuning alone has been evaluated, of seed s 10 s % less of a forgetting of 2."""
    runs = whole.runs[(whole.runs["method.name"] == "full") & (whole.runs["status"] == "done")]
    kept = {
        run_id: [
            {"epsilon": 0.5, "k": 10, "scaled": kind, "lambda": scale, "forgetting": 2 * (1 - less * run["seed"])}
            for kind, scale, less in [("base", None, 1), ("tuned", 1.0, 0), ("intruders", 0.7, 0.1), ("random", 0.7, 9)]
        ]
        for run_id, run in runs.iterrows()
    }
    found = synthetic.dataclasses.replace(whole, interventions=kept)
    at, tuned = {"scaled": "intruders", "lambda": 0.7}, {"at": {"scaled": "tuned", "lambda": 1.0}}
    claim = Claim(says="so", measure="intervened.forgetting", at=at, minus=tuned, at_most=0)
    assert not untestable(claim, list(whole.sweep.runs), {}, known_measures(), "")
    verdict = judge(claim, found)
    seeds = sorted({*found.selection.done.loc[lambda frame: frame["method.name"] == "full", "seed"]})
    assert len(seeds) > 1 and verdict.estimate
    assert verdict.estimate.value == pytest.approx(-0.2 * sum(seeds) / len(seeds))
    assert judge(claim, whole).why == 'no run of "where" is done and has the measure; lorabench intervene makes it'
    unknown = untestable(replace(claim, at={"scale": 1}), list(whole.sweep.runs), {}, known_measures(), "")
    assert unknown and "scaled, lambda, epsilon, k" in unknown[0]


def test_scaled_intruders_that_claims_ask_for_are_those_that_are_not_kept(whole: Results) -> None:
    runs = whole.selection.done
    full = [*runs.index[runs["method.name"] == "full"]]
    at = {"scaled": "intruders", "lambda": 0.7}
    claim = Claim(says="so", measure="intervened.forgetting", where={"method.name": "full"}, at=at, at_most=0)
    other = replace(claim, measure="forgetting", at=None)
    asking = replace(whole, sweep=replace(whole.sweep, claims=(claim, other)))
    assert full and not_intervened(asking) == [(run_id, claim.at) for run_id in full]
    points = [{"scaled": "control", "lambda": 0.7}, {"scaled": "intruders", "lambda": 0.5}]
    some = replace(asking, interventions={full[0]: [*points, at], full[1]: points})
    assert [run_id for run_id, _ in not_intervened(some)] == full[1:]
    assert not_intervened(whole) == []


def test_the_command_has_intruders_scaled_where_a_claim_asks_for_it(tmp_path: Path, monkeypatch, capsys) -> None:
    claim = CLAIM.format(says="less", rank=16, bound="at_most = 9", reported='reported = "Table 6"')
    claim = claim.replace("valid_loss", "intervened.forgetting") + 'at = { scaled = "intruders", lambda = 0.7 }\n'
    text = TEXT.replace("seed = ", 'task.retain = "builtin:english-docs"\nseed = ').replace(PAPER, claim + PAPER)
    results = synthetic.make(tmp_path, text, analyzed=False)
    asked = []

    def fails(*_: object) -> None:
        raise InputError("RUN = it: cannot")

    monkeypatch.setattr(intervene, "read_run", lambda store, run_id: run_id)
    monkeypatch.setattr(intervene, "intervene", lambda store, run, wanted, *_: asked.append((run, wanted)))
    (tmp_path / "mine.toml").write_text(text)
    assert run(tmp_path, str(tmp_path / "mine.toml")) == 0
    done = results.runs[(results.runs["method.rank"] == 16) & (results.runs["status"] == "done")]
    assert asked == [(run_id, intervene.Intervention(lambdas=(0.7,))) for run_id in done.index] and asked
    monkeypatch.setattr(intervene, "read_run", fails)
    capsys.readouterr()
    assert run(tmp_path, str(tmp_path / "mine.toml")) == 1 and "error: RUN = it: cannot" in capsys.readouterr().err
