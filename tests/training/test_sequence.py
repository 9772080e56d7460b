"""Tasks in sequence: one method trained on one task after another, and what that does to each of them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.cluster.run_states import standings
from lorabench.config.decode import InputError
from lorabench.launch import estimate as estimates
from lorabench.launch.estimate import formula
from lorabench.launch.plan import count, make_plan, plan_text
from lorabench.report.figures.transfer import TransferMatrix
from lorabench.report.results import load_results, selected
from lorabench.report.tables import build_tables, write_tables
from lorabench.report.transfer import transfer_sheet
from lorabench.spec.known import known_measures
from lorabench.spec.measures import MEASURES
from lorabench.spec.run_spec import RunSpec, brief, flatten, task_names, unflatten
from lorabench.spec.sweep import parse_sweep
from lorabench.status.overview import status_json, status_text
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training import sequence
from lorabench.training.examples import Order
from lorabench.training.execute import Options, execute
from lorabench.training.stop import Stop
from tests import synthetic
from tests.conftest import make_spec
from tests.training.test_execute import stop_after

QUIET = Options(log_to_file=False, device="cpu")
CODE = {"name": "text", "data": "builtin:python-code", "max_train": 16, "max_eval": 4}
DOCS = {"name": "text", "data": "builtin:english-docs", "max_train": 16, "max_eval": 4}


def make_sequence(*tasks: dict, **changes) -> RunSpec:
    table = make_spec(**changes).to_json()
    del table["task"]
    return RunSpec.from_json(table | {"tasks": list(tasks or (CODE, DOCS))})


# ---------------------------------------------------------------- transfer, against numpy on index arithmetic

SQUARE = st.integers(2, 5).flatmap(
    lambda T: st.lists(st.lists(st.floats(0, 1), min_size=T, max_size=T), min_size=T + 1, max_size=T + 1)
)


@given(SQUARE)
def test_transfer_is_the_papers(rows: list[list[float]]) -> None:
    R = np.array(rows)
    learned = R[1:]  # the papers count tasks from 1, and have no row for the untouched base
    T = len(learned)
    backward = np.mean([learned[T - 1, i] - learned[i, i] for i in range(T - 1)])
    forward = np.mean([learned[i - 1, i] - R[0, i] for i in range(1, T)])
    forgetting = np.mean(learned[: T - 1, : T - 1].max(0) - learned[T - 1, : T - 1])
    found = sequence.measures({"token_accuracy": rows, "loss": rows})
    expected = {"average_final": learned[-1].mean(), "backward_transfer": backward, "forward_transfer": forward}
    assert found == pytest.approx(expected | {"sequence_forgetting": forgetting}, abs=1e-12)
    assert set(found) <= set(MEASURES)


def test_extremes_of_transfer() -> None:
    kept, lost = [[0, 0], [1, 0], [1, 1]], [[0, 0], [1, 0], [0, 1]]
    assert sequence.backward_transfer(kept) == sequence.forgetting(kept) == sequence.forward_transfer(kept) == 0
    assert sequence.backward_transfer(lost) == -1 and sequence.forgetting(lost) == 1
    assert sequence.measures({"accuracy": [[0.0], [0.5]]}) == {"average_final": 0.5}
    assert sequence.measures({"loss": kept}) == {}


# ---------------------------------------------------------------- specs and sweep files


def test_a_sequence_goes_through_json_and_back_and_holds_no_task_beside() -> None:
    spec = make_sequence()
    again = RunSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and again.id == spec.id
    assert "task" not in spec.to_json() and "tasks" not in make_spec().to_json()
    assert spec.task == spec.tasks[0] and spec.stages == spec.tasks and spec.total_steps == 2 * spec.steps
    assert make_sequence(DOCS, CODE).id != spec.id
    assert flatten(spec.to_json())["tasks"] == unflatten(flatten(spec.to_json()))["tasks"] == spec.to_json()["tasks"]


BASE = """
[base]
model = "builtin:tiny-llama"
method.name = "lora"
method.rank = [1, 2]
"""
TEXT = '{name = "text", data = "builtin:python-code"}'
TWO = f'tasks = [{TEXT}, {{name = "text", data = "builtin:english-docs"}}]\n'


def parse(text: str) -> list[RunSpec]:
    return list(parse_sweep(tomllib.loads(text), text).runs)


def test_a_list_of_tables_is_one_value_and_a_list_of_such_lists_an_axis() -> None:
    runs = parse(BASE + TWO)
    assert [(run.method.rank, len(run.tasks)) for run in runs] == [(1, 2), (2, 2)]
    block = '[[base.tasks]]\nname = "text"\ndata = "builtin:{}"\n'
    blocks = BASE + block.format("python-code") + block.format("english-docs")
    assert [run.id for run in parse(blocks)] == [run.id for run in runs]
    axis = BASE + f"tasks = [[{TEXT}], [{TEXT}, {TEXT.replace('text', 'completion')}]]\nlr = [1, 2]\n"
    assert [(run.method.rank, len(run.tasks), run.lr) for run in parse(axis)][:4] == [
        (1, 1, 1.0), (1, 1, 2.0), (1, 2, 1.0), (1, 2, 2.0),
    ]  # fmt: skip


def test_a_block_puts_a_sequence_in_the_place_of_the_bases_task_and_back() -> None:
    runs = parse(BASE + 'task.name = "text"\ntask.data = "x"\n[[grid]]\nseed = 1\n[[grid]]\n' + TWO)
    assert [len(run.tasks) for run in runs] == [0, 0, 2, 2]
    runs = parse(BASE + TWO + '[[grid]]\nseed = 1\n[[grid]]\ntask.name = "text"\ntask.data = "x"\n')
    assert [len(run.tasks) for run in runs] == [2, 2, 0, 0]


def test_exclude_and_zip_take_a_sequence_for_one_value() -> None:
    one, other = f"[{TEXT}]", f"[{TEXT.replace('text', 'completion')}, {TEXT}]"
    runs = parse(BASE + f"[[grid]]\ntasks = [{one}, {other}]\nexclude = [{{tasks = {one}}}]\n")
    assert [len(run.tasks) for run in runs] == [2, 2]
    zipped = f'[[grid]]\ntasks = [{one}, {other}]\nlr = [1, 2]\nzip = ["tasks", "lr"]\n'
    assert {(len(run.tasks), run.lr) for run in parse(BASE + zipped)} == {(1, 1.0), (2, 2.0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'tasks = [{name = "txt", data = "x"}]\n',
            "tasks 1: task.name = \"txt\": unknown task 'txt'. Did you",
        ),
        ('tasks = [{name = "text", data = "x"}, {data = "x"}]\n', "tasks 2: task.name: is missing"),
        ('tasks = [{name = "text", data = "x", max_eval = 0}]\n', "tasks 1: task.max_eval = 0: must be at least 1"),
        (
            'tasks = [{name = "text", data = "x", max_eval = [1, 2]}]\n',
            "tasks 1: task.max_eval = [1, 2]: must be a valid",
        ),
        ('tasks = "text"\n', 'tasks = "text": must be a list of tables'),
        ('task.name = "completion"\ntask.data = "x"\n' + TWO, "tasks: stand instead of task"),
        ("", "task: is missing"),
        (
            'tasks = [{name = "text", data = "x"}, {name = "classification", data = "x"}]\n',
            "tasks = text, classification: one model",
        ),
        (
            'tasks = [{name = "classification", data = "x", columns = "a,b"}]\n',
            'tasks 1: task.label = "label": is not among task.columns',
        ),
        (TWO + '[[table]]\nrows = ["tasks"]\nvalue = "valid_accuracy"\n', 'table 1: value = "valid_accuracy"'),
        (
            'task.name = "text"\ntask.data = "x"\n[[table]]\nrows = ["lr"]\nvalue = "backward_transfer"\n',
            'table 1: value = "backward_transfer": unknown measure',
        ),
    ],
)
def test_what_is_wrong_with_a_sequence_is_said_when_the_sweep_is_read(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        parse(BASE + text)
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith(message), error.value.problems


def test_measures_of_a_sequence_are_known_where_there_is_one() -> None:
    assert "backward_transfer" in known_measures(parse(BASE + TWO))
    assert "retain_loss_after" in known_measures([make_sequence(CODE | {"retain": "builtin:english-docs"}, DOCS)])


def test_tasks_are_named_by_what_tells_them_apart() -> None:
    assert task_names([CODE, DOCS, CODE]) == ["python-code", "english-docs", "python-code"]
    assert task_names([CODE, CODE | {"max_train": 8}]) == ["python-code (max_train 16)", "python-code (max_train 8)"]
    assert task_names([{"name": "text", "data": f"/{x}/d.txt"} for x in "ab"]) == [
        "d.txt (data /a/d.txt)",
        "d.txt (data /b/d.txt)",
    ]
    assert brief([CODE, DOCS]) == "python-code > english-docs" and brief([1, 2]) == [1, 2] and brief("x") == "x"


# ---------------------------------------------------------------- runs

SPECS = {
    "lora": make_sequence(CODE | {"retain": "builtin:english-docs"}, DOCS, steps=4),
    "evaluated": make_sequence(CODE, DOCS, CODE, steps=3, eval_every=2, schedule="cosine"),
    "dropout": make_sequence(method={"name": "lora", "rank": 2, "dropout": 0.2}, steps=4),
    "full": make_sequence(method={"name": "full"}, lr=1e-3, steps=4),
    "adalora": make_sequence(method={"name": "adalora", "rank": 2, "start_rank": 4}, steps=6),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The store with each spec's uninterrupted run."""
    store = Store(tmp_path_factory.mktemp("reference"))
    for spec in SPECS.values():
        assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    return store


def step_rows(store: Store, spec: RunSpec) -> list[dict]:
    return [json.loads(line) for line in (store.folder(spec.id) / "steps.jsonl").read_text().splitlines()]


def count_checks(spec: RunSpec, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a run looks whether it should stop."""
    seen = []
    monkeypatch.setattr(Stop, "check", lambda self: seen.append(1))
    execute(spec, Store(folder), QUIET)
    monkeypatch.undo()
    return len(seen)


@pytest.mark.parametrize("name", SPECS)
def test_a_run_stopped_at_any_place_ends_with_the_same_bits(name, reference, tmp_path, monkeypatch) -> None:
    """In the evaluations before, between and after the tasks, at the tasks' boundaries, and while training."""
    spec = SPECS[name]
    whole = count_checks(spec, tmp_path / "counted", monkeypatch)
    for checks in range(0, whole, 2) if name == "lora" else range(5, whole, 9):
        store = Store(tmp_path / str(checks))
        stop_after(monkeypatch, checks)
        assert execute(spec, store, QUIET) == Status.CANCELLED
        monkeypatch.undo()
        assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
        compare(store, reference, spec)


def test_a_run_stopped_again_and_again_ends_with_the_same_bits(reference, tmp_path, monkeypatch) -> None:
    spec, store = SPECS["evaluated"], Store(tmp_path)
    for checks in (8, 5, 9, 11):
        stop_after(monkeypatch, checks)
        assert execute(spec, store, QUIET) == Status.CANCELLED
        monkeypatch.undo()
    assert execute(spec, store, QUIET) == Status.DONE
    compare(store, reference, spec)
    assert store.read(spec.id).attempts == 5


def compare(store: Store, reference: Store, spec: RunSpec) -> None:
    found, expected = store.read(spec.id), reference.read(spec.id)
    assert found.files == expected.files and found.sequence == expected.sequence
    for name in ("valid_loss", "test_loss", "train_loss", "base_valid_loss", "backward_transfer"):
        assert found.measures[name] == expected.measures[name]
    assert step_rows(store, spec) == step_rows(reference, spec)


def test_the_record_holds_the_matrix_and_the_last_tasks_measures(reference) -> None:
    spec = SPECS["lora"]
    record = reference.read(spec.id)
    assert record.sequence["tasks"] == ["python-code", "english-docs"]
    loss, accuracy = (record.sequence["matrices"][name] for name in ("loss", "token_accuracy"))
    assert [len(row) for row in loss] == [len(row) for row in accuracy] == [2, 2, 2]
    measures = record.measures
    assert (loss[0][1], loss[2][1]) == (measures["base_valid_loss"], measures["valid_loss"])
    assert accuracy[2][1] == measures["valid_token_accuracy"]
    assert measures["backward_transfer"] == pytest.approx(accuracy[2][0] - accuracy[1][0])
    assert measures["num_train_examples"] == 32
    assert measures["forgetting"] == measures["retain_loss_after"] - measures["retain_loss_before"]
    assert set(record.environment["data"]) == {"task 1", "retain 1", "task 2"}
    assert Store(reference.root).read(spec.id) == record


def test_matrix_against_transformers_own_loss(reference) -> None:
    """The saved adapter on the first task's validation blocks, all of one length, with the model's own loss."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorabench.models.base_model import BUILTIN
    from lorabench.training.examples import prepare

    spec = SPECS["lora"]
    base = AutoModelForCausalLM.from_pretrained(BUILTIN / "tiny-llama", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(reference.folder(spec.id) / "updates")).eval()
    blocks = torch.tensor(np.stack([example["input_ids"] for example in prepare(spec).splits["validation"]]))
    with torch.no_grad():
        loss = float(tuned(input_ids=blocks.long(), labels=blocks.long()).loss)
    assert reference.read(spec.id).sequence["matrices"]["loss"][2][0] == pytest.approx(loss, rel=1e-5)


def test_the_first_task_is_trained_as_if_it_were_alone(reference, tmp_path) -> None:
    spec, alone = SPECS["dropout"], make_spec(method={"name": "lora", "rank": 2, "dropout": 0.2}, task=CODE, steps=4)
    execute(alone, Store(tmp_path), QUIET)
    assert step_rows(reference, spec)[:4] == step_rows(Store(tmp_path), alone)
    single = Store(tmp_path).read(alone.id).measures
    assert reference.read(spec.id).sequence["matrices"]["loss"][1][0] == single["valid_loss"]


def test_the_next_task_goes_on_from_the_weights_with_a_fresh_optimizer_and_schedule(tmp_path) -> None:
    """As a second run on the first one's merged model; each step sees all examples, so their order is all one."""
    import torch

    from lorabench.models.base_model import load_base, load_tokenizer

    store, common = Store(tmp_path / "results"), {"method": {"name": "full"}, "lr": 1e-3, "steps": 3, "batch_size": 8}
    code, docs = CODE | {"max_train": 8}, DOCS | {"max_train": 8}
    first, both = make_spec(task=code, **common), make_sequence(code, docs, **common)
    assert execute(first, store, QUIET) == execute(both, store, QUIET) == Status.DONE
    merged = first.method.load(load_base(first, torch.device("cpu"), {}), store.folder(first.id) / "updates", first)
    merged.save_pretrained(tmp_path / "merged")
    load_tokenizer(first.model).save_pretrained(tmp_path / "merged")
    second = make_spec(task=docs, model=str(tmp_path / "merged"), **common)
    assert execute(second, store, QUIET) == Status.DONE, store.read(second.id).error
    rows, expected = step_rows(store, both)[3:], step_rows(store, second)
    assert [row["step"] for row in rows] == [4, 5, 6]
    for row, other in zip(rows, expected, strict=True):
        assert row["lr"] == other["lr"]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
    found = store.read(both.id).measures["valid_loss"]
    assert found == pytest.approx(store.read(second.id).measures["valid_loss"], rel=1e-4)


def test_each_task_has_a_data_order_of_its_own() -> None:
    first, again, second = Order(64, 8, 1), Order(64, 8, 1, stage=0), Order(64, 8, 1, stage=1)
    assert first.indices(0) == again.indices(0) != second.indices(0)
    assert sorted(i for step in range(8) for i in second.indices(step)) == list(range(64))


def test_periodic_evaluations_count_each_tasks_own_steps(reference) -> None:
    rows = step_rows(reference, SPECS["evaluated"])
    assert [row["step"] for row in rows if "valid_loss" in row] == [2, 5, 8]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))


def write_labelled(folder: Path, words: list[str]) -> dict:
    folder.mkdir()
    for split, rows in {"train": 48, "validation": 16, "test": 16}.items():
        lines = [f"the {words[i % len(words)]} film number {i}\t{i % len(words)}\n" for i in range(rows)]
        (folder / f"{split}.tsv").write_text("text\tlabel\n" + "".join(lines))
    return {"name": "classification", "data": str(folder)}


def test_classification_shares_one_head_and_needs_the_same_classes(tiny_bases, tmp_path) -> None:
    films, colours = (write_labelled(tmp_path / name, words) for name, words in
                      {"films": ["bad", "good"], "colours": ["red", "blue"]}.items())  # fmt: skip
    store, common = (
        Store(tmp_path / "results"),
        {"model": tiny_bases["bert"], "steps": 40, "batch_size": 16, "lr": 1e-2},
    )
    spec = make_sequence(films, colours, **common)
    assert execute(spec, store, QUIET) == Status.DONE, store.read(spec.id).error
    record = store.read(spec.id)
    assert record.sequence["tasks"] == ["films", "colours"]
    R = record.sequence["matrices"]["accuracy"]
    assert R[1][0] == R[2][1] == 1.0 and R[2][1] == record.measures["valid_accuracy"]
    assert record.measures["average_final"] == pytest.approx((R[2][0] + R[2][1]) / 2)
    three = write_labelled(tmp_path / "three", ["red", "blue", "green"])
    wrong = make_sequence(films, three, **common)
    assert execute(wrong, store, QUIET) == Status.FAILED
    assert "the same number of classes, and have 2, 3" in store.read(wrong.id).error
    with pytest.raises(InputError, match="the same number of classes, and have 2, 3"):
        count(wrong)


def test_a_task_that_cannot_be_read_is_named(tmp_path) -> None:
    spec, store = make_sequence(CODE, DOCS | {"data": "builtin:java-code"}), Store(tmp_path)
    assert execute(spec, store, QUIET) == Status.FAILED
    assert store.read(spec.id).error.startswith('tasks 2: task.data = "builtin:java-code"')


def test_plan_status_and_tables_count_all_tasks(reference, tmp_path, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(estimates, "flop_rate", lambda *_: (1e9, "set by the test"))
    spec = SPECS["lora"]
    single = make_spec(task=CODE, steps=4)
    times = [formula(each, count(each), torch.device("meta")).train_seconds for each in (spec, single)]
    assert times[0] == pytest.approx(2 * times[1])
    assert count(spec).num_trainable == reference.read(spec.id).measures["num_trainable"]
    row = next(row for row in status_json(reference, standings(reference))["runs"] if row["run_id"] == spec.id)
    assert row["progress"]["steps"] == 8
    line = next(line for line in status_text(reference, standings(reference)).splitlines() if line.startswith(spec.id))
    assert "8/8" in line and "tasks=python-code > english-docs" in line
    code, docs = TEXT, '{name = "text", data = "builtin:english-docs"}'
    text = BASE + f"tasks = [[{code}, {docs}], [{docs}, {code}]]\n"
    sweep = parse_sweep(tomllib.loads(text), text)
    assert "python-code > english-docs" in plan_text(sweep, make_plan(sweep, Store(tmp_path), "cpu"))


# ---------------------------------------------------------------- tables and figures


def test_the_table_has_a_column_a_task_and_the_mean_over_seeds(tmp_path) -> None:
    results = synthetic.sequences()
    sheet = transfer_sheet(results, selected(results))
    assert [column.label for column in sheet.columns] == ["method", "rank", "after", "python-code", "english-docs"]
    assert [line[1:3] for line in sheet.rows[:3]] == [["1", "base"], ["1", "python-code"], ["1", "english-docs"]]
    tidy = sheet.tidy[sheet.tidy["measure"] == "valid_token_accuracy"]
    for rank, seeds in ((1, 3), (2, 2)):
        mean = 100 * np.mean([synthetic.MATRICES[seed] for seed in range(seeds)], axis=0)
        chunk = tidy[tidy["method.rank"] == rank]
        assert [list(map(float, chunk["mean"][i : i + 2])) for i in (0, 2, 4)] == [pytest.approx(line) for line in mean]
        assert set(chunk["n"]) == {seeds}
    assert set(sheet.tidy["measure"]) == {"valid_token_accuracy", "valid_loss"}
    files = {file.name for file in write_tables(results, build_tables(results), tmp_path / "tables")}
    assert {"transfer.csv", "transfer.md", "transfer.tex"} <= files


def test_the_figure_shows_each_settings_matrix(tmp_path) -> None:
    results = synthetic.sequences()
    drawn = TransferMatrix().draw(results)
    panels = [axes for axes in drawn.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["lora, rank 1", "lora, rank 2"]
    assert [text.get_text() for text in panels[0].texts] == ["20.0", "30.0", "60.0", "20.0", "40.0", "70.0"]
    changes = np.array(panels[0].collections[0].get_array())
    np.testing.assert_allclose(changes, [[0, 0], [40, -10], [20, 40]], atol=1e-9)
    assert "0.40" in [text.get_text() for text in TransferMatrix(metric="loss").draw(results).axes[0].texts]


def test_sequences_that_differ_have_names_that_differ(tmp_path) -> None:
    first, *others = (TEXT.replace("}", f", max_train = {n}}}") for n in (9, 7, 8))
    one, other = (f"[{text}, {first}]" for text in others)
    text = BASE + f"tasks = [{one}, {other}]\n"
    names = load_results(Store(tmp_path), parse_sweep(tomllib.loads(text), text)).runs["tasks"]
    assert set(names) == {
        "python-code (max_train 7) > python-code (max_train 9)",
        "python-code (max_train 8) > python-code (max_train 9)",
    }
