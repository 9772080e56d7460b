"""Each command that the README shows runs, in its order, where sweeps are shortened and files of these names stand."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from lorabench.cli import main
from tests.fake_slurm import FakeSlurm
from tests.fake_slurm import slurm_commands as slurm_commands

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MOST_WORDS = 1500
COMMANDS = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (lorabench .*)$", README, re.MULTILINE)]
REVIEWS = "text,label\n" + "".join(f"{'good' if n % 2 else 'bad'} film {n},{n % 2}\n" for n in range(80))


def shorter(text: str) -> str:
    """A sweep of one seed, one learning rate and two steps."""
    for key, value in {"steps": "2", "seed": "[0]", "task.max_eval": "4"}.items():
        text = re.sub(rf"^{re.escape(key)} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    text = re.sub(r"^lr = \[([^,\]]*).*$", r"lr = \1", text, flags=re.MULTILINE)
    return re.sub(r"^method.rank = \[.*$", "method.rank = [4, 16]", text, flags=re.MULTILINE)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm_commands: FakeSlurm) -> Path:
    """Where the README's reader stands: sweeps, profiles, data of their own."""
    (tmp_path / "sweeps").mkdir()
    for name in ("quickstart", "methods"):  # methods: of the same runs, which are done by then
        (tmp_path / "sweeps" / f"{name}.toml").write_text(shorter((ROOT / "sweeps" / "quickstart.toml").read_text()))
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("sandbox"))
    (tmp_path / "reviews.csv").write_text(REVIEWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorabench.status.watch.PAUSE_SECONDS", 0.01)
    return tmp_path


def prepare(command: list[str]) -> None:
    """What the reader would have by then: adapters of their own, a sweep that does not take long."""
    results = Path("results/runs")
    if command[0] in ("inspect", "compare") and results.is_dir():
        for name, run in zip(("my-adapter", "adapter-a", "adapter-b"), sorted(results.glob("lora-*"))[:3], strict=True):
            shutil.copytree(run / "updates", name, dirs_exist_ok=True)
    own = Path("sweeps/reviews.toml")
    if command[0] == "run" and own.name in command[1]:
        own.write_text(shorter(own.read_text()))


def test_every_command_runs(world: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) > 10
    for command in COMMANDS:
        prepare(command)
        assert main(command) == 0, (command, capfd.readouterr().err)
    assert (world / "results" / "quickstart" / "report.html").exists()
    (python,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(python, {})


def test_the_claims_are_those_of_the_reference() -> None:
    known = {tuple(cells[i] for i in (0, 1, 4)) for cells in reference("claims") if len(cells) == 6}
    shown = in_readme("|claim|measured|verdict|")
    assert len(shown) > 5
    for cells in shown:
        assert tuple(cells) in known, cells


def test_the_comparison_of_the_methods_is_that_of_the_reference() -> None:
    head, _, *rows = [cells for cells in reference("methods") if len(cells) > 6]
    (line,) = re.findall(r"^\|method\|.*$", README, re.MULTILINE)
    places = [head.index(label) for label in cells_of(line)]
    assert {"trainable share (%)", "validation loss (nats)", "forgetting (nats)"} <= {*cells_of(line)}
    assert in_readme(line) == [[row[place] for place in places] for row in rows]


def reference(table: str) -> list[list[str]]:
    return [*map(cells_of, (ROOT / f"results/reference/claims/tables/{table}.md").read_text().splitlines())]


def in_readme(head: str) -> list[list[str]]:
    """The rows of the table with this head."""
    return [*map(cells_of, README.partition(head)[2].partition("\n\n")[0].splitlines()[2:])]


def cells_of(line: str) -> list[str]:
    """Of a table in Markdown."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_make_demo_is_what_stands_there() -> None:
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe and "lorabench run sweeps/quickstart.toml" in recipe[1] and "lorabench analyze" in recipe[1]


def test_it_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS
