"""Scaled directions of ΔW: their sensitivities against central differences, extremes, and the command."""

from __future__ import annotations

import json

import pytest
import torch

from lorabench.adapters.intervention.intervene import TUNED, Bench, read_run
from lorabench.adapters.intervention.usefulness import FOLDER, LOSSES, Usefulness, find, measure, sensitivities
from lorabench.adapters.intervention.usefulness_report import make_rows
from lorabench.adapters.kept import kept_parts
from lorabench.cli import main
from lorabench.store.store import Store
from lorabench.training.evaluation import retained_sets
from lorabench.updates.update import Update
from tests.adapters.intervention.test_intervene import RETAINED, pretend, random_update
from tests.conftest import make_spec

CPU = torch.device("cpu")
FULL = make_spec(method={"name": "full"}, task=RETAINED)


def attention_update(seed: int, size: float, parameter: str) -> Update:
    """ΔW of rank 3 on a query matrix."""
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(128, 3, generator=generator), torch.randn(3, 128, generator=generator)
    return Update(parameter=parameter, B=size * B, A=A / 128)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run that was never trained: two layers have changed, and the gain of a norm."""
    store = Store(tmp_path_factory.mktemp("usefulness"))
    updates = [attention_update(n, 1.0, f"model.layers.{n}.self_attn.q_proj.weight") for n in range(2)]
    pretend(store, FULL, [*updates, Update(parameter="model.norm.weight", B=torch.full((128, 1), 0.1))])
    return store


def test_sensitivities_are_the_slopes_of_the_loss(store: Store) -> None:
    bench = Bench(read_run(store, FULL.id), [], CPU)
    bench.found = found = [*find(bench.run.folder, bench.base, 2)]
    assert [len(each.triplets) for each in found] == [4, 4]
    parts = {"valid_loss": (bench.stages[-1], "validation"), "retain_loss": retained_sets(bench.stages)[0]}
    for name, part in parts.items():
        foretold = sum(sensitivities(bench.tuned, *part, found, FULL))
        for i in (1, 2):
            high, low = (bench.evaluate({"scaled": f"direction {i}", "lambda": scale})[name] for scale in (1.1, 0.9))
            assert (high - low) / 0.2 == pytest.approx(float(foretold[i - 1]), rel=0.03, abs=2e-5)


def test_without_its_only_direction_a_run_is_its_base_and_what_is_there_is_read(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path)
    run_id = pretend(store, FULL, [random_update(0, 20.0)])
    run, wanted = read_run(store, run_id), Usefulness()
    record = measure(store, run, wanted, "cpu", lambda _: None)
    at = {point["scaled"]: point for point in record["points"]}
    assert set(at) == {TUNED, "direction 1", "random 1"}
    base = Bench(run, [], CPU).evaluate({"scaled": "base", "lambda": None})
    for name in LOSSES:
        assert at["direction 1"][name] == pytest.approx(base[name], abs=1e-5) != at[TUNED][name]
    (row,) = make_rows(record)
    assert row.energy == pytest.approx(1)
    assert row.change["valid_loss"] == at["direction 1"]["valid_loss"] - at[TUNED]["valid_loss"]
    monkeypatch.setattr(Bench, "evaluate", None)
    assert measure(store, run, wanted, "cpu", lambda _: None) == record
    (file,) = tmp_path.glob(f"{FOLDER}/*/record.json")
    assert json.loads(file.read_text()) == record
    (part,) = kept_parts(store, [run_id])
    assert part.title.startswith(f"Directions of ΔW of {run_id}") and len(part.figures) == 1


def test_the_command(store: Store, tmp_path, capsys) -> None:
    command = ["intervene", FULL.id, "--each", "--top", "1", "--device", "cpu", "--results", str(store.root)]
    assert main([*command, "--figure", str(tmp_path / "each.png"), "--html", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    assert "[3/3] random 1" in err and "Δ valid_loss" in out and "directions scaled" in out
    assert (tmp_path / "each.pdf").exists() and "Which directions of ΔW are useful?" in (
        tmp_path / "page.html"
    ).read_text()
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"][FULL.id]
    assert row.keys() == {"index", "energy", "change", "first_order", "random"}
    for values, message in (("0,0.5", "--each takes a single one"), ("1", "--lambdas 1: changes nothing")):
        assert main([*command, "--lambdas", values]) == 2
        assert message in capsys.readouterr().err
