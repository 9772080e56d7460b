"""The record of a run that could not write its own, by whoever saw its process or its job end."""

from __future__ import annotations

from dataclasses import replace

from lorabench.config.decode import InputError
from lorabench.config.json_file import Unreadable
from lorabench.store.claim import last_number, take
from lorabench.store.record import RunRecord, Status, now
from lorabench.store.store import RunState, Store


def settle(store: Store, state: RunState, status: Status, error: str) -> RunState:
    """Give the run of `state`, as it was seen, this status; how it stands then.

    Another worker that has the run by now, or has ended it, is never written over. Raises OSError where the store
    cannot be written.
    """
    folder, seen = store.folder(state.run_id), state.claim
    before = last_number(folder, seen)
    hold = take(folder, seen.progress if seen else None)
    if hold is None:
        return store.state(state.run_id)
    with hold:
        record = RunRecord(run_id=state.run_id, spec=state.spec, status=status)
        try:
            record = store.read(state.run_id) or record
        except Unreadable as problem:  # and may well be whole
            return replace(state, status=Status.FAILED, error=problem.problems[0], unread=True)
        except InputError:
            pass
        if record.status == Status.DONE or hold.number > before + 1:
            return RunState(run_id=state.run_id, status=record.status, spec=record.spec, record=record)
        record = replace(record, status=status, error=error, finished=now())
        store.write(record)
    return RunState(
        run_id=state.run_id, status=status, spec=record.spec, record=record, claim=seen, error=error
    )  # fmt: skip
