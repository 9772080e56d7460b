"""[[transfer]] of a sweep: what is moved and shown, by the records of single moves; taken up again; refusals."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from scipy import stats

from lorabench.api.analyze import analyze_sweep
from lorabench.config.decode import InputError
from lorabench.config.json_file import read_json
from lorabench.spec.sweep import Sweep, parse_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute

TEXT = """
name = "moving"
[base]
model = ["{old}", "{new}"]
task = {{ name = "text", data = "builtin:python-code", max_train = 32, max_eval = 4 }}
seq_len = 32
batch_size = 4
steps = 8
lr = 2e-2
seed = [0, 1]
serving = false
method = {{ name = "lora", rank = 2 }}

[[transfer]]
to = "{new}"
where = {{ model = "{old}" }}

[[transfer]]
to = "{new}"
by = "trans-lora"
where = {{ model = "{old}", seed = 0 }}

[[table]]
name = "moved"
rows = ["model"]
value = "valid_loss"
"""


@pytest.fixture(scope="module")
def study(tiny_bases, tmp_path_factory) -> tuple[Store, Sweep, Path]:
    """The runs of two seeds on a base and on a slightly different version of it."""
    root = tmp_path_factory.mktemp("stage")
    new = root / "new"
    shutil.copytree(tiny_bases["llama"], new)
    weights = load_file(new / "model.safetensors")
    save_file({k: 1.1 * w for k, w in weights.items()}, new / "model.safetensors", metadata={"format": "pt"})
    text = TEXT.format(old=tiny_bases["llama"], new=new)
    sweep, store = parse_sweep(tomllib.loads(text), text), Store(root / "results")
    for spec in sweep.runs:
        assert execute(spec, store, Options(log_to_file=False, device="cpu")) == Status.DONE
    return store, sweep, new


@pytest.fixture
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither analyses nor figures, which have tests of their own."""
    monkeypatch.setattr("lorabench.analysis.analyze.analyze", lambda *_, **__: {})
    monkeypatch.setattr("lorabench.report.outputs.named_figures", lambda _: {})


@pytest.mark.usefixtures("nothing_else")
def test_runs_are_moved_once_and_shown_over_seeds(study, capsys: pytest.CaptureFixture[str]) -> None:
    store, sweep, new = study
    made = analyze_sweep(store, sweep)
    assert [*made.errors] == [f"analysis transfer 2: {sweep.runs[0].id}"]  # a text has no prompts
    assert "as task completion has them" in next(iter(made.errors.values()))
    files = sorted((store.root / "transfers").glob("project-*/record.json"))
    records = [read_json(file) for file in files]
    old, twins = ([run for run in sweep.runs if (run.model == str(new)) == is_new] for is_new in (False, True))
    assert {record["key"]["run"]["run_id"] for record in records} == {run.id for run in old}
    assert {record["trained"] for record in records} == {run.id for run in twins}
    tidy = pd.read_csv(store.root / "moving" / "tables" / "moved_2.csv")  # `moved` is the sweep's own
    losses = {run.id: store.read(run.id).measures["valid_loss"] for run in sweep.runs}
    shown = {row["model"]: row for _, row in tidy[tidy["measure"] == "loss"].iterrows()}
    for name, runs in {"trained": twins, "old base + adapter": old}.items():
        values = [losses[run.id] for run in runs]
        assert shown[name]["mean"] == pytest.approx(mean(values), rel=1e-5) and shown[name]["n"] == 2
        half = stats.t.ppf(0.975, 1) * abs(values[0] - values[1]) / 2
        assert shown[name]["half_width"] == pytest.approx(half, rel=1e-3)
    assert {"new base", "random", "copied", "moved"} < {*shown} and {*tidy["by"]} == {"project"}
    page = (store.root / "moving" / "report.html").read_text()
    assert "Adapters on another base" in page and "as task completion has them" in page

    capsys.readouterr()
    written = [file.stat().st_mtime_ns for file in files]
    (files[0].parent / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    again = analyze_sweep(store, sweep, again=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "transfer 1: " in line]
    assert again.errors == made.errors and sum(f"to {new} by project" in line for line in said) == 1
    assert [file.stat().st_mtime_ns == before for file, before in zip(files, written, strict=True)] == [False, True]
    assert read_json(files[0]) == records[0]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ('to = "x"\nby = "svd"', 'transfer 1: by = "svd"'),
        ('to = ""', 'transfer 1: to = "": must name a base'),
        ("by = 'project'", "transfer 1: to: is missing"),
        ('to = "x"\nwhere = { seed = 7 }', "transfer 1: where = "),
        ('to = "x"\nwhere = { sead = 0 }', 'transfer 1: where = "sead": unknown key'),
        ('to = "x"\ndistil = { prompts = 9 }', 'transfer 1: distil: is of by = "trans-lora" alone'),
        ('to = "x"\nby = "trans-lora"\nrank = 8', "transfer 1: rank = 8: is of the ways by weights"),
        ('to = "x"\nby = "trans-lora"\ndistil = { prompts = 1 }', "transfer 1: distil"),
    ],
)
def test_what_a_sweep_may_not_ask(given: str, problem: str) -> None:
    text = TEXT.format(old="builtin:tiny-llama", new="builtin:tiny-llama").partition("[[transfer]]")[0]
    text = f"{text}\n[[transfer]]\n{given}\n"
    with pytest.raises(InputError) as error:
        parse_sweep(tomllib.loads(text), text)
    assert any(each.startswith(problem) for each in error.value.problems), error.value.problems
