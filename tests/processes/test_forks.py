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


LEFT = """
import time
from multiprocessing import forkserver
from pathlib import Path
from lorabench.processes.forks import Forked, start_server

def wait(path):
    while not path.exists():
        time.sleep(0.01)
    raise SystemExit(7)

if __name__ == "__main__":
    said = Path("said")
    first = Forked(start_server(Path("server.log"), [], {}, "alone").start(wait, (said,)))
    second = Forked(start_server(Path("server.log"), [], {}).start(wait, (said,)))
    print(first.exitcode, second.exitcode)
    said.touch()
    for process in (first, second):
        process.join(60)
    print(first.exitcode, second.exitcode)
"""


def run(program: str, folder: Path) -> list[str]:
    (folder / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, folder / "program.py"], capture_output=True, text=True, cwd=folder, timeout=120,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_server_whose_processes_can_do_less_is_not_used_for_more(tmp_path: Path) -> None:
    assert run(PROGRAM, tmp_path) == ["0", "0", "2", "2", "2"]


def test_the_next_server_does_not_wait_for_what_another_has_started(tmp_path: Path) -> None:
    assert run(LEFT, tmp_path) == ["None", "None", "7", "7"]
