"""SLURM's commands as small scripts that answer what a test has laid down for them, and keep what they were asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorabench.cluster.queue import user_name
from lorabench.config.durable import write_json
from lorabench.spec.run_spec import RunSpec
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store

SCRIPT = """#!/bin/sh
echo "$0 $*" >> {folder}/calls
env > {folder}/environment
[ -e {file}.wait ] && sleep $(cat {file}.wait)
cat {file}.out
cat {file}.err >&2
exit $(cat {file}.code)
"""
NAME = "20261124T143000-grid-0a1b"
"""Of a submission, where a test names none."""
COMMANDS = ("squeue", "sacct", "scontrol", "scancel")


class FakeSlurm:
    """Put first on the PATH; at the start squeue and sacct know of nothing, and each command succeeds."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder = folder
        folder.mkdir()
        for command in COMMANDS:
            file = folder / command
            file.write_text(SCRIPT.format(folder=folder, file=file))
            file.chmod(0o755)
            self.answer(command)
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def answer(self, command: str, out: str = "", err: str = "", code: int = 0, wait: float | None = None) -> None:
        file = self.folder / command
        file.with_suffix(".out").write_text(out)
        file.with_suffix(".err").write_text(err)
        file.with_suffix(".code").write_text(f"{code}")
        if wait is not None:
            file.with_suffix(".wait").write_text(f"{wait}")

    def queue(self, states: dict[str, str], comment: str = "", user: str | None = None) -> None:
        """squeue's answer: job id -> state, or `STATE reason`."""
        lines = []
        for job_id, text in states.items():
            state, _, reason = text.partition(" ")
            lines.append(f"{job_id}|{state}|{reason or 'None'}|N/A|N/A||{user or user_name()}|{comment or '(null)'}")
        self.answer("squeue", "".join(f"{line}\n" for line in lines))

    def accounting(self, states: dict[str, str]) -> None:
        """sacct's answer: id of a job or step -> state."""
        lines = [f"{id}|{state}|0:0|2026-11-24T14:00:00|2026-11-24T15:00:00|n1" for id, state in states.items()]
        self.answer("sacct", "".join(f"{line}\n" for line in lines))

    def no_accounting(self) -> None:
        self.answer("sacct", err="Slurm accounting storage is disabled\n", code=1)

    @property
    def calls(self) -> list[str]:
        """Each call so far: `squeue --noheader …`."""
        file = self.folder / "calls"
        return [line.removeprefix(f"{self.folder}/") for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def slurm_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


def submitted(
    root: Path, jobs: list[list[RunSpec]], job_ids: list[str], *, complete: bool = True, **changes: object
) -> Path:
    """Lay down a submission: its jobs, in one array for each id. The folder."""
    size = -(-len(jobs) // max(1, len(job_ids)))
    arrays = [[first, min(size, len(jobs) - first)] for first in range(0, len(jobs), size)]
    name = str(changes.get("name", NAME))
    plan = {
        "submission": name,
        "sweep": "grid",
        "cluster": "a100",
        "kind": "slurm",
        "submitted": "2026-11-24T14:30:00+00:00",
        "host": "login1",
        "user": user_name(),
        "slurm_cluster": None,
        "profile": {},
        "specs": {spec.id: spec.to_json() for job in jobs for spec in job},
        "jobs": [[spec.id for spec in job] for job in jobs],
        "arrays": arrays,
    } | {key: value for key, value in changes.items() if key != "name"}
    folder = root / "queue" / name
    write_json(folder / "plan.json", plan)
    written = [
        {"job_id": id, "first": first, "count": count} for id, (first, count) in zip(job_ids, arrays, strict=False)
    ]
    write_json(folder / "jobs.json", {"arrays": written, "complete": complete})
    return folder


def record(store: Store, spec: RunSpec, status: Status, **fields: object) -> None:
    """What a run that stands so has left in the store."""
    store.write_spec(spec)
    store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=status, **fields))


def recorded() -> dict[str, object]:
    """What a real SLURM has answered; made by `fixtures/make_slurm.py`."""
    return json.loads((Path(__file__).parent / "fixtures" / "slurm.json").read_text())
