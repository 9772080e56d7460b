"""An sbatch that keeps the scripts it was given, and an srun that is only there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_slurm import FakeSlurm

SCRIPT = """#!/bin/bash
n=$(ls {folder}/sbatch.scripts | wc -l)
if [ -e {folder}/sbatch.refuse ] && [ $n -ge $(cat {folder}/sbatch.refuse) ]; then
    echo "sbatch: error: invalid partition specified: nope" >&2; exit 1
fi
if [ "$1" = --test-only ]; then echo "sbatch: Job 5 to start at once" >&2; exit 0; fi
cat "$1" > {folder}/sbatch.scripts/$n
env > {folder}/sbatch.environment
echo "Submitted batch job $((100 + n))"
[ -e {folder}/sbatch.kill ] && kill -9 $PPID
exit 0
"""


class FakeCluster(FakeSlurm):
    """Takes every script; its jobs are 100, 101, …"""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        super().__init__(folder, patch)
        (folder / "sbatch.scripts").mkdir()
        for name, text in (("sbatch", SCRIPT.format(folder=folder)), ("srun", "#!/bin/sh\n")):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.configure()

    def configure(self, **config: str) -> None:
        """What `scontrol show config` says."""
        table = {"ClusterName": "fake", "MaxArraySize": "1001", "PreemptType": "preempt/none"} | config
        self.answer("scontrol", "".join(f"{key:<24}= {value}\n" for key, value in table.items()))

    def refuse(self, after: int = 0) -> None:
        """Refuse all that comes after so many scripts."""
        (self.folder / "sbatch.refuse").write_text(str(after))

    def kill_submitter(self) -> None:
        """Once sbatch has taken a script, its caller dies before it can write anything."""
        (self.folder / "sbatch.kill").write_text("")

    @property
    def scripts(self) -> list[str]:
        folder = self.folder / "sbatch.scripts"
        return [(folder / name).read_text() for name in sorted((f.name for f in folder.iterdir()), key=int)]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(tmp_path / "bin", monkeypatch)
