"""How each run stands: the store, which alone says what is done, joined with the queue and with SLURM.

In the order of truth: a whole record; a live claim, whose run is running; a job in the queue, for which the run
waits; and of a job that is gone without a result, what the accounting says of its end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lorabench.cluster import slurm
from lorabench.cluster.lookup import Lookup, Seen, Tell
from lorabench.cluster.queue import Submission, read_submissions, user_name
from lorabench.cluster.verdict import began_by, has_just_ended, judge, shows_late, tells_of_memory
from lorabench.spec.run_spec import RunSpec
from lorabench.store.crash_record import settle
from lorabench.store.record import FAILURES, Status
from lorabench.store.store import RunState, Store
from lorabench.terminal.text import duration
from lorabench.training.stability import judged

RESUMABLE = (Status.MISSING, Status.INTERRUPTED, Status.CANCELLED)
UNSETTLED = (Status.PENDING, Status.RUNNING)
"""Statuses that will change by themselves."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A run's place in a submission."""

    submission: Submission
    job: int


@dataclass(frozen=True, kw_only=True)
class Queued:
    """The job that a run waits for, is computed by, or was last given to."""

    submission: str
    cluster: str
    job_id: str | None
    state: str | None
    """SLURM's word, or for a local job RUNNING; None where it is gone or not known."""
    reason: str | None
    start: str | None
    """When the job started, or is expected to; the cluster's local time."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A run as it stands now."""

    state: RunState
    """Its status may also be `pending` or `lost`."""
    queue: Queued | None = None
    place: Place | None = None
    gone: Seen | None = None
    """The job that went away without a result of the run."""
    is_ours: bool = True
    """Whether the job in the queue is known to be the submission's, and not another one with its number."""

    @property
    def run_id(self) -> str:
        return self.state.run_id

    @property
    def status(self) -> Status:
        return self.state.status


def standings(
    store: Store,
    runs: Sequence[RunSpec] | Sequence[str] | None = None,
    tell: Tell | None = None,
    verify: bool = False,
) -> list[Standing]:
    """These runs (specs, or ids), or all that the store and its queue hold; what ended jobs left is settled on the way.

    With `verify` runs whose files are gone or changed are `corrupt`: every file is read.
    Raises slurm.Unreachable where squeue does not answer; with `tell` it is told instead, and what cannot be known
    stays as the store has it.
    """
    submissions = list(read_submissions(store.root, tell))
    places = _places(submissions)
    states = judged(_states(store, submissions, runs))
    states = [store.verified(state) for state in states] if verify else states
    placed = [state for state in states if state.run_id in places]
    marked = {state.run_id for state in placed if _is_marked(store, state)}
    states = [_cancelled(state) if state.run_id in marked else state for state in states]
    waits = {s.run_id for s in placed if s.run_id not in marked and _may_wait(s, places[s.run_id][0])}
    busy = [s.run_id for s in placed if s.run_id in waits or s.status == Status.RUNNING]
    asked = {place.submission.name: place.submission for run_id in busy for place in places[run_id]}
    lookup = Lookup(asked.values(), tell)
    found = [_join(state, places.get(state.run_id, []), state.run_id in waits, lookup) for state in states]
    return _settled(store, found, tell)


def _places(submissions: Iterable[Submission]) -> dict[str, list[Place]]:
    """Run id -> where it was submitted, the latest first."""
    places: dict[str, list[Place]] = {}
    for submission in submissions:
        for job, run_ids in enumerate(submission.jobs):
            for run_id in run_ids:
                places.setdefault(run_id, []).insert(0, Place(submission=submission, job=job))
    return places


def _states(
    store: Store, submissions: list[Submission], runs: Sequence[RunSpec] | Sequence[str] | None
) -> list[RunState]:
    """As the store has them. Of runs that have not begun only the queue knows the spec, or that they are."""
    if runs and isinstance(runs[0], RunSpec):
        return [store.state(spec.id, spec) for spec in runs if isinstance(spec, RunSpec)]
    planned = {run_id: spec for submission in submissions for run_id, spec in submission.specs.items()}
    begun = store.run_ids()
    wanted = sorted({*begun, *planned}) if runs is None else [str(run_id) for run_id in runs]
    here = set(begun)
    states = []
    for run_id in wanted:
        state = store.state(run_id) if run_id in here else RunState(run_id=run_id, status=Status.MISSING, spec={})
        states.append(state if state.spec else replace(state, spec=planned.get(run_id, {})))
    return states


def _is_marked(store: Store, state: RunState) -> bool:
    """Whether a marker keeps the run's job from taking it up (again)."""
    return state.status in RESUMABLE and store.cancel_marker(state.run_id).exists()


def _cancelled(state: RunState) -> RunState:
    return replace(state, status=Status.CANCELLED, error=state.error or "cancelled; run or submit again to resume")


def _may_wait(state: RunState, latest: Place) -> bool:
    """Whether the run is not settled since its latest submission: its job, if it is there, will compute it."""
    if state.status in RESUMABLE:  # `cancelled` too: it wrote its checkpoint when its job was preempted
        return True
    claim = state.claim.number if state.claim else 0
    return state.status in (*FAILURES, Status.CORRUPT) and latest.submission.retry.get(state.run_id) == claim


def _join(state: RunState, places: list[Place], may_wait: bool, lookup: Lookup) -> Standing:
    if not places:
        return Standing(state=state)
    place = next((p for p in places if lookup.seen(p.submission, p.job).is_queued), places[0])
    seen = lookup.seen(place.submission, place.job)
    if seen.job_id is None and not seen.is_queued:  # its submitter died before this array's turn
        return Standing(state=state)
    if may_wait and seen.is_queued:
        state = replace(state, status=Status.PENDING, error=None)
    queued = Queued(
        submission=place.submission.name,
        cluster=place.submission.cluster,
        job_id=seen.job_id,
        state=seen.state,
        reason=_reason(state, seen),
        start=seen.start,
    )
    gone = may_wait and seen.is_queued is False and state.status in (Status.MISSING, Status.INTERRUPTED)
    return Standing(
        state=state, queue=queued, place=place, gone=seen if gone else None, is_ours=seen.is_ours
    )  # fmt: skip


def _reason(state: RunState, seen: Seen) -> str | None:
    """Why a run waits whose job is in the queue, or runs already."""
    if state.status != Status.PENDING or seen.reason or seen.state != "RUNNING":
        return seen.reason
    claim = state.claim
    if claim and not claim.released and claim.progress.get("job") == seen.job_id:
        return f"no heartbeat for {duration(time.time() - claim.time)}"
    return "in a running job"


def _settled(store: Store, found: list[Standing], tell: Tell | None) -> list[Standing]:
    """The same, with a verdict on each run whose job is gone.

    The record of a run that had begun keeps it, but for `lost`; of what had not begun there is nothing to keep.
    """
    gone = [standing for standing in found if standing.gone]
    if not gone:
        return found
    ended, why = _ask_accounting(gone, tell)
    late = shows_late(store.root)
    return [_judged(store, standing, ended, why, late) if standing.gone else standing for standing in found]


def _ask_accounting(gone: list[Standing], tell: Tell | None) -> tuple[dict[str, slurm.Ended], str]:
    """What is known of how these jobs ended, by their ids, and what to say of one of which nothing is known."""
    seen = [s.gone for s in gone if s.gone and s.place and s.place.submission.kind == "slurm"]
    known = {
        s.job_id: slurm.Ended(id=s.job_id, state=s.state, end=s.end, nodes=s.nodes)
        for s in seen
        if s.job_id and s.state
    }
    if not seen:
        return {}, ""
    try:
        found = slurm.list_ended({s.job_id for s in seen if s.job_id})
    except slurm.Unreachable as error:
        if tell is not None:
            tell(f"{error.problems[0]}; why jobs ended is not known")
        return known, "why is not known: the accounting did not answer"
    if found is None:
        return known, "why is not known: this cluster keeps no accounting"
    found = {id: end for id, end in found.items() if end.state in slurm.ENDED or id not in known}  # sacct lags behind
    return known | found, "SLURM has no trace of it: cancelled while it waited?"


def _judged(store: Store, standing: Standing, ended: dict[str, slurm.Ended], why: str, late: bool) -> Standing:
    place, seen = standing.place, standing.gone
    assert place and seen and seen.job_id
    submission, is_local = place.submission, place.submission.kind == "local"
    state = store.state(standing.run_id)  # its job may have ended between the look at the store and that at the queue
    state = state if state.spec else replace(state, spec=standing.state.spec)
    end = None if is_local else ended.get(seen.job_id)
    if place.job in submission.cancelled and (end is None or end.state not in slurm.ENDED):
        end = slurm.Ended(id=seen.job_id, state="CANCELLED")
    began = began_by(state.claim, seen.job_id, submission.time, end)
    if began is None or state.status not in (Status.MISSING, Status.INTERRUPTED):
        return replace(standing, state=state)
    if late and not is_local and has_just_ended(end, state.claim):
        queue = replace(standing.queue, reason="its job has just ended") if standing.queue else None
        return replace(standing, state=replace(state, status=Status.PENDING, error=None), queue=queue)
    if began and (end is None or end.state == "FAILED") and tells_of_memory(submission.job_logs(seen.job_id)):
        end = replace(end or slurm.Ended(id=seen.job_id, state=""), state="OUT_OF_MEMORY")
    verdict = judge(seen.job_id, began, end, f"its process ended on {submission.host}" if is_local else why)
    if began and verdict.status != Status.LOST and submission.user == user_name():
        with contextlib.suppress(OSError):  # a full disk, another's folder: it is told all the same, and tried again
            return replace(standing, state=settle(store, state, verdict.status, verdict.error))
    return replace(standing, state=replace(state, status=verdict.status, error=verdict.error))
