"""Cluster profiles: TOML -> a validated frozen dataclass -> the parameters of submitit's scripts.

A profile says where and how runs are computed, never what; it is in no run's id.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from lorabench.config.decode import InputError, Pattern, decode, read_toml, show
from lorabench.config.quote import clip, show_path
from lorabench.launch.packs import Asked, most_in_pack

Word = Annotated[str, Pattern(r"\S+", "a text without spaces")]
OWN_OPTIONS = {
    "account": "account", "array": "parallel", "comment": "", "constraint": "constraint", "cpus-per-task": "cpus",
    "error": "", "exclude": "exclude", "gpus": "gpus", "gpus-per-node": "gpus", "gres": "gpus", "job-name": "",
    "mem": "mem_gib", "nodes": "nodes", "no-requeue": "requeue", "ntasks": "ranks_per_node",
    "ntasks-per-node": "ranks_per_node", "open-mode": "", "output": "", "partition": "partition", "qos": "qos",
    "requeue": "requeue", "signal": "signal_seconds", "time": "minutes", "wrap": "",
}  # fmt: skip
"""Options of sbatch that are not for `extra`, and the key that gives each, if any does."""
SLURM_ONLY = (
    "partition", "account", "qos", "constraint", "exclude", "gpu_type", "mem_gib", "max_array", "container", "extra",
)  # fmt: skip
DEAF = 'trap "" USR2 TERM; exec "$@"'
YEAR_MINUTES = 366 * 24 * 60


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a job asks of its cluster, and how runs are put into jobs."""

    kind: Literal["slurm", "local"] = "slurm"
    """`local`: processes on this machine, which outlive the command."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: str | None = None
    """Features that a node must have: `a100`, `a100&nvlink`."""
    exclude: Word | None = None
    """Nodes to keep away from."""
    nodes: Annotated[int, Ge(1), Le(4096)] = 1
    gpus: Annotated[int, Ge(0), Le(64)] = 1
    """Of each node; 0 for runs on the CPU."""
    gpu_type: Word | None = None
    """As the cluster calls it, in `--gpus-per-node=TYPE:N`."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """What runs compute on (None: cuda with GPUs, else cpu). `auto` would quietly take a CPU where a GPU is broken."""
    ranks_per_node: Annotated[int, Ge(1), Le(64)] | None = None
    """Processes on each node that train one run together (None: one for each GPU)."""
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    """Of several ranks: whether each holds the whole model, or a part (`auto`: a part where the base is trained)."""
    cpus: Annotated[int, Ge(1), Le(4096)] = 4
    """Cores of each rank."""
    mem_gib: Annotated[float, Gt(0), Le(65536)] | None = None
    """Memory of each node (None: what the cluster gives)."""
    minutes: Annotated[int, Ge(1), Le(YEAR_MINUTES)] = 60
    """Time limit of a job. A run that does not fit goes on in the next start; see `max_timeouts`.

    A local job is started 6 times at most, by submitit: give it the days that it may take.
    """
    parallel: Annotated[int, Ge(1), Le(100_000)] = 50
    """Jobs that may run at a time."""
    max_array: Annotated[int, Ge(1), Le(10_000_000)] | None = None
    """Jobs of an array at most (None: the cluster's MaxArraySize)."""
    cells_per_job: Annotated[int, Ge(1), Le(1_000_000)] | Literal["auto"] = "auto"
    """Runs that share a job, its start and its imports; `auto`: as many as take about `target_minutes`."""
    target_minutes: Annotated[float, Gt(0), Le(YEAR_MINUTES)] = 30
    cells_at_once: Annotated[int, Ge(1), Le(1024)] = 1
    """Runs of a job that are computed side by side; they share its GPUs."""
    pack: Annotated[int, Ge(1)] | Literal["auto", "off"] = "auto"
    """Runs of a job of one base at most that share their passes; `auto`: as many as pay."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the work starts: `module load cuda`."""
    container: str | None = None
    """Command that the job's Python is started by: `apptainer exec --nv lorabench.sif`."""
    python: str | None = None
    """The job's Python (None: the one that submits, or `python3` in a container)."""
    environment: dict[str, str] = field(default_factory=dict)
    signal_seconds: Annotated[int, Ge(5), Le(65535)] = 90
    """So long before the time limit runs are told to write their checkpoints."""
    requeue: bool = True
    """Whether a job that was preempted or ran out of time is queued again."""
    max_timeouts: Annotated[int, Ge(0), Le(1_000_000)] = 3
    """How often a run may reach the time limit and go on in the next start; then its status is `timeout`."""
    checkpoint_seconds: Annotated[float, Ge(0)] = 300
    """A checkpoint is written so often, too: what a node's crash can cost."""
    extra: dict[str, str | int | bool] = field(default_factory=dict)
    """Any further options of sbatch: `reservation = "course"`, `exclusive = true`."""

    def __post_init__(self) -> None:
        problems = [*self._conflicts(), *self._unfit_extra(), *self._unfit_environment()]
        if problems:
            raise ValueError("\n".join(problems))

    def _conflicts(self) -> list[str]:
        problems = []
        if self.kind == "local":
            given = [key for key in SLURM_ONLY if getattr(self, key)]
            problems += [f'{key} = {show(getattr(self, key))}: only kind = "slurm" has it' for key in given]
            if self.nodes > 1:
                problems.append(f'nodes = {self.nodes}: must be 1 with kind = "local"')
        if self.signal_seconds >= 60 * self.minutes:
            problems.append(f"signal_seconds = {self.signal_seconds}: must be less than the job's {self.minutes} min")
        if self.gpus and self.ranks_per_node and self.ranks_per_node > self.gpus:
            problems.append(f"ranks_per_node = {self.ranks_per_node}: must be at most gpus = {self.gpus}")
        if self.gpu_type and not self.gpus:
            problems.append(f"gpu_type = {show(self.gpu_type)}: there are none, with gpus = 0")
        if self.cells_at_once > 1 and self.world_size > 1:
            ranks = f"a run takes {self.world_size} ranks: set ranks_per_node = 1"
            problems.append(f"cells_at_once = {self.cells_at_once}: must be 1 where {ranks}")
        return problems

    def _unfit_extra(self) -> list[str]:
        problems = []
        for key, value in self.extra.items():
            option = key.replace("_", "-").lstrip("-")
            if option in OWN_OPTIONS:
                instead = OWN_OPTIONS[option]
                problems.append(
                    f"extra.{clip(key)} = {show(value)}: " + (f"use {instead}" if instead else "is lorabench's")
                )
        return problems

    def _unfit_environment(self) -> list[str]:
        return [
            f"environment.{clip(name)} = {show(value)}: must be named by letters, digits and _"
            for name, value in self.environment.items()
            if not name.isidentifier() or not name.isascii()
        ]

    @property
    def ranks(self) -> int:
        """Processes on a node that train a run together."""
        return self.ranks_per_node or max(1, self.gpus)

    @property
    def world_size(self) -> int:
        """Processes that train a run together."""
        return self.nodes * self.ranks

    @property
    def run_device(self) -> str:
        return self.device or ("cuda" if self.gpus else "cpu")

    @property
    def usable_seconds(self) -> float:
        """Of a job's time, what is left for runs."""
        return 60.0 * self.minutes - self.signal_seconds

    @property
    def command(self) -> str:
        """How a job's Python is called, for a shell: deaf to SLURM's signals until it has handlers of its own.

        They would end it in its first seconds, and a preempted job that ends by itself is not queued again.
        """
        python = self.python or ("python3" if self.container else shlex.quote(sys.executable))
        deaf = f"sh -c {shlex.quote(DEAF)} sh"
        return f"{deaf} {self.container} {python}" if self.container else f"{deaf} {python}"

    @property
    def shell(self) -> list[str]:
        """The lines before the work starts."""
        return [*(f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()), *self.setup]

    def slurm_parameters(self, name: str, comment: str, parallel: int, folder: Path) -> dict[str, Any]:
        """For submitit's script; `parallel` jobs of the array at a time. `folder` is where the script is kept."""
        kind = f"{self.gpu_type}:{self.gpus}" if self.gpu_type else self.gpus
        exits = ["--kill-on-bad-exit=1"] if self.world_size > 1 else []
        parameters = {
            "job_name": name,
            "comment": comment,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks,
            "cpus_per_task": self.cpus,
            "gpus_per_node": kind or None,
            "mem": None if self.mem_gib is None else f"{math.ceil(1024 * self.mem_gib)}M",
            "time": self.minutes,
            "signal_delay_s": self.signal_seconds,
            "array_parallelism": parallel,
            "setup": ["export SLURM_EXPORT_ENV=ALL", *self.shell],  # else srun heeds what sbatch was told
            "teardown": _requeue_lines(folder) if self.container else None,
            "additional_parameters": {"requeue" if self.requeue else "no-requeue": True} | self.extra,
            # since SLURM 22.05 srun does not inherit it
            "srun_args": [f"--cpus-per-task={self.cpus}", *exits],
        }
        return {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}


def packing(profile: Profile, alone: frozenset[str] = frozenset()) -> Asked:
    """How a job packs its runs: not those that several ranks compute together."""
    size = most_in_pack(profile.pack) if profile.world_size == 1 else 1
    gpu = f"{profile.gpu_type} {profile.constraint}"
    return Asked(size=size, device=profile.run_device, workers=profile.cells_at_once, gpu=gpu, alone=alone)


def requeue_file(folder: Path, job: str) -> Path:
    """Made by a job that cannot call scontrol, for it is in a container: the script around it queues it again."""
    return folder / f"{job}.requeue"


def _requeue_lines(folder: Path) -> list[str]:
    file = f"{shlex.quote(str(folder))}/$SLURM_JOB_ID.requeue"
    element = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"  # not the whole array
    return [f"if [ -e {file} ]; then", f"    rm {file}", f'    scontrol requeue "{element}"', "fi"]


def read_profile(path: Path, changes: dict[str, Any] | None = None) -> Profile:
    """The profile in a TOML file, with single keys replaced. InputError with all of its problems at once."""
    try:
        table, _ = read_toml(path)
    except FileNotFoundError:
        shipped = sorted(str(file) for file in path.parent.glob("*.toml")) or ["slurm/*.toml of lorabench's repository"]
        raise InputError(f"{show_path(path)}: no such cluster profile. Choices: {', '.join(shipped)}") from None
    try:
        return decode(Profile, table | (changes or {}))
    except InputError as error:
        raise InputError(error.problems, str(path)) from None


KEYS = [item.name for item in dataclasses.fields(Profile)]
