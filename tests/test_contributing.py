"""The examples of CONTRIBUTING.md, saved under the names that it gives, in a copy of the package: they work as told."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SWEEP = """
name = "examples"

[base]
model = "builtin:tiny-llama"
task.name = "lines"
task.data = "builtin:python-code"
task.max_train = 8
task.max_eval = 4
seq_len = 32
batch_size = 2
steps = 2
lr = 1e-3
serving = false
method.name = "last_blocks"

[[grid]]
method.blocks = [1, 2]

[[table]]
rows = ["method.name", "method.blocks"]
value = ["valid_loss", "concentration.top_tenth"]

[[figure]]
name = "size_quality"
"""
SCRIPT = """
import sys
from pathlib import Path

import lorabench
from lorabench.cli import main
from lorabench.spec.sweep import read_sweep
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute

root = Path(sys.argv[1])
assert Path(lorabench.__file__).is_relative_to(root)
for spec in read_sweep(root / "results" / "examples" / "sweep.toml").runs:
    assert execute(spec, Store(root / "results"), Options(device="cpu", log_to_file=False)) == "done"
sys.exit(main(["analyze", str(root / "results"), "examples"]))
"""


def examples() -> dict[str, str]:
    """File -> text, as `Save as ...` has them."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    found = re.findall(r"Save\s+as\s+`(lorabench/[\w/]+\.py)`.*?```python\n(.*?)```", text, re.DOTALL)
    return dict(found)


def test_the_examples_work(tmp_path):
    files = examples()
    names = ["methods/last_blocks", "tasks/lines", "analyses/concentration", "report/figures/size_quality"]
    assert [*files] == [f"lorabench/{name}.py" for name in names]
    shutil.copytree(ROOT / "lorabench", tmp_path / "lorabench", ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in files.items():
        (tmp_path / file).write_text(text, "utf-8")
    folder = tmp_path / "results" / "examples"
    folder.mkdir(parents=True)
    (folder / "sweep.toml").write_text(SWEEP)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (folder / "figures" / "size_quality.pdf").exists()
    table = (folder / "tables" / "valid_loss-concentration_top_tenth.csv").read_text()
    assert table.count("last_blocks") == 4 and "nan" not in table
