"""What the tests on a real SLURM share; each file starts one of its own as its fixture `sandbox`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorabench.store.store import Store
from tests.conftest import made_once
from tests.sandbox import Sandbox
from tests.study import LONG, SHORT, Study, computed_here


@pytest.fixture
def study(sandbox: Sandbox, tmp_path: Path) -> Iterator[Study]:
    """A results folder of its own; no job is left when the test ends."""
    yield Study(sandbox, tmp_path)
    sandbox.clear()


@pytest.fixture(scope="module")
def short(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return computed_here(Study(sandbox, tmp_path_factory.mktemp("short")), SHORT)


@pytest.fixture(scope="module")
def long(sandbox: Sandbox) -> Store:
    """One for all files, which compare with it and leave it as it is."""
    with made_once("long") as (folder, is_made):
        there = Study(sandbox, folder)
        return there.store if is_made else computed_here(there, LONG)
