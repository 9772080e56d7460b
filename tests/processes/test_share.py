"""Processes that share tasks: each is done once, one that dies costs its own alone, and none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorabench.config.decode import InputError
from lorabench.processes.share import PATIENCE_SECONDS, WorkerFailed, share


def do(task, advance):
    """What the task says: a number is squared."""
    if task == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    advance(1.0)
    if task == "raises":
        raise ZeroDivisionError("by nought")
    if task == "input":
        raise InputError(["one thing", "another"])
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "leaves":
        os._exit(3)
    if task in ("long", "stubborn"):
        time.sleep(60)
    if isinstance(task, Path):
        task.with_suffix(f".{os.getpid()}").touch()
        time.sleep(60)
    return task**2


def test_each_task_is_done_once(tmp_path):
    advanced = []
    found = list(share(do, range(20), 3, (), tmp_path / "log", advanced.append))
    assert dict(found) == {n: n**2 for n in range(20)} and len(found) == len(advanced) == 20
    assert not list(share(do, [], 3, (), tmp_path / "log", advanced.append))


def test_what_fails_is_told_and_the_others_go_on(tmp_path):
    tasks = ["raises", 1, "killed", 2, "input", "leaves", 3]
    found = dict(share(do, tasks, 2, (), tmp_path / "log", lambda _: None))
    assert [found.pop(n) for n in (1, 3, 6)] == [1, 4, 9]
    assert found[4].problems == ["one thing", "another"] and isinstance(found[4], InputError)
    messages = {tasks[n]: str(error) for n, error in found.items() if isinstance(error, WorkerFailed)}
    assert messages["raises"].endswith("ZeroDivisionError: by nought\n")
    assert (
        messages["killed"] == "a worker was killed by SIGKILL"
        and messages["leaves"] == "a worker ended with exit code 3"
    )


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def within(seconds, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


IN_BACKGROUND = ["sh", "-c", 'trap "" INT; exec "$0" "$@"']
"""As a shell without job control starts `command &`: with SIGINT ignored."""


@pytest.mark.parametrize(("number", "how"), [(signal.SIGINT, []), (signal.SIGINT, IN_BACKGROUND), (signal.SIGKILL, [])])
def test_workers_go_with_the_one_who_started_them(tmp_path, number, how):
    """Ctrl-C reaches all processes of a terminal; SIGKILL the one alone."""
    call = [*how, sys.executable, "-m", "tests.processes.test_share", str(tmp_path)]
    process = subprocess.Popen(call, start_new_session=True, stderr=subprocess.DEVNULL)
    assert within(30, lambda: len(list(tmp_path.glob("task?.*"))) == 2)
    pids = [int(file.suffix[1:]) for file in tmp_path.glob("task?.*")]
    assert all(map(alive, pids))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    process.wait(timeout=30)
    assert within(10, lambda: not any(map(alive, pids)))


class Interrupting:
    """Ctrl-C comes while it is collected: what the handler raises there is lost."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_a_finalizer_is_not_lost(tmp_path, monkeypatch):
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: lost.append(about.exc_type))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(share(do, [1, "long"], 2, (), tmp_path / "log", lambda _: Interrupting() and None))
    assert lost == [KeyboardInterrupt] and time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_kills_workers_that_do_not_stop(tmp_path):
    interrupt = [sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({os.getpid()}, 2)"]
    times = []

    def twice(_):
        times.append(time.monotonic())
        subprocess.Popen(interrupt)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(share(do, ["stubborn"], 1, (), tmp_path / "log", twice))
    assert time.monotonic() - times[0] < PATIENCE_SECONDS


if __name__ == "__main__":
    from tests.processes import test_share

    folder = Path(sys.argv[1])
    list(share(test_share.do, [folder / "task1", folder / "task2"], 2, (), folder / "log", lambda _: None))
