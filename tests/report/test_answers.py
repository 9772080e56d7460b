"""Of what was written the page shows some right and some wrong answers, the same each time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lorabench.report.answers import read_answers
from lorabench.report.outputs import write_report
from lorabench.report.results import load_results
from lorabench.spec.sweep import parse_sweep
from lorabench.store.generations import Generation, read_generations, write_generations
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store

SWEEP = {
    "base": {
        "model": "builtin:tiny-llama",
        "task": {"name": "completion", "data": "builtin:python-code", "prompt": "{source}", "response": "{text}",
                 "generate": {"max_new_tokens": 4}},
        "seed": [0, 1],
    },
    "grid": [{"method": {"name": "lora", "rank": [1, 2]}}],
}  # fmt: skip


@pytest.fixture
def written(tmp_path: Path):
    """A store with four runs, each of which has answered two of six prompts right, and the sweep."""
    store, sweep = Store(tmp_path), parse_sweep(SWEEP, "text", "answers")
    for spec in sweep.runs:
        store.write_spec(spec)
        rows = [
            Generation(split=split, number=n, prompt=f"<b>{n}</b> of {spec.id}", reference="x", output=f"out {n}",
                       scores={"exact_match": float(n in (2, 5))})
            for split in ("validation", "test") for n in range(1, 7)
        ]  # fmt: skip
        digest = write_generations(store.folder(spec.id) / "generations.jsonl", rows)
        measures = {"test_exact_match": 1 / 3, "base_test_exact_match": 0.0, "valid_loss": 1.0}
        store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE, measures=measures,
                              generations_sha256=digest))  # fmt: skip
    return store, sweep


def test_right_ones_first_then_wrong_ones(written):
    store, sweep = written
    found = read_answers(load_results(store, sweep))
    assert [shown.setting for shown in found] == ["lora, rank 1", "lora, rank 2"]
    assert found == read_answers(load_results(store, sweep))
    for shown in found:
        assert shown.about == "exact match, mean 33.33 over 6 answers, test split"
        assert [answer["score"] for answer in shown.answers] == ["100", "100", "0", "0"]
        assert {answer["output"] for answer in shown.answers[:2]} == {"out 2", "out 5"}


def test_they_stand_in_the_page_escaped_and_in_its_summary(written, tmp_path):
    store, sweep = written
    report = write_report(load_results(store, sweep), tmp_path / "answers")
    assert not report.errors
    page = (tmp_path / "answers" / "report.html").read_text()
    assert (
        "What was written" in page and f"&lt;b&gt;2&lt;/b&gt; of {sweep.runs[0].id}" in page and "<b>2</b>" not in page
    )
    head = (tmp_path / "answers" / "tables" / "summary.md").read_text().splitlines()[2]
    assert "base test exact match (%) | test exact match (%)" in head


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[1]\n", b"\xff\n", b'{"split": "test"}\n', None])
def test_a_file_that_cannot_be_read_shows_nothing(written, content):
    store, sweep = written
    for spec in (spec for spec in sweep.runs if spec.flat["method.rank"] == 1):
        file = store.folder(spec.id) / "generations.jsonl"
        file.unlink()
        if content is not None:
            file.write_bytes(content)
    assert [shown.setting for shown in read_answers(load_results(store, sweep))] == ["lora, rank 2"]


def test_other_metrics_are_shown_by_their_halves(written):
    store, sweep = written
    spec = sweep.runs[0]
    rows = [Generation(split="test", number=n, prompt="p", reference="r", output=f"{n}", scores={"bleu": 10.0 * n})
            for n in range(6)]  # fmt: skip
    write_generations(store.folder(spec.id) / "generations.jsonl", rows)
    shown = read_answers(load_results(store, sweep))[0]
    assert {answer["output"] for answer in shown.answers[:2]} <= {"3", "4", "5"}
    assert {answer["output"] for answer in shown.answers[2:]} <= {"0", "1", "2"}
    assert shown.about == "each answer's own bleu, mean 25 over 6 answers, test split"


def test_answers_are_written_whole_and_read_as_they_were(tmp_path):
    """With breaks of lines that JSON leaves as they are."""
    file = tmp_path / "generations.jsonl"
    file.mkdir()
    answer = Generation(
        split="test", number=1, prompt="a\nb", reference="", output="ü\u2028\x85\r", scores={"bleu": 0.5}
    )
    digest = write_generations(file, [answer])
    content = file.read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest and content.count(b"\n") == 1
    assert read_generations(file) == [answer]
