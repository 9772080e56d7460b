"""What to submit, and its submission by sbatch."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorabench.cluster import background, job, slurm
from lorabench.cluster.enqueue import Plan, new_name, write_jobs, write_plan
from lorabench.cluster.packing import Cell, Limits, pack, share, split, spread
from lorabench.cluster.profile import Profile
from lorabench.cluster.queue import COMMENT, Array, Submission, read_submission
from lorabench.cluster.run_states import Standing, standings
from lorabench.cluster.work import forget_timeouts
from lorabench.config.decode import InputError, encode
from lorabench.config.quote import show_path
from lorabench.spec.run_spec import RunSpec
from lorabench.spec.sweep import Sweep
from lorabench.store.claim import current_claim
from lorabench.store.record import FAILURES, Status
from lorabench.store.store import Store

START_SECONDS = 20.0
"""Added to an estimate that knows nothing of loading, evaluation and saving."""
USUAL_MAX_ARRAY = 1001
"""SLURM's own default of MaxArraySize, where it cannot be asked."""
LEFT_ALONE = (*FAILURES, Status.CORRUPT)
"""Submitted again only where `--retry` names it."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A sweep, and the cluster that it is for."""

    sweep: Sweep
    profile: Profile
    cluster: str
    """Name of the profile."""
    retry: frozenset[Status] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What a submission of an order would be just now."""

    order: Order
    name: str
    standings: dict[str, Standing]
    estimates: dict[str, dict[str, Any]]
    """Of each run, as `lorabench.launch.plan` has it."""
    jobs: list[list[Cell]]
    arrays: list[tuple[int, int]]
    """(first job, number of jobs)."""
    config: dict[str, str]
    """SLURM's own, where it can be asked."""

    @cached_property
    def run_ids(self) -> list[str]:
        """What would be submitted."""
        return [cell.run_id for job in self.jobs for cell in job]


def prepare(order: Order, store: Store, plan: dict[str, Any], tell: Callable[[str], None] | None = None) -> Prospect:
    """Which runs are to be submitted, and in which jobs. `plan` is `lorabench.launch.plan`'s of the sweep.

    Raises slurm.Unreachable where SLURM does not answer; with `tell` that is told instead.
    """
    profile = order.profile
    found = {
        standing.run_id: standing
        for standing in standings(store, order.sweep.runs, tell, Status.CORRUPT in order.retry)
    }
    estimates = {run["run_id"]: run["estimate"] for run in plan["runs"]}
    missing = [spec for spec in order.sweep.runs if is_missing(found[spec.id].status, order.retry)]
    cells = [Cell(run_id=s.id, seconds=expected_seconds(estimates[s.id]), kind=warm_kind(s)) for s in missing]
    config = _config(tell) if profile.kind == "slurm" else {}
    if profile.kind == "local":
        jobs = spread(cells, profile.parallel)
        arrays = [(number, 1) for number in range(len(jobs))]
    else:
        jobs = pack(cells, limits(profile))
        arrays = split(len(jobs), profile.max_array or int(config.get("MaxArraySize", USUAL_MAX_ARRAY)))
    return Prospect(
        order=order, name=new_name(order.sweep.name), standings=found, estimates=estimates, jobs=jobs, arrays=arrays,
        config=config,
    )  # fmt: skip


def is_missing(status: Status, retry: frozenset[Status]) -> bool:
    """Whether a run that stands so is to be submitted: neither done, nor queued, nor failed and left alone."""
    if status in LEFT_ALONE:
        return status in retry
    return status not in (Status.DONE, Status.RUNNING, Status.PENDING)


def expected_seconds(estimate: dict[str, Any]) -> float:
    return estimate["seconds"] + (START_SECONDS if estimate["basis"] == "formula" else 0.0)


def warm_kind(spec: RunSpec) -> tuple[Any, ...]:
    """What a job loads once for all of its runs: base and data."""
    return spec.model, spec.revision, spec.quantization, spec.dtype, spec.seq_len, repr(spec.stages)


def limits(profile: Profile) -> Limits:
    return Limits(
        seconds=profile.usable_seconds,
        target_seconds=60 * profile.target_minutes,
        cells=None if profile.cells_per_job == "auto" else profile.cells_per_job,
        at_once=profile.cells_at_once,
    )


def _config(tell: Callable[[str], None] | None) -> dict[str, str]:
    try:
        return slurm.config()
    except slurm.Unreachable as error:
        if tell is None:
            raise
        tell(f"{error.problems[0]}; MaxArraySize is taken as {USUAL_MAX_ARRAY}")
        return {}


def scripts(prospect: Prospect, root: Path) -> list[str]:
    """The sbatch script of each array, in submitit's words; what it starts is `lorabench.cluster.job`."""
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)  # read when submitit is imported; the signal is USR2
    from submitit.slurm.slurm import _make_sbatch_string

    python = prospect.order.profile.command
    folder = submitit_folder(root, prospect.name)
    texts = []
    for (first, count), parallel in zip(prospect.arrays, _parallel(prospect), strict=True):
        own = parameters(prospect, parallel, folder) | ({"map_count": count} if count > 1 else {})
        texts.append(_make_sbatch_string(command=job.command(python, folder.parent, first), folder=folder, **own))
    return texts


def try_out(prospect: Prospect, root: Path, tell: Callable[[str], None]) -> None:
    """Have the cluster look at the first script, where it can be asked. InputError if it would refuse it."""
    if prospect.config and prospect.arrays:
        tell(f"sbatch --test-only: {slurm.try_script(scripts(prospect, root)[0])}")


def parameters(prospect: Prospect, parallel: int, folder: Path) -> dict[str, Any]:
    """For submitit's script."""
    name = f"lorabench-{prospect.order.sweep.name}"
    return prospect.order.profile.slurm_parameters(name, COMMENT + prospect.name, parallel, folder)


def _parallel(prospect: Prospect) -> list[int]:
    return share(prospect.order.profile.parallel, len(prospect.arrays))


def submitit_folder(root: Path, name: str) -> Path:
    folder = (root / "queue" / name / "submitit").absolute()
    if "%" in str(folder):
        raise InputError(f"--results {show_path(root)}: must have no % in its path, which SLURM would replace")
    return folder


def send(prospect: Prospect, store: Store, check: Callable[[], None] = lambda: None) -> Submission:
    """Submit; to be called while the queue is held, which `check` makes sure of before each array.

    InputError with the cluster's words where it refuses.
    """
    check()
    order, profile = prospect.order, prospect.order.profile
    specs = {spec.id: spec.to_json() for spec in order.sweep.runs}
    plan = Plan(
        sweep=order.sweep.name,
        cluster=order.cluster,
        kind=profile.kind,
        slurm_cluster=prospect.config.get("ClusterName"),
        profile=encode(profile),
        specs={run_id: specs[run_id] for run_id in prospect.run_ids},
        jobs=[[cell.run_id for cell in job] for job in prospect.jobs],
        arrays=prospect.arrays,
        retry=_clear(prospect, store),
    )
    submission = write_plan(store.root, prospect.name, plan)
    submission.submitit.mkdir(exist_ok=True)
    if profile.kind == "local":
        background.start(submission)
    else:
        _send_arrays(prospect, store.root, submission, check)
    return read_submission(submission.folder) or submission


def _clear(prospect: Prospect, store: Store) -> dict[str, int]:
    """Take away what earlier jobs have left for those to come; the last claim of each run that is repeated."""
    retry = {}
    for run_id in prospect.run_ids:
        folder = store.folder(run_id)
        store.uncancel(run_id)
        if prospect.standings[run_id].status in LEFT_ALONE:
            forget_timeouts(folder)
            claim = current_claim(folder)
            retry[run_id] = claim.number if claim else 0
    return retry


def _send_arrays(prospect: Prospect, root: Path, submission: Submission, check: Callable[[], None]) -> None:
    taken: list[Array] = []
    for (first, count), text in zip(prospect.arrays, scripts(prospect, root), strict=True):
        check()
        script = submission.submitit / f"array_{first}.sh"
        script.write_text(text)
        try:
            with _plain_environment(prospect.order.profile):
                job_id = slurm.submit(script)
        except InputError as error:
            if not (taken or isinstance(error, slurm.Unreachable)):  # sbatch said no: nothing was submitted
                shutil.rmtree(submission.folder)
            done = f"; {len(taken)} of {len(prospect.arrays)} arrays were submitted" if taken else ""
            raise InputError(f"{error}{done}") from None
        taken.append(Array(first=first, count=count, job_id=job_id))
        write_jobs(submission, taken)


@contextlib.contextmanager
def _plain_environment(profile: Profile) -> Iterator[None]:
    """sbatch lets variables override its script: those of a job that it is called in, and the user's own.

    A user's account, partition and qos stay where the profile names none.
    """
    kept = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CLUSTER_NAME"}
    kept |= {f"SBATCH_{key.upper()}" for key in ("account", "partition", "qos") if getattr(profile, key) is None}
    mine = ("SBATCH_", *(("SLURM_", "SRUN_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()))
    names = [name for name in os.environ if name.startswith(mine) and name not in kept]
    taken = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(taken)


def warnings(prospect: Prospect, specs: Sequence[RunSpec]) -> list[str]:
    """What may go wrong on the cluster, one sentence each."""
    profile, config = prospect.order.profile, prospect.config
    lines = []
    run_ids = set(prospect.run_ids)
    wanted = [spec for spec in specs if spec.id in run_ids]
    threads = max((spec.threads for spec in wanted), default=1) * profile.cells_at_once
    if threads > profile.cpus:
        lines.append(f"cpus = {profile.cpus}: the runs of a job use {threads} threads")
    heavy = [id for id in prospect.run_ids if profile.mem_gib and _host_gib(prospect, id) > profile.mem_gib]
    if heavy:
        lines.append(f"mem_gib = {profile.mem_gib:g}: {len(heavy)} runs are expected to need more, {heavy[0]} first")
    long = sum(cell.seconds > profile.usable_seconds for job in prospect.jobs for cell in job)
    if long:
        lines.append(f"minutes = {profile.minutes}: {long} runs are expected to take longer, and go on after requeues")
    unseen = [
        id for id in prospect.run_ids if (queue := prospect.standings[id].queue) and not queue.state and queue.reason
    ]
    if unseen:
        why = prospect.standings[unseen[0]].queue
        lines.append(f"{len(unseen)} runs may be queued already, where it is not seen from here: {why and why.reason}")
    told = config.get("SlurmctldParameters", "") + config.get("PreemptParameters", "")
    if config.get("PreemptType", "preempt/none") != "preempt/none" and "send_user_signal" not in told:
        lines.append("this cluster preempts jobs without the signal that they ask for: runs have its GraceTime alone")
    return lines


def _host_gib(prospect: Prospect, run_id: str) -> float:
    """Memory of the host that a job of such runs needs; on a GPU not known."""
    profile = prospect.order.profile
    return 0.0 if profile.gpus else prospect.estimates[run_id]["peak_gib"] * profile.cells_at_once
