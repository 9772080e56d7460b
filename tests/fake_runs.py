"""Stand-ins for `lorabench.training.execute`, so that the launcher is tested on every way in which a process can end.

What a run does is chosen by its seed modulo 100; it imports no torch, so that a test takes a second.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from lorabench.launch.worker import Settings
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep, parse_sweep
from lorabench.store.claim import take
from lorabench.store.record import RunRecord, Status
from lorabench.store.store import Store
from lorabench.training.stop import Stop, stop_on_signals
from tests.conftest import TOY

DONE, OOM, RAISES, EXITS, SEGFAULT, KILLED, WAITS, HANGS, NO_RECORD = range(9)
ORPHAN, LOST, LOST_AGAIN, EXITS_255 = range(20, 24)


def sweep(*seeds: int, **base: object) -> Sweep:
    table = {"base": TOY | {"method": {"name": "lora"}, "seed": list(seeds)} | base}
    return parse_sweep(table, default_name="fakes")


def run(spec: RunSpec, store: Store, settings: Settings) -> None:
    """Claim the run, then end as its seed says; every start is counted in a file."""
    with open(store.root / "starts.txt", "a") as file:
        file.write(f"{spec.seed} {os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    hold = take(store.folder(spec.id))
    if hold is None:
        return
    with hold:
        hold.progress |= {"phase": "train", "step": 1, "steps": 2, "loss": 2.5, "tokens_per_second": 100.0}
        record = RunRecord(run_id=spec.id, spec=spec.to_json(), status=Status.RUNNING, attempts=hold.number)
        if spec.seed != NO_RECORD:
            store.write(record)
        end(spec.seed % 100, record, store)


def end(behaviour: int, record: RunRecord, store: Store) -> None:
    if behaviour == RAISES:
        raise ValueError("the fake raises")
    if behaviour == EXITS:
        print("about to leave", flush=True)
        os._exit(3)
    if behaviour == EXITS_255:
        os._exit(255)
    if behaviour in (ORPHAN, LOST, LOST_AGAIN):
        kill_server()
        if behaviour == LOST_AGAIN or (behaviour == LOST and record.attempts == 1):
            os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == SEGFAULT:
        ctypes.string_at(0)
    if behaviour == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == HANGS:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if behaviour == WAITS:
        record.status, record.error = wait_for_signal()
    elif behaviour == OOM:
        record.status, record.error = Status.OOM, "CUDA out of memory"
    elif behaviour == NO_RECORD:
        return
    else:
        time.sleep(0.2)
        record.status = Status.DONE
        record.measures = {"valid_loss": 2.0, "total_seconds": 0.2}
    store.write(record)


def kill_server() -> None:
    """The fork server that this process comes from, unless it is dead already: then another is the parent."""
    parent = os.getppid()
    if b"multiprocessing.forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes():
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            time.sleep(0.01)


def wait_for_signal() -> tuple[Status, str | None]:
    with stop_on_signals(stop := Stop()):
        for _ in range(200):
            if stop.reason:
                return Status.CANCELLED, f"stopped by {stop.reason}"
            time.sleep(0.05)
    return Status.DONE, None


def main(root: str, *seeds: str) -> None:
    """Launch the fakes: a process of its own for the tests that send it signals."""
    from lorabench.launch.pool import Pool, launch

    pool = Pool(workers=2, preload=("lorabench.launch.worker",))
    outcome = launch(sweep(*map(int, seeds)), Store(Path(root)), pool, run)
    sys.exit(outcome.exit_code)


if __name__ == "__main__":
    from tests import fake_runs

    fake_runs.main(*sys.argv[1:])
