"""What the tests on a real SLURM share: the sweeps, and what `lorabench run` makes of them on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabench.record import Store
from tests.sandbox import Sandbox, Study

BASE = """
[base]
task.name = "text"
task.max_train = 64
task.max_eval = 8
seq_len = 64
batch_size = 2
lr = 1e-2
serving = false
method.name = "lora"
method.dropout = 0.1
"""
SHORT = BASE + "steps = 12\n[[grid]]\nmethod.rank = [1, 2, 4]\nseed = [0, 1]\n"
"""Six runs of a second."""
LONG = BASE + "steps = 200\n[[grid]]\nmethod.rank = 2\nseed = [0, 1]\n"
"""Two runs of some seconds, to be interrupted."""


@pytest.fixture
def study(sandbox: Sandbox, tmp_path: Path):
    """A results folder of its own; no job is left when the test ends."""
    yield Study(sandbox, tmp_path)
    sandbox.clear()


@pytest.fixture(scope="module")
def short(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return computed_here(Study(sandbox, tmp_path_factory.mktemp("short")), SHORT)


@pytest.fixture(scope="module")
def long(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return computed_here(Study(sandbox, tmp_path_factory.mktemp("long")), LONG)


def computed_here(study: Study, text: str, *options: str) -> Store:
    study.lorabench("run", study.sweep("here", text), "--device", "cpu", "--workers", "1", *options)
    return study.store
