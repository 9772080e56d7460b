"""Where lorabench is installed is in no run's files: another checkout gives the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lorabench
from lorabench.spec.run_spec import RunSpec
from lorabench.store.store import Store
from lorabench.training.execute import Options, execute
from tests.conftest import make_spec

METHODS = {
    "lora": {"name": "lora", "rank": 2, "targets": "query"},
    "prompt": {"name": "prompt", "num_tokens": 2, "start": "text", "text": "def"},
}
RUN = """
import json, sys
from pathlib import Path
import lorabench.launch.preload
from lorabench.training.execute import Options, execute
from lorabench.store.store import Store
from lorabench.spec.run_spec import RunSpec
assert Path(lorabench.__file__).is_relative_to(sys.argv[1]), lorabench.__file__
for table in json.loads(sys.argv[3]):
    spec, options = RunSpec.from_json(table), Options(log_to_file=False, device="cpu")
    assert execute(spec, Store(Path(sys.argv[2])), options) == "done"
"""


def updates_of(specs: list[RunSpec], root: Path) -> list[dict[str, bytes]]:
    """The files of each run's `updates/`."""
    folders = [Store(root).folder(spec.id) / "updates" for spec in specs]
    return [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]


def test_another_checkout_gives_the_same_bytes(tmp_path):
    package = Path(lorabench.__file__).parent
    shutil.copytree(package, tmp_path / "copy" / "lorabench", ignore=shutil.ignore_patterns("__pycache__"))
    specs = [make_spec(method=method, steps=2) for method in METHODS.values()]
    for spec in specs:
        assert execute(spec, Store(tmp_path / "here"), Options(log_to_file=False, device="cpu")) == "done"
    copy, tables = tmp_path / "copy", json.dumps([spec.to_json() for spec in specs])
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(copy), str(tmp_path / "there"), tables]
    subprocess.run(command, check=True, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)})
    here = updates_of(specs, tmp_path / "here")
    assert here == updates_of(specs, tmp_path / "there")
    for files, key in zip(here, ("base_model_name_or_path", "tokenizer_name_or_path"), strict=True):
        config = json.loads(files["adapter_config.json"])
        assert config[key] == config["base_model_name_or_path"] == "builtin:tiny-llama"
        assert not any(str(package).encode() in content for content in files.values())
