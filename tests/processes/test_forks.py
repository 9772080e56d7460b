"""Fork servers: one of another kind is started anew, for its processes could not do what is asked of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
from multiprocessing import forkserver
from pathlib import Path
from lorabench.processes.forks import start_server

def nothing():
    pass

if __name__ == "__main__":
    pids = []
    for kind in ("alone", "alone", "", "", "alone"):
        server = start_server(Path("server.log"), [], {"WHAT": kind}, kind)
        process = server.start(nothing, ())
        process.join(60)
        assert process.exitcode == 0
        pids.append(forkserver._forkserver._forkserver_pid)
    print(*[pids.index(pid) for pid in pids])
"""


def test_a_server_whose_processes_can_do_less_is_not_used_for_more(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.stdout.split() == ["0", "0", "2", "2", "2"], done.stderr
