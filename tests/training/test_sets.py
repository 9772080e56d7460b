"""A task's further test sets and its retention sets: each evaluated by its own task, once, under its own name."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch

from lorabench.config.decode import InputError, decode
from lorabench.launch.plan import refusals
from lorabench.models.base_model import load_base
from lorabench.report.outputs import write_report
from lorabench.report.results import load_results
from lorabench.spec.known import known_measures
from lorabench.spec.measures import MEASURES, find
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import parse_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.tasks.classification import Classification
from lorabench.training.evaluation import metrics_of, retention_of
from lorabench.training.examples import prepare, read_usable
from lorabench.training.execute import Options, execute
from tests.conftest import make_spec

CPU = torch.device("cpu")


def rows(file: Path, first: int, count: int) -> str:
    file.write_text(
        "".join(json.dumps({"q": f"{n} + 1 ", "a": f"= {n + 1}"}) + "\n" for n in range(first, first + count))
    )
    return str(file)


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    own = tmp_path / "own"
    for number, split in enumerate(("train", "validation", "test")):
        own.mkdir(exist_ok=True)
        rows(own / f"{split}.jsonl", 40 * number, 12)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n\n" * 60)
    table = {
        "name": "completion", "data": str(own), "prompt": "{q}", "response": "{a}", "max_eval": 6,
        "tests": {"near": rows(tmp_path / "near.jsonl", 200, 3), "far": rows(tmp_path / "far.jsonl", 9000, 9),
                  "prose": {"name": "text", "data": str(tmp_path / "text.txt"), "max_eval": 2}},
        "retain": {"code": str(tmp_path / "text.txt"),
                   "sums": {"name": "completion", "data": str(own), "prompt": "{q}", "response": "{a}"}},
    }  # fmt: skip
    return make_spec(task=table)


def test_each_is_measured_by_its_own_task_and_the_mean_is_over_them(spec, tmp_path):
    store = Store(tmp_path / "results")
    store.write_spec(spec)
    assert execute(spec, store, Options(device="cpu")) == Status.DONE
    found = store.read(spec.id).measures
    examples = prepare(spec)
    assert [len(examples.splits[f"test_{name}"]) for name in ("near", "far", "prose")] == [3, 6, 2]
    base = load_base(spec, CPU, {})
    for split in ("retain_code", "retain_sums"):
        want = metrics_of(base, spec, examples, split)[f"{split}_loss"]
        assert found[f"{split}_loss_before"] == pytest.approx(want, rel=1e-5)
        change = found[f"{split}_loss_after"] - found[f"{split}_loss_before"]
        assert found[split.replace("retain", "forgetting")] == pytest.approx(change)
    assert found["forgetting"] == pytest.approx((found["forgetting_code"] + found["forgetting_sums"]) / 2)
    before = [found["retain_code_loss_before"], found["retain_sums_loss_before"]]
    assert retention_of(base, spec, [examples]) == {"retain_loss": pytest.approx(sum(before) / 2, rel=1e-5)}
    for metric in ("loss", "token_accuracy"):
        each = [found[f"test_{name}_{metric}"] for name in ("near", "far", "prose")]
        assert found[f"test_mean_{metric}"] == pytest.approx(sum(each) / 3) and len(set(each)) > 1
    assert "test_loss" in found and not [name for name in found if find(name) is None]
    assert set(found) - set(MEASURES) <= set(known_measures([spec]))


def test_a_report_shows_each_and_the_mean(spec, tmp_path):
    store = Store(tmp_path / "results")
    table = {"base": spec.to_json() | {"seed": [0, 1]}, "table": [{"rows": ["seed"], "value": "test_far_loss"}]}
    sweep = parse_sweep(table, "x", "sets")
    for each in sweep.runs:
        store.write_spec(each)
        execute(each, store, Options(device="cpu"))
    report = write_report(load_results(store, sweep), tmp_path / "sets")
    assert not report.errors
    head = (tmp_path / "sets" / "tables" / "tests.md").read_text().splitlines()[2]
    heads = [f"test {name} token accuracy (%)" for name in ("near", "far", "prose", "mean")]
    assert head == f"| method | {' | '.join(heads)} | n | status |"
    assert (tmp_path / "sets" / "tables" / "test_far_loss.md").exists()
    about = (tmp_path / "sets" / "tables" / "COLUMNS.md").read_text()
    assert "tokens predicted right, test set near" in about and "mean over the test sets" in about


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tests": {"Boolq": "x"}}, r"task\.tests\.Boolq = .*small letters"),
        ({"tests": {"mean": "x"}}, r"task\.tests\.mean = .*no word that a measure"),
        ({"tests": {"token": "x"}}, r"task\.tests\.token = .*no word that a measure"),
        ({"tests": {"a": 3}}, r"task\.tests\.a = 3: must be a data set, or a table"),
        ({"tests": {"a": {"name": "text"}}}, r"task\.tests\.a\.data: is missing"),
        ({"tests": {"a": {"name": "tekst", "data": "x"}}}, r"task\.tests\.a\.name = .*text"),
        ({"tests": {"a": {"name": "classification", "data": "x"}}}, "needs another kind of model than completion"),
        ({"retain": {"a": {"name": "text", "data": "x", "retain": "y"}}}, r"task\.retain\.a: has tests or a retention"),
        ({"tests": "x"}, r"task\.tests = "),
        ({"tests": {"a": "x", "a_token": {"name": "multiple_choice", "data": "y"}}}, "measure test_a_token_accuracy"),
        ({"retain": 3}, r"task\.retain = 3"),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_read(change, message):
    with pytest.raises(InputError, match=message):
        make_spec(task={"name": "completion", "data": "builtin:python-code"} | change)


def test_data_that_cannot_be_used_are_refused_by_their_names_all_at_once(spec, tmp_path):
    for name in ("near.jsonl", "text.txt"):
        (tmp_path / name).unlink()
    problems = refusals([decode(RunSpec, spec.to_json())])
    where = [problem.partition(" = ")[0] for problem in problems]
    assert where == ["task.tests.near", "task.tests.prose", "task.retain.code"]
    assert all(problem.endswith("no such file or folder") for problem in problems)


def test_a_set_without_a_column_is_refused_by_its_name(spec, tmp_path):
    (tmp_path / "far.jsonl").write_text('{"q": "1"}\n')
    (problem,) = refusals([decode(RunSpec, spec.to_json())])
    assert problem.startswith('task.tests.far: task.response = "{a}": no such column')


def test_each_reference_of_a_set_has_an_answer_and_a_whole_file_is_not_said_to_be_cut(spec, tmp_path):
    table = spec.to_json()
    table["task"]["tests"] = {"near": table["task"]["tests"]["near"]}
    assert "test_near" not in prepare(decode(RunSpec, table)).notes
    own = {key: table["task"][key] for key in ("name", "prompt", "response")} | {"data": str(tmp_path / "far.jsonl")}
    table["task"]["tests"]["far"] = own | {"generate": {"max_new_tokens": 2, "answer": "zzz"}}
    (problem,) = refusals([decode(RunSpec, table)])
    assert problem.startswith('task.tests.far: task.generate.answer = "zzz": finds nothing in ')


def test_ids_stay_where_there_are_none():
    old = make_spec(task={"name": "text", "data": "builtin:python-code", "retain": "builtin:english-docs"})
    assert "tests" not in old.to_json()["task"] and old.task.sources() == {
        "task": "builtin:python-code",
        "retain": "builtin:english-docs",
    }


SPLITS = {"train": 24, "validation_matched": 4, "validation_mismatched": 7, "test_mismatched": 3}


def labelled_rows(count: int) -> list[dict[str, object]]:
    return [{"text": f"{'good' if n % 2 else 'bad'} {n}", "label": n % 2} for n in range(count)]


@pytest.fixture(params=["folder", "hub"])
def mnli(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set with two validation sets, as MNLI has them."""
    splits = {split: labelled_rows(count) for split, count in SPLITS.items()}
    if request.param == "hub":
        found = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
        return "owner/glue:mnli"
    for split, each in splits.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return str(tmp_path)


def test_one_split_of_a_source_is_a_set(mnli: str) -> None:
    sets = {"mismatched": f"{mnli}@validation_mismatched", "matched": f"{mnli}@validation"}
    usable = read_usable(Classification(data=mnli, tests=sets))
    assert {split: len(found) for split, found in usable.rows.items()} == {
        "train": 24, "validation": 4, "test": 0, "test_mismatched": 7, "test_matched": 4,
    }  # fmt: skip
    assert len(set(usable.fingerprints.values())) == 3


def test_a_split_that_is_not_there_and_a_single_one_to_train_on_are_refused(mnli: str, tmp_path: Path) -> None:
    def refused(**fields: object) -> str:
        with pytest.raises(InputError) as error:
            read_usable(Classification(**fields))
        return str(error.value)

    said = refused(data=mnli, tests={"gone": f"{mnli}@validation_gone"})
    assert said.startswith("task.tests.gone = ") and "validation_gone" in said and "Choices" in said
    assert "must be all of the data set" in refused(data=f"{mnli}@validation_mismatched")
    alone = rows(tmp_path / "alone.jsonl", 0, 3)
    assert f'task.tests.gone = "{alone}@test": a single file has no splits' in refused(
        data=mnli, tests={"gone": f"{alone}@test"}
    )
