"""The command line: exit codes, what goes to stdout and what to stderr, start-up time, and one whole journey."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorabench import cli
from lorabench.cli import COMMANDS, main
from lorabench.cluster.run_states import standings
from lorabench.config.durable import write_bytes
from lorabench.launch.plan import count
from lorabench.report.freshness import SweepFile, analysis_key, write_stamp
from lorabench.spec.run_spec import spec_id
from lorabench.spec.sweep import read_sweep
from lorabench.status.overview import status_text
from lorabench.store.claim import take
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests.conftest import BASE
from tests.counted import calls

HEAVY = ["torch", "transformers", "peft", "pandas", "pydantic", "matplotlib", "rich"]
SWEEP = """
[base]
model = "builtin:tiny-llama"
task.name = "text"
task.data = "{data}"
task.max_eval = 2
method.name = "lora"
method.rank = 2
steps = 2
batch_size = 2
seq_len = 32
seed = [0, 1]
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    (tmp_path / "data.txt").write_text("def f(x):\n    return x + 1\n\n" * 300)
    (tmp_path / "tiny.toml").write_text(SWEEP.format(data=tmp_path / "data.txt"))
    return tmp_path / "tiny.toml"


def stored(root: Path, sweep: Path, **fields: object) -> Store:
    """A store in which the sweep's first run has ended."""
    store, runs = Store(root), read_sweep(sweep).runs
    store.write_spec(runs[0])
    values = {"run_id": runs[0].id, "spec": runs[0].to_json(), "status": Status.DONE} | fields
    store.write(RunRecord(**values))
    return store


@pytest.mark.parametrize(
    ("command", "most"),
    [(["--help"], 100), (["list"], 100), (["run", "--help"], 100), (["status", "."], 190), (["--version"], 150),
     (["completion", "--complete=logs\x1f"], 100)],
)  # fmt: skip
def test_light_commands_import_nothing_heavy_and_start_at_once(command: list[str], most: int, tmp_path: Path) -> None:
    """Starting is importing: how long that takes is the machine's, and how much is imported is ours."""
    program = f"""
import sys
before = set(sys.modules)
from lorabench.cli import main
try:
    main({command!r})
finally:
    print([name for name in {HEAVY!r} if name in sys.modules], len(sys.modules.keys() - before))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    call = [sys.executable, "-c", program]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    heavy, _, imported = done.stdout.splitlines()[-1].rpartition(" ")
    assert heavy == "[]" and 10 < int(imported) <= most


def test_help_describes_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    folder = Path(cli.__file__).parent / "commands"
    assert {*COMMANDS} == {file.stem for file in folder.glob("[!_]*.py")}
    for name in COMMANDS:
        assert re.search(rf"\n    {name}\s", printed)  # a long one has a line of its own
        assert importlib.import_module(f"lorabench.commands.{name}").__doc__
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "Ctrl-C stops cleanly" in capsys.readouterr().out


def test_list_names_every_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"lora", "full"} <= set(found["methods"])
    assert set(found) == {"methods", "tasks", "objectives", "optimizers", "analyses", "figures"}
    assert main(["list", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["name", *found["methods"]]


def test_list_names_what_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "measures", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["valid_loss"]["unit"] == "nats" and found["valid_loss"]["higher_is_better"] is False
    assert {"spectrum.rank_90", "forgetting", "peak_gib"} <= found.keys()
    assert main(["list", "measures"]) == 0
    assert re.search(r"^tokens_per_second +tokens/s +more ", capsys.readouterr().out, re.MULTILINE)


def test_list_shows_what_a_plugin_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "dynamics"]) == 0
    shown = capsys.readouterr().out
    assert (
        "dynamics (analyses): " in shown
        and "dynamics (figures): " in shown
        and '[[figure]]\nname = "dynamics"' in shown
    )
    assert main(["list", "lora", "--json"]) == 0
    (lora,) = json.loads(capsys.readouterr().out)
    assert {field["key"]: field["default"] for field in lora["fields"]}["method.rank"] == 8
    assert main(["list", "lorra"]) == 2
    assert "unknown kind or name 'lorra'. Did you mean 'lora'?" in capsys.readouterr().err


def test_wrong_input_is_one_line_a_problem_on_stderr_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(f'{BASE}method.name = "lorra"\nsteps = 0\n')
    for command in (["plan", str(bad)], ["run", str(bad), "--results", str(tmp_path / "r")]):
        assert main(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 2
        assert all(line.startswith(f"lorabench: error: {bad}: ") for line in err.splitlines())
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["status", "{tmp}/none"], "RESULTS = {tmp}/none: no such folder"),
        (["analyze", "{tmp}/none"], "RESULTS = {tmp}/none: no such folder"),
        (["report", "{tmp}"], "{tmp}: holds no sweep"),
        (["analyze", "{tmp}", "ranks"], "SWEEP = ranks: unknown sweep 'ranks'"),
        (["run", "{tmp}/tiny.toml", "--retry", "fialed"],
         "--retry fialed: unknown status 'fialed'. Did you mean 'failed'?"),
        (["run", "{tmp}/tiny.toml", "--device", "gpu"], "--device gpu: must be auto, cpu, cuda or cuda:N"),
        (["run", "{tmp}/tiny.toml", "--device", "cpu", "--results", "{tmp}/data.txt"],
         "--results {tmp}/data.txt: cannot be written:"),
        (["run", "{tmp}/tiny.toml", "--device", "cuda:99"], "--device cuda:99: there is no such device here"),
        (["plan", "{tmp}/none.toml"], "{tmp}/none.toml: no such sweep file"),
    ],
)  # fmt: skip
def test_bad_arguments_are_said_so(
    command: list[str], message: str, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill = {"tmp": str(sweep.parent)}
    assert main([part.format(**fill) for part in command]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lorabench: error: " + message.format(**fill)) and len(err.splitlines()) == 1


@pytest.mark.parametrize("flag", [["--workers", "0"], ["--workers", "x"], ["--timeout-minutes", "-1"]])
def test_numbers_are_checked(flag: list[str], sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", str(sweep), *flag])
    assert stop.value.code == 2 and f"'{flag[1]}': must be a number of at least" in capsys.readouterr().err


def test_status_of_an_empty_folder_is_an_empty_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["no runs"]
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"runs": [], "not_begun": {}}


def test_status_shows_every_run_whatever_its_state(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sweep.parent / "results"
    measures = {"tokens_per_second": 1234.5, "valid_loss": float("nan")}
    store = stored(root, sweep, status=Status.DIVERGED, error="step 3: loss nan", measures=measures)
    second = read_sweep(sweep).runs[1]
    store.write_spec(second)
    write_bytes(store.folder("lora-000000000000") / "record.json", b'{"run_id": "lo')
    with take(store.folder(second.id)) as hold:
        hold.progress |= {"phase": "train", "step": 1, "steps": 2, "tokens_per_second": 99.0}
        time.sleep(2.2)  # a heartbeat writes the progress
        assert main(["status", str(root), "--json"]) == 0
        runs = {run["status"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
        assert main(["status", str(root)]) == 0
        printed = capsys.readouterr().out
    assert set(runs) == {"diverged", "running", "corrupt"}
    assert runs["diverged"]["error"] == "step 3: loss nan" and runs["diverged"]["measures"]["valid_loss"] is None
    assert runs["running"]["progress"]["step"] == 1 and runs["running"]["heartbeat_seconds"] < 10
    assert runs["running"]["spec"] == second.to_json()
    assert "not valid JSON" in runs["corrupt"]["error"]
    row = next(line for line in printed.splitlines() if line.startswith(second.id)).split()
    assert row[1:5] == ["running", "1/2", "training", "99"] and row[-2:] == ["seed=1", "-"]
    assert sorted(printed.splitlines()[-1].split(", ")) == ["1 corrupt", "1 diverged", "1 running"]


def test_the_work_of_a_status_grows_with_the_number_of_runs(sweep: Path) -> None:
    """Not with its square: thousands are read at once. Seconds stand in benchmarks/store.py."""
    store = stored(sweep.parent / "results", sweep)
    spec = read_sweep(sweep).runs[0].to_json()

    def work(runs: int) -> int:
        for seed in range(runs):
            table = spec | {"seed": seed}
            folder = store.folder(spec_id(table))
            folder.mkdir(exist_ok=True)
            (folder / "spec.json").write_text(json.dumps(table))
            record = RunRecord(run_id=folder.name, spec=table, status=Status.DONE)
            (folder / "record.json").write_text(json.dumps(record.to_json()))
        lines: list[str] = []
        done = calls(lambda: lines.extend(status_text(store, standings(store)).splitlines()))
        assert lines[-1] == f"{runs} done"
        return done

    few, many = work(100), work(500)
    assert many < 5.5 * few


def test_an_early_end_of_the_pipe_is_no_error(sweep: Path) -> None:
    stored(sweep.parent, sweep)
    program = "import sys; from lorabench.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "status", str(sweep.parent), "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 0


def test_a_stamp_holds_until_a_record_the_sweep_or_an_output_changes(sweep: Path) -> None:
    root = sweep.parent / "results"
    store, declared = stored(root, sweep), read_sweep(sweep)
    output = root / declared.name / "report.html"
    found = SweepFile(file=sweep)

    def stamp() -> None:
        write_stamp(store, declared, analysis_key(store, declared.text, [spec.id for spec in declared.runs]), [output])

    write_bytes(output, b"x")
    assert found.up_to_date(store) is None
    stamp()
    assert found.up_to_date(store) == [output]
    write_bytes(root / "merges" / "linear-0" / "record.json", b"{}")  # which the page shows too
    assert found.up_to_date(store) is None
    stamp()
    assert found.up_to_date(store) == [output]
    stored(root, sweep, status=Status.FAILED)
    assert found.up_to_date(store) is None
    stamp()
    assert found.up_to_date(store) == [output]
    sweep.write_text(declared.text + "# another question\n")
    assert found.up_to_date(store) is None
    sweep.write_text(declared.text)
    assert found.up_to_date(store) == [output]
    output.unlink()
    assert found.up_to_date(store) is None


def test_the_whole_journey(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """run, run again, plan, status, analyze, analyze again; `run` in a process of its own, as a user calls it."""
    root = sweep.parent / "results"

    def run(*flags: str) -> list[str]:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lorabench", "run", str(sweep), "--device", "cpu", *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=sweep.parent, env=environment)
        assert done.returncode == 0 and done.stdout == "", done.stderr
        return done.stderr.splitlines()

    def call(*command: str) -> str:
        assert main(list(command)) == 0
        return capsys.readouterr().out

    talk = run("--workers", "2", "--live", "tensorboard")
    assert talk[0] == "tiny: 2 runs: 2 to run on 2 workers"
    assert talk[-1] == "lorabench: tiny: 2 done"
    before = {file: file.stat().st_mtime_ns for file in root.glob("runs/*/record.json")}
    assert len(before) == 2 and (root / "tiny" / "sweep.toml").read_text() == sweep.read_text()
    assert {folder.name for folder in (root / "exports" / "tensorboard").iterdir()} == {f.parent.name for f in before}
    assert run()[0] == "tiny: 2 runs: 2 done already"
    assert {file: file.stat().st_mtime_ns for file in before} == before
    planned = json.loads(call("plan", str(sweep), "--results", str(root), "--json"))["runs"]
    assert [(run["done"], run["estimate"]["basis"]) for run in planned] == [(True, "measured")] * 2
    measured = {run["run_id"]: run["measures"] for run in json.loads(call("status", str(root), "--json"))["runs"]}
    for planned_run, spec in zip(planned, read_sweep(sweep).runs, strict=True):
        assert count(spec).num_trainable == measured[planned_run["run_id"]]["num_trainable"]
        assert count(spec).num_parameters == measured[planned_run["run_id"]]["num_parameters"]
    drawn = call("analyze", str(root))
    assert str(root / "tiny" / "report.html") in drawn.splitlines()
    assert call("analyze", str(root), "tiny") == drawn


def test_verdicts_are_told_and_checked(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a report that is up to date."""
    text = sweep.read_text()
    for at_most, code in (("1e9", 0), ("1", 1)):
        claim = f'says = "few are trained"\nmeasure = "num_trainable"\nat_most = {at_most}\n'
        sweep.write_text(f"{text}\n[[claim]]\n{claim}")
        root = sweep.parent / f"results-{at_most}"
        stored(root, sweep, measures={"num_trainable": 500.0})
        for _ in range(2):
            assert main(["analyze", str(root), str(sweep), "--check", "--json"]) == code
            captured = capsys.readouterr()
            (told,) = json.loads(captured.out)
            (claim_told,) = told["claims"]
            assert claim_told["verdict"] == ("does not hold" if code else "holds")
            assert str(root / "tiny" / "report.html") in told["files"]
            assert ("does not hold: few are trained" in captured.err) == bool(code)
    assert main(["analyze", str(root), str(sweep)]) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (IsADirectoryError(21, "Is a directory", "t.tmp", None, "page"), "page: Is a directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "b: cannot be copied there: [Errno 28]"),
    ],
)
def test_what_cannot_be_written_is_said_in_a_line(
    error: OSError, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Any) -> int:
        raise error

    monkeypatch.setattr("lorabench.commands.list.main", fails)
    assert main(["list"]) == 2
    assert capsys.readouterr().err.startswith(f"lorabench: error: {message}")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_model.safetensors", "must end in .html"),
        ("adapter_model.safetensors/pages/page.html", "adapter_model.safetensors is no folder"),
        ("folder.html", "is there, and is no file"),
    ],
)
def test_a_page_is_written_over_nothing_but_a_page(
    file: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "folder.html").mkdir()
    assert main(["inspect", str(tmp_path / "no adapter"), "--html", str(tmp_path / file)]) == 2
    error = capsys.readouterr().err  # said before anything is read or computed
    assert error.startswith("lorabench: error: --html ") and message in error
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"weights"
