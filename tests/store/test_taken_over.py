"""A results folder of an older version counts as it is: the same ids, nothing computed anew, the same tables.

`fixtures/store` was made at commit d0d0d50 by `lorabench run` and `lorabench analyze` of the sweep that lies in it, in
a checkout at /lorabench; claims, logs, figures and the cache of W0 are left out, and of tables the digests are kept.
"""

import hashlib
import shutil
from pathlib import Path

import pytest

from lorabench.cli import main
from lorabench.config import plugins
from lorabench.spec.sweep import read_sweep
from lorabench.store.record import Status
from lorabench.store.store import Store

MENDED = {
    "angles": 2, "survival": 2, "intruders": 2, "overlap": 1, "interference": 1, "spectrum": 1, "dynamics": 1,
    "alignment": 2, "singular_values": 1,
}  # fmt: skip
"""Versions of then of analyses whose numbers, or chance, have been mended since: they are computed anew, of course."""
FIXTURE = Path(__file__).parents[1] / "fixtures" / "store"


@pytest.fixture
def store(tmp_path) -> Store:
    shutil.copytree(FIXTURE, tmp_path / "results")
    return Store(tmp_path / "results")


def contents(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_nothing_is_trained_anew(store, capsys):
    before = contents(store.root / "runs")
    sweep = store.root.parent / "named.toml"  # what the sweep of then left to the defaults is asked for now
    text = (store.root / "store" / "sweep.toml").read_text("utf-8")
    named = '[base]\nmodel = "builtin:tiny-llama"\ntask.data = "builtin:python-code"\n'
    sweep.write_text(text.replace("[base]\n", named), "utf-8")
    assert sorted(spec.id for spec in read_sweep(sweep).runs) == store.run_ids()
    assert {store.verified(state).status for state in store.states()} == {Status.DONE}
    assert main(["run", str(sweep), "--results", str(store.root)]) == 0
    assert "2 done" in capsys.readouterr().err
    assert contents(store.root / "runs") == before


def test_nothing_is_analyzed_anew_and_the_tables_are_the_same(store, monkeypatch):
    names, then = plugins.names, {file.stem for file in FIXTURE.rglob("*.parquet")}
    of_then = lambda folder: [name for name in names(folder) if folder != "analyses" or name in then]  # noqa: E731
    monkeypatch.setattr(plugins, "names", of_then)  # those that are new are computed, of course
    for name, version in MENDED.items():
        monkeypatch.setattr(plugins.plugin_class("analyses", name), "version", version)
    before = {name: contents(store.root / name) for name in ("runs", "pairs")}
    assert main(["analyze", str(store.root), "store"]) == 0
    assert {name: contents(store.root / name) for name in before} == before
    assert not (store.root / "bases").exists(), "no W0 was asked for"
    found = contents(store.root / "store" / "tables")
    lines = (store.root / "store" / "tables.sha256").read_text("utf-8").splitlines()
    expected = {name: digest for digest, name in (line.split() for line in lines)}
    assert expected.keys() >= {"runs.csv", "summary.csv", "metrics.csv", "changes.csv", "pairs.csv"}
    assert {name: found[name] for name in expected} == expected | {"pairs.csv": found["pairs.csv"]}
    pairs = as_then((store.root / "store" / "tables" / "pairs.csv").read_text("utf-8"))
    assert hashlib.sha256(pairs.encode()).hexdigest() == expected["pairs.csv"]


def as_then(table: str) -> str:
    """`pairs.csv` with its columns in the order of then, and without the corrected p-values, which came since."""
    lines = [line.split(",") for line in table.splitlines()]
    last = ["metric", "null_std", "side", "value", "null"]
    heads = [head.strip('"') for head in lines[0]]
    order = [heads.index(head) for head in [*(head for head in heads if head not in last), *last]]
    kept = [line for line in lines if '"p_value_corrected"' not in line]
    return "".join(",".join(line[place] for place in order) + "\n" for line in kept)
