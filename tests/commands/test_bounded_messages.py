"""What a message quotes is bounded and printable, and the message one line, whatever was given, and wherever."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorabench.cli import main
from lorabench.cluster.profile import read_profile
from lorabench.cluster.run_states import Standing
from lorabench.config.decode import InputError
from lorabench.config.quote import LENGTH, LINE, PATH, message, show_path
from lorabench.data.dataset import read_data
from lorabench.launch.pool import labels
from lorabench.models.base_model import resolve
from lorabench.spec.sweep import parse_sweep
from lorabench.spec.task import Task
from lorabench.status.overview import status_text
from lorabench.store.store import Store
from lorabench.tasks.classification import Classification
from lorabench.tasks.completion import Completion
from lorabench.tasks.regression import Regression
from lorabench.training.examples import read_usable
from lorabench.updates.formats import open_adapter
from tests.conftest import BASE, TOY, make_spec

SPACED = ("a few words %s \x1b[31m of {} \u202e and\nso on, " * 300)[:10_000]
HOSTILE = {"spaced": SPACED, "unbroken": SPACED.replace(" ", "_"), "letters": 10_000 * "x"}
MOST = 400
"""Characters of a message, beside choices that it lists."""


def sweep(_: Path, base: dict[str, Any] | None = None, **sections: Any) -> None:
    usual = TOY | {"method": {"name": "lora"}, "seed": [0, 1]}
    parse_sweep({"base": usual | (base or {}), **sections}, default_name="a")


def of_sweep(key: str, value: Any) -> Callable[[Path], None]:
    return partial(sweep, base={key: value})


def section(key: str, value: Any) -> Callable[[Path], None]:
    return partial(sweep, **{key: value})


def task(folder: Path, kind: type[Task] = Classification, rows: list[Any] | None = None, **fields: Any) -> None:
    """Its validation split has these rows."""
    good = [{"text": "a", "label": 1}, {"text": "c", "label": 2}]
    for split in ("train", "validation", "test"):
        used = rows if rows and split == "validation" else good
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in used))
    read_usable(kind(data=str(folder), **fields))


def file(folder: Path, name: str, content: str, **options: Any) -> None:
    (folder / name).write_text(content)
    read_data(str(folder / name), **options)


def adapter(folder: Path, tensor: str = "base_model.model.q.lora_A.weight", **changes: Any) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    other = tensor.replace("lora_A", "lora_B")
    save_file({tensor: torch.ones(2, 4), other: torch.ones(4, 3)}, folder / "adapter_model.safetensors")
    for entry in open_adapter(folder).updates:
        entry.load()


def profile(folder: Path, table: dict[str, Any]) -> None:
    (folder / "a.toml").write_text('kind = "slurm"\n')
    read_profile(folder / "a.toml", table)


def stored(folder: Path, **changes: Any) -> None:
    """A run whose record has these fields; its problem, as `status` tells of it, is raised."""
    spec, store = make_spec(), Store(folder)
    store.write_spec(spec)
    record = {"run_id": spec.id, "spec": spec.to_json(), "status": "done"} | changes
    (store.folder(spec.id) / "record.json").write_text(json.dumps(record))
    state = store.verified(store.state(spec.id))
    if state.error:
        raise InputError(state.error)


REFUSED: dict[str, Callable[[str], Callable[[Path], Any]]] = {
    "sweep: section": lambda v: section(v, {}),
    "sweep: name": lambda v: section("name", v),
    "sweep: key": lambda v: of_sweep(v, 1),
    "sweep: value of an unknown key": lambda v: of_sweep("stepps", v),
    "sweep: number": lambda v: of_sweep("lr", v),
    "sweep: choice": lambda v: of_sweep("quantization", v),
    "sweep: pattern": lambda v: of_sweep("keep", v),
    "sweep: list": lambda v: of_sweep("steps", [v, [v]]),
    "sweep: method": lambda v: of_sweep("method", {"name": v}),
    "sweep: key of a method": lambda v: of_sweep("method", {"name": "lora", v: 1}),
    "sweep: field of a method": lambda v: of_sweep("method", {"name": "lora", "rank": v}),
    "sweep: pattern of ranks": lambda v: of_sweep("method", {"name": "lora", "rank_pattern": {f"({v}": 1}}),
    "sweep: type of a PEFT method": lambda v: of_sweep("method", {"name": "peft", "type": v}),
    "sweep: config of a PEFT method": lambda v: of_sweep("method", {"name": "peft", "type": "BOFT", "config": {v: v}}),
    "sweep: task": lambda v: of_sweep("task", {"name": v, "data": "a"}),
    "sweep: columns of a task": lambda v: of_sweep(
        "task", {"name": "classification", "data": "a", "label": v, "columns": f"{v}!"}
    ),
    "sweep: tasks": lambda v: of_sweep("tasks", v),
    "sweep: zip": lambda v: section("grid", [{"zip": [v, "seed"]}]),
    "sweep: zip, often": lambda v: section("grid", [{v: [1], "zip": [[v, "seed"], [v, "lr"]]}]),
    "sweep: exclude": lambda v: section("exclude", [{v: 1}]),
    "sweep: label": lambda v: section("grid", [{"label": f"{{{v}}}".replace("{}", "")}]),
    "sweep: one label": lambda v: section("grid", [{"label": v.replace("{}", ""), "lr": [1e-3, 1e-2]}]),
    "sweep: select.over": lambda v: section("select", {"over": v, "by": "valid_loss"}),
    "sweep: select.by": lambda v: section("select", {"over": "lr", "by": v}),
    "sweep: table.value": lambda v: section("table", [{"rows": ["seed"], "value": v}]),
    "sweep: table.rows": lambda v: section("table", [{"rows": [v], "value": "valid_loss"}]),
    "sweep: table.columns": lambda v: section("table", [{"rows": [v], "columns": v, "value": "valid_loss"}]),
    "sweep: table.name": lambda v: section("table", [{"rows": ["seed"], "value": "valid_loss", "name": v}]),
    "sweep: figure": lambda v: section("figure", [{"name": v}]),
    "sweep: value of a figure": lambda v: section("figure", [{"name": "rank_quality", "value": v}]),
    "sweep: key of a figure": lambda v: section("figure", [{"name": "heat_map", v: v}]),
    "model": lambda v: lambda _: resolve(f"./{v}"),
    "model: built in": lambda v: lambda _: resolve(f"builtin:{v}"),
    "data": lambda v: lambda _: read_data(f"./{v}"),
    "data: built in": lambda v: lambda _: read_data(f"builtin:{v}"),
    "data: twice in a header": lambda v: partial(file, name="a.tsv", content="\t".join(2 * [v.replace("\n", " ")])),
    "data: cells beside a header": lambda v: partial(file, name="a.tsv", content=v.replace("\n", " ") + "\na\tb"),
    "data: key that stands twice": lambda v: partial(file, name="a.jsonl", content=f"{{{json.dumps(v)}: 1, " * 2),
    "data: too few rows": lambda v: partial(
        file, name="a.jsonl", content="".join(json.dumps({v: i}) + "\n" for i in range(2)), label=v
    ),
    "task: column of texts": lambda v: partial(task, text=v),
    "task: column of labels": lambda v: partial(task, label=v),
    "task: columns that are there": lambda v: partial(task, rows=[{v: 1, f"{v} 2": 1}]),
    "task: a list": lambda v: partial(task, rows=[{"text": [v], "label": 1}]),
    "task: a key": lambda v: partial(task, rows=[{"text": {v: v}, "label": 1}]),
    "task: no Unicode": lambda v: partial(task, rows=[{"text": f"{v}\ud800", "label": 1}]),
    "task: new class": lambda v: partial(task, rows=[{"text": "a", "label": v}]),
    "task: score": lambda v: partial(task, kind=Regression, rows=[{"text": "a", "label": v}]),
    "task: template": lambda v: partial(task, kind=Completion, prompt=f"{{{v}", response="{text}"),
    "task: column of a template": lambda v: partial(
        task, kind=Completion, prompt=f"{{{v.replace('{}', '')}}}", response="{text}"
    ),
    "adapter: type": lambda v: partial(adapter, peft_type=v),
    "adapter: rank": lambda v: partial(adapter, r=v),
    "adapter: alpha": lambda v: partial(adapter, lora_alpha=v),
    "adapter: pattern": lambda v: partial(adapter, rank_pattern={f"({v}": 2}),
    "adapter: bias": lambda v: partial(adapter, init_lora_weights=v),
    "adapter: tensor": lambda v: partial(adapter, tensor=f"base_model.model.{v}.lora_A.weight"),
    "adapter: file": lambda v: lambda _: open_adapter(f"./{v}"),
    "profile: key": lambda v: partial(profile, table={v: 1}),
    "profile: kind": lambda v: partial(profile, table={"kind": v}),
    "profile: number": lambda v: partial(profile, table={"gpus": v}),
    "profile: GPUs": lambda v: partial(profile, table={"gpu_type": v, "gpus": 0}),
    "profile: environment": lambda v: partial(profile, table={"environment": {f"{v}!": "1"}}),
    "profile: extra": lambda v: partial(profile, table={"extra": {"array": v, v: "1"}}),
    "store: run": lambda v: partial(stored, run_id=v),
    "store: status": lambda v: partial(stored, status=v),
    "store: spec": lambda v: partial(stored, spec={"method": {"name": v}, v: v}),
    "store: measure": lambda v: partial(stored, measures={v: 1.0}),
    "store: environment": lambda v: partial(stored, environment={"hardware": v}),
    "store: file": lambda v: partial(stored, files={v.replace("/", "."): "a"}),
    "store: key": lambda v: partial(stored, **{v: v}),
}


def check(text: str, value: str, extra: int = 0) -> None:
    assert text.isprintable() and len(text) <= LINE, (len(text), text)
    beside, _, choices = text.partition("Choices: ")
    assert len(beside) <= MOST + extra, (len(beside), text)
    assert value[:12] not in text or len(choices) < LINE


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_bounded_line(case: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        REFUSED[case](value)(tmp_path)
    for problem in error.value.problems:
        check(problem, value)


COMMANDS = [
    "VALUE", "run VALUE", "run SWEEP --device VALUE", "run SWEEP --retry VALUE", "run SWEEP --workers VALUE",
    "run SWEEP --sharding VALUE", "run SWEEP --checkpoint-seconds VALUE", "run SWEEP --VALUE", "run SWEEP VALUE",
    "run SWEEP --results VALUE", "plan VALUE", "plan SWEEP --device VALUE", "submit SWEEP --cluster VALUE",
    "status VALUE", "status RESULTS VALUE", "logs VALUE --results RESULTS", "cancel VALUE --results RESULTS",
    "analyze VALUE", "analyze RESULTS VALUE", "report RESULTS VALUE", "paper VALUE", "paper RESULTS VALUE",
    "merge VALUE VALUE --results RESULTS",
    "merge a b --results RESULTS --by VALUE", "merge a b --results RESULTS --weights VALUE", "inspect VALUE",
    "inspect RESULTS --base VALUE", "compare VALUE RESULTS", "convert VALUE RESULTS",
    "compress VALUE --results RESULTS", "compress VALUE/a --results RESULTS --like a",
    "compress a --results RESULTS --energy VALUE", "transfer VALUE --to RESULTS -o out",
    "transfer RESULTS --to VALUE -o out", "intervene VALUE --results RESULTS", "list VALUE",
    "new --task VALUE", "export RESULTS VALUE --to csv", "export RESULTS --to VALUE",
    "completion VALUE",
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_is_wrong_in_one_bounded_line(
    command: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(f'{BASE}method.name = "lora"\n')
    (tmp_path / "results" / "runs").mkdir(parents=True)
    given = {"SWEEP": "a.toml", "RESULTS": "results"}
    argv = [given.get(word, word.replace("VALUE", value)) for word in command.split()]
    try:
        code = main(argv)
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("usage:", " "))]
    assert code == 2 and not out and lines, (code, out, err)
    for line in lines:
        assert line.startswith("lorabench") and "error: " in line, line
        check(line, value, extra=20)


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_a_run_is_called_by_bounded_values(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the lines of `run`, and in both tables of `status`."""
    prompts = [value, f"{value} "]
    task = {"name": "completion", "data": "a", "prompt": prompts}
    swept = parse_sweep({"base": TOY | {"task": task, "method": {"name": "head"}}}, default_name="a")
    assert all(text.isprintable() and len(text) < 2 * LENGTH for text in labels(swept).values())
    store = Store(tmp_path)
    found = [Standing(state=state) for state in store.states(list(swept.runs))]
    text = status_text(store, [replace(each, state=replace(each.state, spec=spec.to_json()))
                               for each, spec in zip(found, swept.runs, strict=True)], 2)  # fmt: skip
    assert all(line.isprintable() and len(line) < MOST for line in text.splitlines())


def test_a_message_keeps_both_its_ends() -> None:
    assert message("a = 1: must be 2") == "a = 1: must be 2"
    text = message(f"a = {10_000 * 'x'}: must be 2")
    assert text.startswith("a = xxx") and text.endswith("xxx: must be 2") and len(text) < 2 * PATH
    assert message("one\ntwo \x1b[1m") == r"one\ntwo \x1b[1m"
    assert len(message(10_000 * "a b ")) == LINE


def test_of_a_long_path_the_end_is_shown() -> None:
    assert show_path(Path("a/b.csv")) == "a/b.csv"
    text = show_path(f"{300 * 'folder/'}films.csv")
    assert text.startswith("…") and text.endswith("/films.csv") and len(text) == PATH
