"""The launcher against fakes that end in every way a process can end; signals are sent to a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

from lorabench.config.decode import InputError
from lorabench.launch.exit_status import crash_line
from lorabench.launch.pool import Pool, check_writable, launch
from lorabench.processes.forks import Server, start_server
from lorabench.store.claim import take
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests import fake_runs
from tests.fake_runs import (
    DONE,
    EXITS,
    EXITS_255,
    HANGS,
    KILLED,
    LOST,
    LOST_AGAIN,
    NO_RECORD,
    OOM,
    ORPHAN,
    RAISES,
    SEGFAULT,
    WAITS,
)
from tests.processes.test_share import Interrupting

PRELOAD = ("lorabench.launch.worker",)


def run(root: Path, *seeds: int, **pool: object) -> dict[int, object]:
    """Seed -> the state of its run after a launch."""
    outcome = launch(fake_runs.sweep(*seeds), Store(root), Pool(workers=2, preload=PRELOAD, **pool), fake_runs.run)
    return {state.spec["seed"]: state for state in outcome.states}


def starts(root: Path) -> list[int]:
    """The seeds of the runs that were started, in order."""
    file = root / "starts.txt"
    return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.exists() else []


def test_every_ending_gets_its_status_and_stops_no_other_run(tmp_path: Path) -> None:
    states = run(tmp_path, OOM, RAISES, EXITS, SEGFAULT, KILLED, DONE)
    assert {seed: str(state.status) for seed, state in states.items()} == {
        OOM: "oom", RAISES: "failed", EXITS: "failed", SEGFAULT: "failed", KILLED: "cancelled", DONE: "done",
    }  # fmt: skip
    assert states[RAISES].error == "ended with exit code 1: ValueError: the fake raises"
    assert states[EXITS].error == "ended with exit code 3: about to leave"
    assert states[SEGFAULT].error.startswith("killed by SIGSEGV: File") and "string_at" in states[SEGFAULT].error
    assert states[KILLED].error == "killed by signal 9; run again to resume"
    for state in Store(tmp_path).states(list(fake_runs.sweep(*states).runs)):
        assert (state.status, state.error) == (states[state.spec["seed"]].status, states[state.spec["seed"]].error)


def hanging_check(check: object, answer: object, log: Path) -> None:
    """In the place of `check_main`: it says who it is, and has no answer."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    log.with_suffix(f".{os.getpid()}").touch()
    time.sleep(60)


def test_ctrl_c_ends_a_check_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorabench.launch.pool.check_main", hanging_check)
    began = tmp_path / "runs"
    interrupt = f"""
import os, pathlib, time
while not [*pathlib.Path({str(began)!r}).glob(".server.*[0-9]")]: time.sleep(0.05)
os.kill({os.getpid()}, 2)
"""
    subprocess.Popen([sys.executable, "-c", interrupt])
    with pytest.raises(KeyboardInterrupt):
        launch(fake_runs.sweep(DONE), Store(tmp_path), Pool(preload=PRELOAD))
    (pid,) = (int(file.suffix[1:]) for file in began.glob(".server.*[0-9]"))
    assert not Path(f"/proc/{pid}").exists()


def test_ctrl_c_in_a_finalizer_ends_a_check_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Server.start

    def interrupted(*args: object, **kwargs: object) -> object:
        process = start(*args, **kwargs)
        Interrupting()
        return process

    monkeypatch.setattr("lorabench.launch.pool.check_main", hanging_check)
    monkeypatch.setattr(Server, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch(fake_runs.sweep(DONE), Store(tmp_path), Pool(preload=PRELOAD))
    assert not starts(tmp_path)


def test_a_second_launch_starts_only_what_may_still_succeed(tmp_path: Path) -> None:
    run(tmp_path, DONE, OOM, RAISES, KILLED)
    before = starts(tmp_path)
    assert sorted(before) == [DONE, OOM, RAISES, KILLED]
    run(tmp_path, DONE, OOM, RAISES, KILLED)
    assert starts(tmp_path)[4:] == [KILLED]  # cancelled: resumed; failures are left alone
    run(tmp_path, DONE, OOM, RAISES, retry=frozenset([Status.FAILED]))
    assert starts(tmp_path)[5:] == [RAISES]
    run(tmp_path, DONE, OOM, RAISES, retry=frozenset([Status.OOM]))
    assert starts(tmp_path)[6:] == [OOM]


def test_a_failed_retry_does_not_report_the_old_failure(tmp_path: Path) -> None:
    (spec,) = fake_runs.sweep(NO_RECORD).runs
    store = Store(tmp_path)
    store.write_spec(spec)
    store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.FAILED, error="the old one"))
    states = run(tmp_path, NO_RECORD, retry=frozenset([Status.FAILED]))
    assert states[NO_RECORD].status == Status.FAILED
    assert states[NO_RECORD].error == "ended without a result"
    assert 1 < len(starts(tmp_path)) <= 3


def test_a_run_that_another_worker_has_is_waited_for_and_not_computed_twice(tmp_path: Path) -> None:
    other = f"""
import sys, time
from pathlib import Path
from lorabench.store.claim import take
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from tests import fake_runs
store, (spec,) = Store(Path({str(tmp_path)!r})), fake_runs.sweep({DONE}).runs
store.write_spec(spec)
with take(store.folder(spec.id)):
    print("claimed", flush=True)
    time.sleep(1)
    store.write(RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.DONE, error="by the other"))
"""
    with subprocess.Popen([sys.executable, "-c", other], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "claimed\n"
        states = run(tmp_path, DONE)
    assert states[DONE].status == Status.DONE and states[DONE].error == "by the other"
    assert starts(tmp_path) == []


def test_a_corrupt_run_is_reported_and_repeated_only_when_asked(tmp_path: Path) -> None:
    (spec,) = fake_runs.sweep(DONE).runs
    store = Store(tmp_path)
    store.write_spec(spec)
    record = store.folder(spec.id) / "record.json"
    record.write_text('{"run_id": "lo')
    assert run(tmp_path, DONE)[DONE].status == Status.CORRUPT
    assert starts(tmp_path) == [] and record.exists()
    assert run(tmp_path, DONE, retry=frozenset([Status.CORRUPT]))[DONE].status == Status.DONE
    assert (tmp_path / "runs" / ".corrupt" / f"{spec.id}.1" / "record.json").read_text() == '{"run_id": "lo'


def test_attempts_go_on_where_a_damaged_run_was_set_aside(tmp_path: Path) -> None:
    """Else the first claim of the run that is made anew could be taken for the damaged one's."""
    store, retry = Store(tmp_path), frozenset([Status.CORRUPT])
    for seed, wanted in ((DONE, 1), (DONE, 2), (DONE, 3), (EXITS, 1), (EXITS, 2)):
        (spec,) = fake_runs.sweep(seed).runs
        state = run(tmp_path, seed, retry=retry)[seed]
        claims = sorted(file.name for file in (store.folder(spec.id) / "claims").iterdir())
        if seed == DONE:
            assert store.read(spec.id).attempts == wanted and claims == [f"{wanted:04d}.json"]
        else:  # the launcher writes the record, by a claim of its own
            assert state.error == "ended with exit code 3: about to leave"
            assert claims == [f"{2 * wanted - 1:04d}.json", f"{2 * wanted:04d}.json"]
        (store.folder(spec.id) / "record.json").write_text('{"run_id": "lo')


def test_each_worker_gets_its_own_gpu(tmp_path: Path) -> None:
    run(tmp_path, DONE, 10, 11, 12, gpus=("GPU-a", "GPU-b"))
    seen = [line.split()[2] for line in (tmp_path / "starts.txt").read_text().splitlines()]
    assert sorted(set(seen)) == ["GPU-a", "GPU-b"]


def test_a_run_that_ignores_its_time_limit_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorabench.launch.worker import Settings

    monkeypatch.setattr("lorabench.launch.pool.GRACE_SECONDS", 0.5)
    states = run(tmp_path, HANGS, settings=Settings(timeout_seconds=0.5))
    assert states[HANGS].status == Status.TIMEOUT


def test_a_kill_is_oom_only_if_the_kernel_counted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([7, 8, 8])
    monkeypatch.setattr("lorabench.launch.pool.count_oom_kills", lambda: next(counts))
    seeds = (KILLED, DONE)
    assert run(tmp_path, *seeds)[KILLED].status == Status.OOM


def start(root: Path, *seeds: int) -> subprocess.Popen[str]:
    """A launch in a process group of its own, as a terminal would start it; returns once its runs are running."""
    command = [sys.executable, "-m", "tests.fake_runs", str(root), *map(str, seeds)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 20
    while len(list(root.glob("runs/*/record.json"))) < min(2, len(seeds)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    return process


def statuses(root: Path, *seeds: int) -> list[str]:
    return [str(state.status) for state in Store(root).states(list(fake_runs.sweep(*seeds).runs))]


def test_ctrl_c_lets_running_runs_write_their_checkpoint_and_starts_no_new_ones(tmp_path: Path) -> None:
    process = start(tmp_path, WAITS, WAITS + 100, WAITS + 200)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, talk = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert statuses(tmp_path, WAITS, WAITS + 100, WAITS + 200) == ["cancelled", "cancelled", "missing"]
    assert talk.count("stopped by SIGINT") == 2 and "Traceback" not in talk
    assert sorted(starts(tmp_path)) == [WAITS, WAITS + 100]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_run_says_what_stopped_it(number: signal.Signals, tmp_path: Path) -> None:
    """Where the launcher alone was told to stop, what it was told; and where that was killed, that it was."""
    process = start(tmp_path, WAITS)
    process.send_signal(number)
    process.communicate(timeout=20)
    (spec,) = fake_runs.sweep(WAITS).runs
    assert Store(tmp_path).read(spec.id).error == f"stopped by {number.name}"


def test_a_run_says_that_its_launcher_is_gone(tmp_path: Path) -> None:
    process = start(tmp_path, WAITS)
    process.kill()
    process.communicate(timeout=20)
    (spec,) = fake_runs.sweep(WAITS).runs
    deadline = time.monotonic() + 20
    while (state := Store(tmp_path).state(spec.id)).status == Status.RUNNING:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (state.status, state.error) == (Status.CANCELLED, "stopped by the end of its launcher")


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    process = start(tmp_path, HANGS)
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    assert statuses(tmp_path, HANGS) == ["cancelled"]


def test_runs_stop_by_themselves_when_their_launcher_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, WAITS)
    (pid,) = [int(line.split()[1]) for line in (tmp_path / "starts.txt").read_text().splitlines()]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while statuses(tmp_path, WAITS) != ["cancelled"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_results_that_cannot_be_written_are_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--results .*file: cannot be written: (Not a directory|File exists)"):
        check_writable(tmp_path / "file")


def test_the_fork_server_has_one_thread_no_cuda_context_and_shares_no_lock_with_a_killed_run(tmp_path: Path) -> None:
    """Also after it has loaded a base for the runs to come, with the progress bar of transformers."""
    program = """
import json, os, signal
from pathlib import Path
from multiprocessing import forkserver
from lorabench.launch.worker import start_server
from tests.conftest import make_spec

def die_in_a_bar():
    from tqdm import tqdm
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)

def draw_a_bar():
    from tqdm import tqdm
    with tqdm.get_lock():
        pass

if __name__ == "__main__":
    server = start_server(Path('server.log'), specs=[make_spec()])
    endings = []
    for target in die_in_a_bar, draw_a_bar:
        process = server.start(target, ())
        process.join(60)
        endings.append(process.exitcode)
        process.kill()
    pid = forkserver._forkserver._forkserver_pid
    maps = open(f"/proc/{pid}/maps").read()
    print(json.dumps({"threads": len(os.listdir(f"/proc/{pid}/task")), "torch": "libtorch" in maps,
                      "semaphores": "/dev/shm/sem." in maps, "endings": endings,
                      "cuda": "libcuda.so" in maps and "/dev/nvidia" in str(os.listdir(f"/proc/{pid}/fd"))}))
"""
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    command = [sys.executable, tmp_path / "program.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert "Loading weights" in (tmp_path / "server.log").read_text()
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "threads": 1, "torch": True, "semaphores": False, "endings": [-signal.SIGKILL, 0], "cuda": False,
    }  # fmt: skip


def test_crash_line_prefers_the_place_of_the_crash(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert crash_line(log) == ""
    log.write_text("one\n\ntwo\n  \n")
    assert crash_line(log) == "two"
    log.write_text("one\nCurrent thread 0x1 (most recent call first):\n  File a, line 1 in f\n  File b\n")
    assert crash_line(log) == "File a, line 1 in f"


def test_a_claim_is_released_before_the_launcher_speaks_for_a_dead_run(tmp_path: Path) -> None:
    run(tmp_path, EXITS)
    (spec,) = fake_runs.sweep(EXITS).runs
    hold = take(Store(tmp_path).folder(spec.id))
    assert hold is not None and hold.number == 3  # the run's, the launcher's, and this one


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fork_server_that_died_is_replaced_and_is_as_deaf_to_signals(tmp_path: Path) -> None:
    code = f"""
import os, signal
from multiprocessing import forkserver
from pathlib import Path
from lorabench.processes.forks import STOPS, start_server
from lorabench.store.store import Store
from lorabench.launch.worker import RankProcess, Settings
from tests import fake_runs
store, (spec,) = Store(Path({str(tmp_path)!r})), fake_runs.sweep({DONE}).runs
store.write_spec(spec)
server = start_server(store.root / "log", ["lorabench.launch.worker"], {{}})
first = forkserver._forkserver._forkserver_pid
os.kill(first, signal.SIGKILL)
os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
rank = RankProcess.start(server, fake_runs.run, [spec], store, Settings(), None)
second = forkserver._forkserver._forkserver_pid
line = [line for line in open(f"/proc/{{second}}/status") if line.startswith("SigBlk")][0]
blocked = int(line.split()[1], 16)
assert second != first and all(blocked >> (number - 1) & 1 for number in STOPS)
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
rank.process.join()
print(store.state(spec.id).status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "done\n", done.stderr


def test_a_run_outlives_its_fork_server_and_is_begun_again_where_it_did_not(tmp_path: Path) -> None:
    """Each server in turn is killed by a run; the runs beside it, and those to come, do not notice."""
    states = run(tmp_path, ORPHAN, DONE, LOST, DONE + 100, ORPHAN + 100, DONE + 200)
    assert {str(state.status) for state in states.values()} == {"done"}
    assert sorted(starts(tmp_path)) == sorted([*states, LOST])


def test_a_run_that_is_always_lost_with_its_server_is_left_to_another_launch(tmp_path: Path) -> None:
    state = run(tmp_path, LOST_AGAIN)[LOST_AGAIN]
    assert (str(state.status), state.error) == (
        "cancelled", "its fork server died, and then it did; run again to resume",
    )  # fmt: skip
    assert starts(tmp_path) == [LOST_AGAIN] * 3


def test_an_exit_code_of_255_is_one_where_the_server_lives(tmp_path: Path) -> None:
    state = run(tmp_path, EXITS_255)[EXITS_255]
    assert (str(state.status), state.error) == ("failed", "ended with exit code 255")


def test_a_kill_that_hit_the_server_for_memory_is_no_run_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[Server] = []  # each kill of one is the kernel's, and no other
    count_killed = Server.count_killed
    monkeypatch.setattr(Server, "count_killed", lambda server: servers.append(server) or count_killed(server))
    kernel = "lorabench.launch.pool.count_oom_kills"
    monkeypatch.setattr(kernel, lambda: 7 + max((count_killed(server) for server in servers), default=0))
    states = run(tmp_path, ORPHAN, KILLED)
    assert {seed: str(state.status) for seed, state in states.items()} == {ORPHAN: "done", KILLED: "cancelled"}


@pytest.mark.parametrize("seen", ["by this server", "by multiprocessing"])
def test_a_killed_server_is_counted_though_the_next_is_up_before_anyone_has_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    server = start_server(tmp_path / "server.log", PRELOAD, {})
    assert server.count_killed() == 0
    running = forkserver._forkserver
    os.kill(running._forkserver_pid, signal.SIGKILL)
    os.waitid(os.P_PID, running._forkserver_pid, os.WEXITED | os.WNOWAIT)
    if seen == "by multiprocessing":  # as where it dies between our look and the start of a process
        monkeypatch.setattr(Server, "ensure_running", lambda _: None)
    server.start(time.sleep, (0,)).join()
    assert server.count_killed() == server.count_killed() == 1


def test_an_orphan_that_the_kernel_killed_for_memory_is_oom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([7, 8])
    monkeypatch.setattr("lorabench.launch.pool.count_oom_kills", lambda: next(counts))
    monkeypatch.setattr(Server, "count_killed", lambda _: 0)  # that one by somebody else
    state = run(tmp_path, LOST)[LOST]
    assert (str(state.status), state.error) == ("oom", "killed by the kernel: out of memory")


def test_a_server_that_always_dies_ends_the_launch_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text("import os\nprint('last words', flush=True)\nos.kill(os.getpid(), 9)\n")
    code = f"""
from pathlib import Path
from lorabench.launch.pool import Pool, launch
from lorabench.store.store import Store
from tests import fake_runs
pool = Pool(workers=2, preload=("deadly",))
outcome = launch(fake_runs.sweep(0, 100, 200), Store(Path({str(tmp_path)!r})), pool, fake_runs.run)
print([str(state.status) for state in outcome.states], outcome.exit_code)
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.stdout == "['missing', 'missing', 'missing'] 1\n", done.stderr
    assert done.stderr.count("no run can be begun: the fork server dies") == 1 and "Traceback" not in done.stderr
    assert "last words" in (tmp_path / "runs" / ".server.log").read_text()
