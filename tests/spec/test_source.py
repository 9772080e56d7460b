"""Sweeps from a dict, a text and a file; keys changed; and the whole spec of a run."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

from lorabench.config.decode import InputError
from lorabench.config.toml_text import as_toml
from lorabench.spec.resolved import find_run, resolved, resolved_text
from lorabench.spec.source import as_sweep, parse_change
from lorabench.spec.sweep import read_sweep
from tests.conftest import BASE, TOY

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "sweeps").rglob("*.toml"))
TWO = f"""# Question: what?
{BASE}
[[grid]] # low ranks
method.name = "lora"
method.rank = [1, 2] # few
lr = 1e-2

[[grid]]
method.name = "full"
"""


def told(sweep):
    return [spec.id for spec in sweep.runs], sweep.tables, sweep.figures, sweep.claims, sweep.select, sweep.labels


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_dict_a_text_and_a_file_are_one_sweep_and_its_text_says_the_same(file):
    expected, table = read_sweep(file), tomllib.loads(file.read_text())
    assert tomllib.loads(as_toml(table)) == table
    for source in (table, file.read_text(), str(file)):
        assert told(as_sweep(source)) == told(expected)
    assert told(as_sweep(as_sweep(table).text)) == told(expected)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_changed_keys_are_in_every_run_and_all_else_of_the_file_stays(file):
    sweep = as_sweep(file, {"seq_len": 48, "threads": 2, "name": "other"})
    before = [{**spec.flat, "seq_len": 48, "threads": 2} for spec in read_sweep(file).runs]
    assert [spec.flat for spec in sweep.runs] == [flat for n, flat in enumerate(before) if flat not in before[:n]]
    assert sweep.name == "other" and tomllib.loads(sweep.text)["base"]["seq_len"] == 48
    kept = [line for line in file.read_text().splitlines() if not line.startswith(("seq_len", "name"))]
    assert [line for line in sweep.text.splitlines() if line in kept] == kept
    assert sweep.text.startswith('# Changed: seq_len = 48; threads = 2; name = "other".\n')


def test_dotted_keys_and_arrays_of_a_dict():
    table = {"base": TOY, "grid": [{"method.name": "lora", "method": {"rank": np.array([1, 2])}, "lr": (1e-3, 1e-2)}]}
    runs = as_sweep(table).runs
    assert [(run.method.rank, run.lr) for run in runs] == [(1, 1e-3), (1, 1e-2), (2, 1e-3), (2, 1e-2)]
    with pytest.raises(InputError, match=r"base.revision = null: leave the key out"):
        as_sweep({"base": {**TOY, "revision": None}})
    with pytest.raises(InputError, match=r"base.lr = .*: must be a text, a number"):
        as_sweep({"base": {**TOY, "lr": {1e-3}}})


@pytest.mark.parametrize(
    "change, expected",
    [("lr=1e-3", [("lora", 1, 1e-3), ("lora", 2, 1e-3), ("full", None, 1e-3)]),
     ("method.rank=[4]", [("lora", 4, 1e-2), ("full", None, 1e-3)]),
     ('method={name="head"}', [("head", None, 1e-2), ("head", None, 1e-3)])],
)  # fmt: skip
def test_a_key_is_changed_where_the_blocks_give_it(change, expected):
    sweep = as_sweep(TWO, dict([parse_change(change)]))
    assert [(run.method.name, getattr(run.method, "rank", None), run.lr) for run in sweep.runs] == expected
    assert "# low ranks" in sweep.text and "# Question: what?" in sweep.text


@pytest.mark.parametrize(
    "change, text",
    [("lr", "--set lr: must be KEY=VALUE"),
     ("model=builtin:x", "--set model=builtin:x: the value is not valid TOML; a text has quotes: --set 'model=\"buil"),
     ("lr=1\nsteps=2", "the value is not valid TOML"),
     ("lr=nan", "--set lr=nan: value = nan: must be a finite number")],
)  # fmt: skip
def test_changes_that_are_none(change, text):
    with pytest.raises(InputError, match=text.replace("(", r"\(")):
        as_sweep(TWO, dict([parse_change(change)]))


@pytest.mark.parametrize(
    "changes, text",
    [({"ranks": 3}, "ranks = 3: unknown key 'ranks'"), ({"lr": -1.0}, "lr = -1.0: must be greater than 0"),
     ({"lr.x": 1}, "base.lr.x|lr"), ({"name": "runs"}, 'name = "runs": must be')],
)  # fmt: skip
def test_changes_that_do_not_fit_are_told_as_a_files_are(changes, text):
    with pytest.raises(InputError, match=text):
        as_sweep(TWO, changes)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_whole_spec_of_a_run_is_that_run_again(file):
    sweep = read_sweep(file)
    for spec in sweep.runs[:: max(1, len(sweep.runs) // 5)]:
        text = resolved_text(sweep, spec)
        again = as_sweep("[base]\n" + text)
        assert [run.id for run in again.runs] == [spec.id]
        assert all(line.startswith("# ") for line in text.splitlines() if ": none" in line)
        unmarked = {line.partition(" ")[0] for line in text.splitlines()[1:] if not line.endswith("# default")}
        given = {
            key for key in tomllib.loads(file.read_text())["base"] if not isinstance(sweep.runs[0].flat.get(key), dict)
        }
        assert {key for key in spec.flat if key in given} <= unmarked
        assert {*resolved(sweep, spec)["spec"]} >= {"seed", "objective", "snapshot_every"}


def test_a_run_is_found_by_how_its_id_begins():
    sweep = as_sweep(TWO)
    first, second, full = sweep.runs
    assert find_run(sweep, first.id) is first and find_run(sweep, "full") is full
    assert find_run(sweep, second.id.rpartition("-")[2][:6]) is second
    with pytest.raises(InputError, match=f"RUN = lora: is the beginning of 2 runs: {first.id}, {second.id}"):
        find_run(sweep, "lora")
    with pytest.raises(InputError, match="RUN = none: unknown run 'none'"):
        find_run(sweep, "none")
