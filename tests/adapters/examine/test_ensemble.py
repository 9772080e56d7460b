"""`lorabench compare` of three and more: what goes where, and what is said of layers that not all have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorabench.cli import main
from tests.adapter_files import save_dense, save_lora


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    for name, options in {"a": {}, "b": {"seed": 1}, "c": {"seed": 2, "r": 3},
                          "other": {"seed": 3, "target_modules": ["q_proj", "v_proj"]}}.items():  # fmt: skip
        save_lora(root / name, **options)
    return root


def run(capsys, *arguments):
    code = main(["compare", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_json_text_and_page_say_the_same(folders, tmp_path, capsys) -> None:
    given = [folders / name for name in "abc"]
    code, out, _ = run(capsys, *given, "--json", "--html", tmp_path / "many.html")
    found = json.loads(out)
    assert code == 0 and len(found["adapters"]) == 3 and not found["not_in_all"]
    assert [row["side"] for row in found["layers"][:2]] == ["input", "output"] and len(found["layers"]) == 12
    for row in found["layers"]:
        assert row["num_adapters"] == row["num_left_out"] == 3 and row["k"] == 4
        assert row["explained"] == sorted(row["explained"]) and row["explained"][-1] == pytest.approx(1)
        assert row["chance"] == pytest.approx(4 / row["width"]) and row["factor_cosine"] is None, "ranks 4 and 3"
    page = (tmp_path / "many.html").read_text()
    assert "3 adapters" in page and page.count("data:image/svg") == 2 and "beyond the mean" in page
    code, out, _ = run(capsys, *given)
    assert code == 0 and "Input side" in out and "of the others" in out and max(map(len, out.splitlines())) <= 100


def test_one_start_is_told(folders, capsys) -> None:
    _, out, _ = run(capsys, folders / "a", folders / "a", folders / "a")
    assert "seem to have begun at one random A" in " ".join(out.split())
    _, out, _ = run(capsys, folders / "a", folders / "b", folders / "c")
    assert "begun at" not in out


def test_layers_that_not_all_have_are_named(folders, capsys) -> None:
    code, out, _ = run(capsys, folders / "a", folders / "b", folders / "other", "--json")
    found = json.loads(out)
    assert code == 0 and {row["kind"] for row in found["layers"]} == {"q_proj"}
    assert all("up_proj" in name for name in found["not_in_all"]) and len(found["not_in_all"]) == 3


def test_one_adapter_is_no_comparison(folders, capsys) -> None:
    code, _, err = run(capsys, folders / "a")
    assert code == 2 and "needs another to be compared with" in err


def test_dense_updates_stand_with_the_directions_that_are_kept(tmp_path, capsys) -> None:
    for seed in range(3):
        save_dense(tmp_path / str(seed), {"model.layers.0.mlp.up_proj": (90, 100)}, seed)
    code, out, _ = run(capsys, *(tmp_path / str(seed) for seed in range(3)), "--json")
    first, _ = json.loads(out)["layers"]
    assert code == 0 and first["k"] == 64 and first["chance"] == 0.64 and first["factor_cosine"] is None
    assert first["left_out"] == pytest.approx(0.64, abs=0.05)


def test_a_sweep_stands_for_its_runs_that_are_done(tmp_path, capsys) -> None:
    store = Path(__file__).parents[2] / "fixtures" / "store"
    code, out, _ = run(capsys, "store", "--results", store, "--json")  # by its name there
    found = json.loads(out)
    assert code == 0 and {Path(found[side]["source"]).name for side in "ab"} == {
        each.name for each in store.glob("runs/*")
    }
    (tmp_path / "runs").mkdir()
    code, _, err = run(capsys, store / "store" / "sweep.toml", "--results", tmp_path)
    assert code == 2 and "no run of it is done and has kept updates" in err
