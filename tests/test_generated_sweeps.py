"""Sweeps made at random, through `lorabench analyze` in this process: a report each, never a traceback.

The runs are made up: of what was analyzed of a few real ones, each gets the rows of one that is like it. Most cases
draw one or two figures, none of which is rendered; some draw all, and a few are rendered in earnest.
"""

from __future__ import annotations

import json
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lorabench import analyze as engine
from lorabench import drawing, plugins
from lorabench.analyze import analyze
from lorabench.cli import main
from lorabench.decode import InputError
from lorabench.jobs import Job
from lorabench.record import RunRecord, Status, Store
from lorabench.spec import RunSpec
from lorabench.sweep import read_sweep
from lorabench.tidy import read_table
from tests.test_analyze import LAYERS, make_sweep, write_run

CASES, BATCH = int(os.environ.get("LORABENCH_TEST_SWEEPS", "30")), 10
"""Of hundreds a minute or more; a change of tables or figures is worth them."""
METHODS: list[dict[str, Any]] = [
    {"name": "lora", "rank": [1, 2, 4]},
    {"name": "lora", "rank": [2, 8], "targets": ["query", "mlp"]},
    {"name": "lora", "targets": [".*(q|v)_proj$", "all-linear"], "dropout": [0.0, 0.1]},
    {"name": "lora", "rank": [2, 4], "rslora": [False, True], "dora": [False, True]},
    {"name": "lora", "init": ["kaiming", "pissa"]},
    {"name": "lora", "rank": 2},
    {"name": "vera", "rank": [4, 8]},
    {"name": "full"},
    {"name": "bitfit"},
    {"name": "prompt", "num_tokens": [2, 4]},
    {"name": "adapter", "reduction": [4, 8]},
    {"name": "ia3"},
]
BASES: list[dict[str, Any]] = [
    {"seq_len": [32, 64]},
    {"quantization": "none", "lr": [1e-3, 1e-2]},
    {"quantization": ["none", "nf4"]},
    {"batch_size": [2, 4], "lr": 1e-3},
    {},
]
WORDS = [
    "plain", "$x_1$ and $", "50% <b>&", "a_b", "one\n\n\ntwo", "\x1b[31mred", "_first", "中", "\\frac{", "a\tb", "  ",
    "$$", "x" * 300,
]  # fmt: skip
MEASURES = (
    "valid_loss",
    "test_loss",
    "base_valid_loss",
    "peak_gib",
    "tokens_per_second",
    "forgetting",
    "storage_bytes",
)
VALUES = [
    "valid_loss",
    "test_loss",
    "storage_bytes",
    "spectrum.rank_90",
    "alignment.amplification",
    "dynamics.settled_step",
]
STATUSES = [Status.DONE] * 12 + [Status.FAILED, Status.OOM, Status.DIVERGED, Status.TIMEOUT, None, None]


def some(rng: random.Random, value: Any) -> Any:
    """Of a list a part, at least one."""
    return sorted(rng.sample(value, rng.randint(1, len(value))), key=value.index) if isinstance(value, list) else value


def make_table(rng: random.Random) -> dict[str, Any]:
    """A sweep, as its file has it."""
    base = {"task": {"name": "text"}, "seed": list(range(rng.choice([1, 1, 2, 3])))}
    base |= {key: some(rng, value) for key, value in rng.choice(BASES).items()}
    grid = []
    for method in rng.sample(METHODS, rng.choice([1, 1, 2, 3])):
        block: dict[str, Any] = {"method": {key: some(rng, value) for key, value in method.items()}}
        block |= {"snapshot_every": rng.choice([10, 50])} if rng.random() < 0.3 else {}
        grid.append(block)
    if rng.random() < 0.3:
        for number, block in enumerate(grid):
            keys = [key for key, value in block["method"].items() if isinstance(value, list)]
            keys = [f"method.{key}" for key in keys] + [
                k for k, v in base.items() if isinstance(v, list) and k != "seed"
            ]
            block["label"] = " ".join([f"{rng.choice(WORDS)} {number}", *(f"{{{key}}}" for key in keys)])
    table: dict[str, Any] = {"base": base, "grid": grid}
    if rng.random() < 0.4:
        table["select"] = {"over": "lr", "by": rng.choice(["valid_loss", "test_loss"])}
    rows = ["label"] if "label" in grid[0] else ["method.name"]
    for number in range(rng.choice([0, 1, 2])):
        values = rng.sample(VALUES, rng.randint(1, 2))
        table.setdefault("table", []).append(
            {"rows": rows, "value": values, "name": f"t{number}", "caption": rng.choice(WORDS)}
            | ({"columns": rng.choice(["seed", "lr"])} if rng.random() < 0.4 else {})
        )
    if rng.random() < 0.9:
        table["figure"] = [make_figure(rng) for _ in range(rng.choice([1, 2]))]
    return table


def make_figure(rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"name": rng.choice(plugins.names("figures"))}
    options: dict[str, Any] = {
        "containment": {"between": rng.choice(["method", "method.rank", "seed", "lr"]), "kinds": ["q_proj"]},
        "subspace_grid": {
            "between": rng.choice(["method.rank", "seed"]),
            "side": "output",
            "depth": rng.choice([0, 9]),
        },
        "heat_map": {"value": rng.choice(["spectrum.rank_90", "alignment.amplification"])},
        "depth_profile": {"lines": "setting", "value": "spectrum.rank_90"},
        "survival": {"metric": "direction_cosine"},
        "cost_quality": {"costs": ["trainable_share", "peak_gib", "storage_bytes"]},
        "rank_quality": {"value": "spectrum.rank_90"},
        "spectra": {"kinds": [rng.choice(["q_proj", "no_such"])]},
        "amplification": {"kinds": [rng.choice(["q_proj", "no_such"])]},
    }.get(found["name"], {})
    return found | {key: value for key, value in options.items() if rng.random() < 0.4}


def toml(table: dict[str, Any], prefix: str = "") -> str:
    lines, blocks = [], []
    for key, value in table.items():
        if isinstance(value, dict) and not prefix:
            blocks.append(f"[{key}]\n{toml(value, key)}")
        elif isinstance(value, dict):
            lines += [f"{key}.{line}" for line in toml(value, key).splitlines()]
        elif key in ("grid", "table", "figure"):
            blocks += [f"[[{key}]]\n{toml(item, key)}" for item in value]
        else:
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join([*lines, *blocks]) + "\n"


def write_record(rng: random.Random, store: Store, spec: RunSpec) -> None:
    status = rng.choice(STATUSES)
    if status is None or store.folder(spec.id).exists():
        return
    done = status == Status.DONE
    files = {"updates/x": "0" * 64} if done and spec.method.has_update else {}
    files |= {f"snapshots/{n:06d}/x": "0" * 64 for n in (10, 20) if files and spec.snapshot_every}
    names = [name for name in MEASURES if rng.random() < 0.85] if done else []
    provenance = {"update": spec.method.about_update(spec), "peak_gib": rng.choice(WORDS)}
    store.write_spec(spec)
    store.write(
        RunRecord(
            run_id=spec.id,
            spec=spec.to_json(),
            status=status,
            error=None if done else rng.choice(WORDS),
            files=files,
            measures={name: rng.choice([1.0, 2.5, 0.0, 1e300, rng.random()]) for name in names},
            provenance=provenance,
        )
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What each analysis finds of a run, or of a pair, of either form: factors, and dense."""
    sweep, store = make_sweep(tmp_path_factory.mktemp("base")), Store(tmp_path_factory.mktemp("store"))
    low, dense = ([spec for spec in sweep.runs if (spec.method.name == "full") == full][:2] for full in (False, True))
    for spec in [*low, *dense]:
        write_run(store, spec)
    found: dict[tuple[str, ...], Any] = {}
    seen: list[Job] = []
    keep = engine._own_tables
    engine._own_tables = lambda jobs, known: seen.extend(jobs) or keep(jobs, known)
    try:
        analyze(store, sweep, note=lambda _: None)
    finally:
        engine._own_tables = keep
    for job in seen:
        table = read_table(job.file, job.key)
        if table is not None:
            forms = ["dense" if record.spec["method"]["name"] == "full" else "low" for record in job.records]
            found[job.analysis.name, *forms] = table
    return found


def tables_of(rows: dict[tuple[str, ...], Any], jobs: list[Job], known: Any) -> dict[Job, Any]:
    """A table for each job, of the layers that its runs have."""
    found = {}
    for job in jobs:
        methods = [record.spec["method"] for record in job.records]
        forms = ["dense" if method["name"] in ("full", "bitfit") else "low" for method in methods]
        table = rows.get((job.analysis.name, *forms)) or rows.get((job.analysis.name, *forms[::-1]))
        targets = {method.get("targets") for method in methods}
        for part, layer in (("query", "q_proj"), ("mlp", "up_proj")):
            if table is not None and part in targets:
                table = table.filter([layer in name for name in table["layer"].to_pylist()])
        if table is not None:
            found[job] = table
    return found


@pytest.fixture
def light(monkeypatch, rows):
    """Nothing is computed, rendered, or waited for."""

    def save(figure: Any, stem: Path) -> list[Path]:
        files = [stem.with_suffix(".pdf"), stem.with_suffix(".png")]
        stem.parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.write_bytes(b"-")
        drawing.plt.close(figure)
        return files

    monkeypatch.setattr(engine, "_own_tables", partial(tables_of, rows))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with monkeypatch.context() as patch:
        yield patch, save


@pytest.mark.parametrize("batch", range(CASES // BATCH))
def test_a_sweep_made_at_random_has_its_report(tmp_path, monkeypatch, light, capsys, batch):
    patch, save = light
    really, draw = drawing.save, FigureCanvasAgg.draw
    codes, wrong = [], []
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        rng = random.Random(number)
        patch.setattr(drawing, "save", really if number % 40 == 0 else save)
        patch.setattr(FigureCanvasAgg, "draw", draw if number % 40 == 0 else lambda self, *_: None)
        store, name = Store(tmp_path), f"case{number}"
        file = store.root / name / "sweep.toml"
        file.parent.mkdir()
        file.write_text(toml(make_table(rng)), "utf-8")
        try:
            for spec in read_sweep(file).runs:
                write_record(rng, store, spec)
        except InputError:
            pass  # said once more by the command
        code = main(["analyze", str(store.root), name])
        out, talk = capsys.readouterr()
        if code == 1:
            wrong.append(f"case {number}\n{file.read_text()}\n{talk}")
            continue
        assert code == 0 or "error: " in talk
        assert code == 2 or "report.html" in out.split()[-1]
        assert "Traceback" not in talk and "\x1b" not in out + talk
        codes.append(code)
    assert not wrong, "\n".join(wrong)
    assert codes.count(0) >= 0.5 * len(codes), "most are sweeps that can be run"


def test_the_layers_that_are_told_apart_are_there():
    assert [name.rpartition(".")[2] for name in LAYERS] == ["q_proj", "up_proj"]
