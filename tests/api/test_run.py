"""`lorabench.run` and `plan`: which runs are begun, and that a script without a guard does not begin again."""

import subprocess
import sys
from pathlib import Path

import pytest

from lorabench.api.plan import first_runs
from lorabench.cli import main
from lorabench.config.decode import InputError
from lorabench.spec.sweep import read_sweep
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests import fake_runs
from tests.conftest import BASE

SCRIPT = """
from pathlib import Path

from lorabench.launch.pool import Pool, launch
from lorabench.store.store import Store
from tests import fake_runs

print("begins", flush=True)
pool = Pool(workers=2, preload=("lorabench.launch.worker",))
outcome = launch(fake_runs.sweep(0, 100), Store(Path("results")), pool, fake_runs.run)
print([str(state.status) for state in outcome.states], __name__, Path(__file__).name)
"""


def test_a_script_without_a_guard_begins_once(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    call = [sys.executable, "script.py"]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["begins", "['done', 'done'] __main__ script.py"], done.stderr


@pytest.fixture
def store(tmp_path):
    """Of six runs the second is done, the third has failed and the fourth was cancelled."""
    store = Store(tmp_path / "results")
    for spec, status in zip(fake_runs.sweep(1, 2, 3).runs, (Status.DONE, Status.FAILED, Status.CANCELLED), strict=True):
        store.write_spec(spec)
        store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=status))
    return store


@pytest.mark.parametrize(
    "limit, retry, seeds, left",
    [(None, (), [0, 1, 2, 3, 4, 5], 0), (2, (), [0, 3], 2), (2, (Status.FAILED,), [0, 2], 3), (9, (), [0, 3, 4, 5], 0)],
)
def test_the_first_runs_that_are_still_to_do(store, limit, retry, seeds, left):
    part, found = first_runs(fake_runs.sweep(0, 1, 2, 3, 4, 5), store, limit, retry)
    assert ([spec.seed for spec in part.runs], found) == (seeds, left)


SWEEP = f"""{BASE}
task.max_train = 8
task.max_eval = 2
seq_len = 16
batch_size = 2
steps = 2
serving = false
method.name = "lora"
method.rank = 2
seed = [0, 1, 2] # three
"""


def test_the_commands_change_and_limit_and_what_is_stored_explains_it(tmp_path, capsys, monkeypatch):
    def launch(sweep, store, pool, begin):
        begin()
        begun.extend(sweep.runs)
        return Ended()

    monkeypatch.setattr("lorabench.launch.pool.launch", launch)
    begun: list = []
    (tmp_path / "tiny.toml").write_text(SWEEP)
    changes = ["--set", "lr=[1e-3, 2e-3]", "--set", "method.rank=4"]
    results = ["--results", str(tmp_path / "results")]
    assert main(["run", str(tmp_path / "tiny.toml"), "--limit", "4", "--device", "cpu", *changes, *results]) == 0
    assert [(run.lr, run.method.rank, run.seed) for run in begun] == [
        (1e-3, 4, 0),
        (2e-3, 4, 0),
        (1e-3, 4, 1),
        (2e-3, 4, 1),
    ]
    assert "limit: 2 more to run are left" in capsys.readouterr().err
    stored = read_sweep(tmp_path / "results" / "tiny" / "sweep.toml")
    assert [run.id for run in stored.runs][:4] == [run.id for run in begun] and len(stored.runs) == 6
    assert stored.text.startswith("# Changed: lr = [0.001, 0.002]; method.rank = 4.\n") and "# three" in stored.text
    assert main(["plan", str(tmp_path / "tiny.toml"), *changes, "--show", begun[0].id]) == 0
    assert "method.rank = 4\n" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "tiny.toml"), "--set", "lr=x", "--set", "seed"]) == 2
    assert [line.count("--set") for line in capsys.readouterr().err.splitlines()] == [2, 1]


def test_what_is_refused_leaves_nothing_in_the_results(tmp_path, capsys, monkeypatch):
    """Also what only the check finds, which takes models and data: it would stand in `status` as not begun."""

    def refuse(launch):
        raise InputError("task.data: has no rows")

    monkeypatch.setattr("lorabench.launch.pool._Launch._check", refuse)
    (tmp_path / "tiny.toml").write_text(SWEEP)
    assert main(["run", str(tmp_path / "tiny.toml"), "--device", "cpu", "--results", str(tmp_path / "results")]) == 2
    assert "has no rows" in capsys.readouterr().err and not list((tmp_path / "results").rglob("*.toml"))


class Ended:
    states: list = []
    signal = None
    exit_code = 0
