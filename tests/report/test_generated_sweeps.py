"""Sweeps made at random, through `lorabench analyze` in this process: a report each, never a traceback.

The runs are made up: of what was analyzed of a few real ones, each gets the rows of one that is like it. One case in
six is spoilt on purpose, in a way that is known: there the sweep is refused, with the message for it. Figures are drawn
in some cases, and hardly ever rendered.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lorabench.analysis import analyze as engine
from lorabench.analysis.analyze import analyze
from lorabench.analysis.cache import read_tables
from lorabench.analysis.jobs import Job
from lorabench.cli import main
from lorabench.config import plugins
from lorabench.processes.machine import process_start
from lorabench.report import drawing, outputs
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import read_sweep
from lorabench.store import claim
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests.analysis.test_analyze import LAYERS, make_sweep, write_run

CASES, BATCH = int(os.environ.get("LORABENCH_TEST_SWEEPS", "200")), 50
"""Of a thousand some minutes; a change of tables or figures is worth them. All figures are drawn there."""
DRAWN, RENDERED = (1 if CASES > 200 else 8), 200
"""One case in so many."""
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
CODE = "builtin:python-code"
TASKS: list[dict[str, Any]] = [
    {"task": {"name": "text", "data": CODE}},
    {"task": {"name": "text", "data": CODE, "retain": "builtin:english-docs"}},
    {"task": {"name": "completion", "data": CODE}},
    {"tasks": [{"name": "text", "data": CODE}, {"name": "text", "data": "builtin:english-docs"}]},
    {
        "tasks": [
            [{"name": "text", "data": CODE}],
            [{"name": "text", "data": "builtin:english-docs"}, {"name": "text", "data": CODE}],
        ]
    },
]
COMMON = (
    "valid_loss", "test_loss", "base_valid_loss", "valid_token_accuracy", "peak_gib", "tokens_per_second",
    "model_flops_utilization", "updates_bytes", "total_seconds",
)  # fmt: skip
SERVING = (
    "storage_bytes", "merge_error", "adapter_load_seconds", "adapter_swap_seconds", "mixed_batch_seconds",
    "prefill_base_batch_1_seconds", "added_prefill_merged_batch_1", "decode_merged_batch_8_tokens_per_second",
)  # fmt: skip
RETENTION = ("retain_loss_before", "retain_loss_after", "forgetting")
SEQUENCE = ("average_final", "backward_transfer", "forward_transfer", "sequence_forgetting")
METRICS = ("spectrum.rank_90", "spectrum.relative_norm", "alignment.amplification")
NUMBERS = [1.0, 2.5, 0.0, -0.25, 1e-9, 1e300, float("nan")]
STATUSES = [Status.DONE] * 12 + [
    Status.FAILED, Status.OOM, Status.DIVERGED, Status.TIMEOUT, Status.CANCELLED, Status.RUNNING,
    "missing", "claimed", "alive", "cut short", "edited", "strange",
]  # fmt: skip


def some(rng: random.Random, value: Any) -> Any:
    """Of a list a part, at least one."""
    return sorted(rng.sample(value, rng.randint(1, len(value))), key=value.index) if isinstance(value, list) else value


def make_table(rng: random.Random) -> dict[str, Any]:
    """A sweep that can be run, as its file has it."""
    base: dict[str, Any] = {
        "model": "builtin:tiny-llama",
        "seed": list(range(rng.choice([1, 1, 2, 3]))),
    } | copy.deepcopy(rng.choice(TASKS))
    base |= {key: some(rng, value) for key, value in rng.choice(BASES).items()}
    base |= {"serving": False} if rng.random() < 0.3 else {}
    grid = [make_block(rng, base) for _ in range(rng.choice([1, 1, 2, 3]))]
    table: dict[str, Any] = {"base": base, "grid": grid}
    values = [*COMMON, *METRICS, *(SERVING if base.get("serving", True) else ())]
    values += RETENTION if "retain" in base.get("task", ()) else ()
    values += SEQUENCE if "tasks" in base else ()
    values += ["dynamics.settled_step"] if any("snapshot_every" in block for block in grid) else ()
    if rng.random() < 0.3:
        add_labels(rng, base, grid)
    if rng.random() < 0.4:
        table["select"] = {
            "over": "lr",
            "by": rng.choice([name for name in values if "." not in name and name[:5] not in ("test_", "base_")]),
        }
    rows = ["label"] if "label" in grid[0] else ["method.name"]
    for number in range(rng.choice([0, 1, 2])):
        table.setdefault("table", []).append(
            {"rows": rows, "value": rng.sample(values, rng.randint(1, 2)), "name": f"t{number}",
             "caption": rng.choice(WORDS)}
            | ({"columns": rng.choice(["seed", "lr", "tasks" if "tasks" in base else "task.name"])}
               if rng.random() < 0.4 else {})
        )  # fmt: skip
    if rng.random() < 0.9:
        table["figure"] = [make_figure(rng) for _ in range(rng.choice([1, 2]))]
    own = random.Random(str(table))  # so that all else is as it is without claims
    if own.random() < 0.4:
        table["claim"] = [make_claim(own, values) for _ in range(own.choice([1, 3]))]
    return table


def make_claim(rng: random.Random, values: list[str]) -> dict[str, Any]:
    found = {"says": rng.choice(WORDS).strip() or "so it is", "measure": rng.choice(values), "where": {"seed": 0}}
    found |= rng.choice([{}, {"minus": {}}, {"ratio_to": {"seed": [0, 1]}}])
    return found | rng.choice(
        [{"at_most": rng.choice([0.0, 1e300])}, {"at_least": 1.0}, {"at_least": -1, "at_most": 2}]
    )


def make_block(rng: random.Random, base: dict[str, Any]) -> dict[str, Any]:
    """A block of the grid, of a method that can be had on such a base."""
    method = rng.choice(METHODS)
    while "nf4" in base.get("quantization", ()) and (method["name"] in ("full", "bitfit") or "init" in method):
        method = rng.choice(METHODS)
    block: dict[str, Any] = {"method": {key: some(rng, value) for key, value in method.items()}}
    return block | ({"snapshot_every": rng.choice([10, 50])} if rng.random() < 0.3 else {})


def add_labels(rng: random.Random, base: dict[str, Any], grid: list[dict[str, Any]]) -> None:
    """A label for each block, that names all in which its runs differ."""
    shared = [key for key, value in base.items() if isinstance(value, list) and key != "seed"]
    for number, block in enumerate(grid):
        keys = [f"method.{key}" for key, value in block["method"].items() if isinstance(value, list)] + shared
        block["label"] = " ".join([f"{rng.choice(WORDS)} {number}", *(f"{{{key}}}" for key in keys)])


def spoil_quantization(table: dict[str, Any]) -> None:
    table["base"]["quantization"] = "nf4"
    table["grid"][0]["method"] = {"name": "full"}


def spoil_label(table: dict[str, Any]) -> None:
    for block in table["grid"]:
        block["label"] = "one for all"
    table["base"]["batch_size"] = [2, 4]


def spoil_labels(table: dict[str, Any]) -> None:
    table["grid"] = [{"method": {"name": "head"}, "label": "named"}, {"method": {"name": "layernorm"}}]


SPOILT: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (spoil_quantization, 'quantization = "nf4": method full trains the base weights'),
    (spoil_label, 'label = "one for all": is given to runs that differ in '),
    (spoil_labels, "label: is missing in some [[grid]] blocks"),
    (lambda table: table["grid"][0]["method"].update(name="lorra"), "unknown method 'lorra'. Did you mean 'lora'?"),
    (lambda table: table["base"].update(steps=0), "steps = 0: must be at least 1"),
    (lambda table: table["base"].update(seed=[]), "seed = []: an axis needs at least one value"),
    (lambda table: table.update(select={"over": "seed"}), "select.over = \"seed\": unknown key 'seed'"),
    (lambda table: table.update(select={"by": "spectrum.rank_90"}), "unknown measure 'spectrum.rank_90'"),
    (lambda table: table.update(table=[{"rows": ["seed"], "value": "los"}]), 'table 1: value = "los": unknown measure'),
    (lambda table: table.update(figure=[{"name": "pie"}]), "figure 1: figure.name = \"pie\": unknown figure 'pie'"),
]
"""What makes any sweep one that is refused, and what is said of it."""


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
        "cost_quality": {"costs": ["trainable_share", "peak_gib", "updates_bytes"]},
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
            lines.append(f"{key} = {inline(value)}")
    return "\n".join([*lines, *blocks]) + "\n"


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {inline(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(inline, value))}]"
    return json.dumps(value, ensure_ascii=False)


def write_record(rng: random.Random, store: Store, spec: RunSpec, has_files: bool) -> None:
    """What a run has left: a record of one kind or another, or what a worker has that is gone, or goes on."""
    status, folder = rng.choice(STATUSES), store.folder(spec.id)
    if status == "missing" or folder.exists():
        return
    store.write_spec(spec)
    if status in ("claimed", "alive") or (status == Status.RUNNING and rng.random() < 0.5):
        write_claim(folder, alive=status == "alive")
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "state.json").write_text("{}")
        if status != Status.RUNNING:
            return
    known = status if isinstance(status, Status) else Status.DONE
    store.write(make_record(rng, spec, known, has_files))
    file = folder / rng.choice(["record.json", "spec.json"])
    if status == "cut short":
        file.write_text(file.read_text("utf-8")[: rng.choice([0, 1, 40])])
    elif status == "edited":
        file.write_text(file.read_text("utf-8").replace('"lr"', '"rate"'))
    elif status == "strange":
        file.write_text(rng.choice(["[]", "null", "\x00", '{"run_id": 1}', "NaN", '{"spec": {}}']))


def write_claim(folder: Path, alive: bool) -> None:
    """Of this process, or of one that is gone."""
    own = claim.Claim(
        number=1, host="h", machine=claim._machine(), pid=os.getpid() if alive else 2**22 + 1,
        process_start=process_start(os.getpid()), time=0.0, progress={"phase": "train", "step": 3, "steps": 9},
    )  # fmt: skip
    (folder / "claims").mkdir()
    (folder / "claims" / "0001.json").write_text(json.dumps(asdict(own)))


def make_record(rng: random.Random, spec: RunSpec, status: Status, has_files: bool) -> RunRecord:
    done = status == Status.DONE
    files = {"updates/x": "0" * 64} if done and has_files and spec.method.has_update else {}
    files |= {f"snapshots/{n:06d}/x": "0" * 64 for n in (10, 20) if files and spec.snapshot_every}
    names = [*COMMON, *(SERVING if spec.serving else ()), *(SEQUENCE if spec.tasks else ())]
    names += RETENTION if getattr(spec.task, "retain", None) else ()
    measures = {name: rng.choice([*NUMBERS, rng.random(), rng.random()]) for name in names if rng.random() < 0.85}
    provenance = {"update": spec.method.about_update(spec), "peak_gib": rng.choice(WORDS)}
    if rng.random() < 0.1:
        provenance["merge_error"] = "not applicable: no weights"
    return RunRecord(
        run_id=spec.id,
        spec=spec.to_json(),
        status=status,
        error=None if done else rng.choice(WORDS),
        files=files,
        measures=measures if done else {},
        provenance=provenance,
        sequence=make_sequence(rng, spec) if done else {},
        environment={"model_commit": rng.choice([None, "a" * 40]), "git": {"dirty": rng.random() < 0.2}},
    )


def make_sequence(rng: random.Random, spec: RunSpec) -> dict[str, Any]:
    """Of a chain of tasks, its matrices."""
    size = len(spec.tasks)
    matrices = {
        name: [[rng.random() for _ in range(size)] for _ in range(size + 1)] for name in ("loss", "token_accuracy")
    }
    return {"tasks": [f"{rng.choice(WORDS)} {n}" for n in range(size)], "matrices": matrices} if size else {}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What each analysis finds of a run, or of a pair, of either form: factors, and dense."""
    sweep, store = make_sweep(tmp_path_factory.mktemp("base")), Store(tmp_path_factory.mktemp("store"))
    low, dense = ([spec for spec in sweep.runs if (spec.method.name == "full") == full][:2] for full in (False, True))
    for spec in [*low, *dense]:
        write_run(store, spec)
    found: dict[tuple[str, ...], Any] = {}
    seen: list[Job] = []
    engine.read_tables = lambda jobs: seen.extend(jobs) or read_tables(jobs)
    try:
        analyze(store, sweep, note=lambda _: None)
    finally:
        engine.read_tables = read_tables
    for job, table in read_tables(seen).items():
        forms = ["dense" if record.spec["method"]["name"] == "full" else "low" for record in job.records]
        found[job.analysis.name, *forms] = table
    return found


def tables_of(rows: dict[tuple[str, ...], Any], jobs: list[Job]) -> dict[Job, Any]:
    """A table for each job, of the layers that its runs have."""
    found = {}
    for job in jobs:
        methods = [record.spec["method"] for record in job.records]
        forms = ["dense" if method["name"] in ("full", "bitfit") else "low" for method in methods]
        either = [(job.analysis.name, *forms), (job.analysis.name, *forms[::-1])]
        table = next((rows[key] for key in either if key in rows), None)  # which may well have no rows
        targets = {method.get("targets") for method in methods}
        for part, layer in (("query", "q_proj"), ("mlp", "up_proj")):
            if table and part in targets:  # one without rows has no columns either
                table = table.filter([layer in name for name in table["layer"].to_pylist()])
        if table is not None:
            found[job] = table
    return found


@pytest.fixture
def light(monkeypatch, rows):
    """Nothing is computed or waited for; gives what says whether figures are drawn, and rendered."""
    save_rendered, render, draw = drawing.save, FigureCanvasAgg.draw, outputs.draw_figure

    def save(figure: Any, stem: Path) -> list[Path]:
        files = [stem.with_suffix(".pdf"), stem.with_suffix(".png")]
        stem.parent.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.write_bytes(b"-")
        drawing.plt.close(figure)
        return files

    def set_drawing(drawn: bool, rendered: bool) -> None:
        monkeypatch.setattr(outputs, "draw_figure", draw if drawn else lambda *_: None)
        monkeypatch.setattr(drawing, "save", save_rendered if rendered else save)
        monkeypatch.setattr(FigureCanvasAgg, "draw", render if rendered else lambda self, *_: None)

    monkeypatch.setattr(engine, "read_tables", partial(tables_of, rows))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return set_drawing


def write_case(rng: random.Random, file: Path) -> str | None:
    """Write a sweep; what is to be said of it where it is spoilt."""
    table = make_table(rng)
    spoil, message = rng.choice(SPOILT) if rng.random() < 1 / 6 else (lambda _: None, None)
    spoil(table)
    file.parent.mkdir()
    file.write_text(toml(table), "utf-8")
    return message


def fault(code: int, message: str | None, out: str, talk: str) -> str | None:
    """What is wrong with how the command ended; None where it is as it should be."""
    errors = [line for line in talk.splitlines() if line.startswith("lorabench: error: ")]
    expected = 2 if message else 0
    if code != expected or "Traceback" in talk or "\x1b" in out + talk:
        return f"exit code {code}, not {expected}"
    if message:
        return None if any(message in line for line in errors) and not out else f"does not say: {message}"
    return None if not errors and out.split()[-1].endswith("report.html") else "no report"


@pytest.mark.parametrize("batch", range(CASES // BATCH))
def test_a_sweep_made_at_random_has_its_report(tmp_path, light, capsys, batch):
    wrong, refused = [], 0
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        rng = random.Random(number)
        light(drawn=number % DRAWN == 0, rendered=number % RENDERED == 0)
        store, name = Store(tmp_path), f"case{number}"
        file = store.root / name / "sweep.toml"
        message = write_case(rng, file)
        has_files = rng.random() < 0.25
        for spec in () if message else read_sweep(file, stored=True).runs:
            write_record(rng, store, spec, has_files)
        code = main(["analyze", str(store.root), name])
        refused += message is not None
        if found := fault(code, message, *(ended := capsys.readouterr())):
            wrong.append(f"case {number}: {found}\n{file.read_text()}\n{ended.err}")
    assert not wrong, f"{len(wrong)} of {BATCH}\n" + "\n".join(wrong[:5])
    assert 0 < refused < 0.4 * BATCH, "most are sweeps that can be run"


def test_the_layers_that_are_told_apart_are_there():
    assert [name.rpartition(".")[2] for name in LAYERS] == ["q_proj", "up_proj"]
