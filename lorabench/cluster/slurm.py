"""What SLURM says of jobs. The only place that calls squeue, sacct, scontrol and scancel.

Job ids are SLURM's own, as text: `123`, or `123_4` for element 4 of an array. Its commands obey many variables of
the environment (SQUEUE_FORMAT, SQUEUE_PARTITION, SLURM_TIME_FORMAT, …), which a user may have set for his own eyes;
they are taken away here.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabench.config.decode import InputError
from lorabench.config.quote import clip

COMMENT = "lorabench:"
"""With a submission's name behind it, the comment of its jobs."""
TIMEOUT_SECONDS = 60.0
SUBMIT_SECONDS = 300.0
BATCH = 200
"""Most job ids, or ranges of them, in one command."""
SQUEUE = ["squeue", "--noheader", "--all", "--array", "--states=all", "--format=%i|%T|%r|%S|%e|%N|%u|%k"]
"""`--all`: partitions that are hidden from lists too. `--states=all`: what has ended in the last minutes too."""
SACCT_FIELDS = ["JobID", "State", "ExitCode", "Start", "End", "NodeList"]
SACCT = [
    "sacct", "--noheader", "--parsable2", "--allusers", "--duplicates", f"--format={','.join(SACCT_FIELDS)}",
]  # fmt: skip
"""`--duplicates`: every start of a job that was requeued."""
ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
     "PREEMPTED", "RECONFIG_FAIL", "REVOKED", "TIMEOUT")
)  # fmt: skip
"""States from which a job does not come back by itself: a requeued one is PENDING again."""
_NO_ACCOUNTING = re.compile(r"accounting storage is disabled|not running a supported accounting_storage", re.I)
_NO_SUCH_JOB = re.compile(r"invalid job id|already completing|already completed|job/step already", re.I)
_ARRAY = re.compile(r"(\d+)_\[([\d,:-]+)(%\d+)?\]")
_ID = re.compile(r"\d+([_+]\d+)?")
"""`12_3`: element 3 of an array; `12+1`: part 1 of a heterogeneous job."""
_BEGIN = re.compile(r"\d+[_+|]")
"""Of a job's line, which other people's comments may break into several."""


class Unreachable(InputError):
    """SLURM did not answer, or not in a way that can be read: nothing is known of any job."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job in the queue, or one that has left it in the last minutes, as squeue lists it."""

    id: str
    state: str
    reason: str | None = None
    """Why it waits, or has ended: `Priority`, `JobArrayTaskLimit`, `TimeLimit`."""
    start: str | None = None
    """When it started, or is expected to; the cluster's local time."""
    end: str | None = None
    """When it ended, or has to end at the latest."""
    nodes: str | None = None
    user: str | None = None
    comment: str | None = None

    @property
    def is_queued(self) -> bool:
        """Waiting, running, or on its way from one to the other."""
        return self.state not in ENDED


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job went away: its last start, as sacct tells it."""

    id: str
    state: str
    """`CANCELLED by 1000` is CANCELLED; OUT_OF_MEMORY also where only a step was killed for it."""
    exit_code: int = 0
    signal: int = 0
    end: str | None = None
    nodes: str | None = None
    began: bool = True
    """Whether it ever ran."""


def list_jobs(users: Iterable[str]) -> list[Job]:
    """All jobs of these users (names or numbers), array elements one by one. Raises Unreachable.

    A line that cannot be read is passed over only where it cannot be a job of this program's.
    """
    text = _call([*SQUEUE, f"--user={','.join(sorted(set(users)))}"])
    lines = [line for line in (text or "").split("\n") if line and not line.startswith("CLUSTER:")]
    read = [line for line in lines if _BEGIN.match(line) or COMMENT in line]
    if lines and not read:
        raise Unreachable(f"squeue: a line that cannot be read: {clip(lines[0])!r}")
    return [job for line in read for job in parse_job(line)]


def parse_job(line: str) -> list[Job]:
    """The jobs in a line of SQUEUE: several where an array that was cancelled before it began stands in one line."""
    fields = line.split("|", 7)
    if len(fields) != 8:
        raise Unreachable(f"squeue: a line that cannot be read: {clip(line)!r}")
    ids, state, *rest = (field.strip() for field in fields)
    reason, start, end, nodes, user, comment = (_known(field) for field in rest)
    return [
        Job(id=id, state=_state(state), reason=reason, start=start, end=end, nodes=nodes, user=user, comment=comment)
        for id in expand_ids(ids)
    ]


def list_ended(job_ids: Iterable[str]) -> dict[str, Ended] | None:
    """The accounting's word on these jobs, by id; None where the cluster keeps none.

    A job that is not in the result is not known to it: an element that was cancelled while it waited, for one, leaves
    no trace. The state may be one of a job that has not ended where the accounting lags behind. Raises Unreachable.
    Whole arrays are asked for, since sacct finds an element that never began by its array's id only.
    """
    wanted = set(job_ids)
    found: dict[str, Ended] = {}
    for batch in _batches(sorted({id.partition("_")[0] for id in wanted}, key=int)):
        text = _call([*SACCT, f"--jobs={','.join(batch)}"], none_if=_NO_ACCOUNTING)
        if text is None:
            return None
        for ended in parse_ended(text):
            if ended.id in wanted and not (ended.id in found and ended.state == "PENDING"):
                found[ended.id] = ended  # a started element may for a while be among those that wait, too
    return found


def parse_ended(text: str) -> Iterator[Ended]:
    """The jobs in SACCT's answer; one that was requeued comes once for each start, the last of which counts."""
    job: dict[str, str] = {}
    steps: list[str] = []
    for line in [*text.splitlines(), ""]:
        row = dict(zip(SACCT_FIELDS, line.split("|"), strict=False))
        is_step = "." in row["JobID"]
        if is_step and job:
            steps.append(_state(row["State"]))
            continue
        if job:
            yield from _ended(job, steps)
        job, steps = ({}, []) if is_step or len(row) < len(SACCT_FIELDS) else (row, [])


def _ended(job: dict[str, str], steps: list[str]) -> Iterator[Ended]:
    state = _state(job["State"])
    if state in ENDED and "OUT_OF_MEMORY" in steps:  # srun's step was killed, and its batch script merely failed
        state = "OUT_OF_MEMORY"
    code, _, signal = job["ExitCode"].partition(":")
    for id in expand_ids(job["JobID"]):
        yield Ended(
            id=id,
            state=state,
            exit_code=int(code or 0),
            signal=int(signal or 0),
            end=_known(job["End"]),
            nodes=_known(job["NodeList"]),
            began=_known(job["Start"]) is not None,
        )


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel these jobs; no error where one has ended meanwhile. Raises Unreachable."""
    for batch in _batches(condense_ids(job_ids)):
        _call(["scancel", *batch], none_if=_NO_SUCH_JOB)


def config() -> dict[str, str]:
    """The cluster's own configuration, as `scontrol show config` prints it: ClusterName, MaxArraySize, …"""
    lines = (line.partition("=") for line in (_call(["scontrol", "show", "config"]) or "").splitlines())
    return {key.strip(): value.strip() for key, mark, value in lines if mark}


def job_details(job_id: str) -> dict[str, str]:
    """What SLURM knows of a job: JobState, Reason, EndTime, PreemptTime, … Raises Unreachable.

    An array's own number would name all of its elements at once.
    """
    text = _call(["scontrol", "--oneliner", "show", "job", job_id]) or ""
    if len(text.strip().splitlines()) != 1:
        raise Unreachable(f"scontrol show job {job_id}: does not tell of one job")
    return {key: value for key, mark, value in (part.partition("=") for part in text.split()) if mark}


def try_script(text: str) -> str:
    """What sbatch says to a script that it is not to submit: where and when it would start.

    InputError with its words if it would refuse it. Raises Unreachable.
    """
    return _said(_sbatch(["--test-only"], text))


def submit(script: Path) -> str:
    """The id of the job, or the array, that sbatch has made of a script.

    InputError with its words where it refuses. Raises Unreachable where it may have taken it all the same.
    """
    done = _sbatch([str(script)], timeout=SUBMIT_SECONDS)
    found = re.search(r"job (\d+)", done.stdout)
    if found is None:
        raise Unreachable(f"sbatch: an answer that cannot be read: {clip(done.stdout)!r}")
    return found[1]


def requeue(job_id: str) -> None:
    """Have a job start anew once it has ended. Raises Unreachable."""
    _call(["scontrol", "requeue", job_id])


def _sbatch(
    arguments: list[str], text: str | None = None, timeout: float = TIMEOUT_SECONDS
) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            ["sbatch", *arguments], input=text or "", capture_output=True, text=True, errors="replace",
            timeout=timeout, env=_environment(), check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise Unreachable("sbatch: no such command here; SLURM's commands are on a login node") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unreachable(f"sbatch: cannot be asked: {error}") from None
    if done.returncode:
        raise InputError(_said(done).replace("error: ", ""), "sbatch")
    return done


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join(line.removeprefix("sbatch: ") for line in done.stderr.splitlines())


def node_address(name: str) -> str:
    """Where a node is to be reached, which need not be its name. Raises Unreachable."""
    text = _call(["scontrol", "--oneliner", "show", "node", name]) or ""
    found = re.search(r"\bNodeAddr=(\S+)", text)
    return found[1] if found else name


def max_array_size() -> int:
    """The array index that no element may reach. Raises Unreachable."""
    found = config().get("MaxArraySize", "")
    if not found.isdigit():
        raise Unreachable("scontrol show config: tells no MaxArraySize")
    return int(found)


def expand_ids(text: str) -> list[str]:
    """`12_[0-2,7:9%4]` -> `12_0`, `12_1`, … as squeue and sacct write what waits of an array; else the id itself."""
    array = _ARRAY.fullmatch(text)
    if array is None:
        if not _ID.fullmatch(text):
            raise Unreachable(f"a job id that cannot be read: {clip(text)!r}")
        return [text]
    found: list[int] = []
    for part in array[2].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return [f"{array[1]}_{index}" for index in found]


def condense_ids(ids: Iterable[str]) -> list[str]:
    """The inverse of `expand_ids`: one entry, `12_[0-2,7]`, for what is asked of an array."""
    arrays: dict[str, set[int]] = {}
    plain = set()
    for id in ids:
        array, mark, index = id.partition("_")
        if mark:
            arrays.setdefault(array, set()).add(int(index))
        else:
            plain.add(array)
    listed = [f"{array}_[{','.join(_ranges(sorted(found)))}]" for array, found in arrays.items()]
    return sorted(plain, key=int) + listed


def _ranges(numbers: list[int]) -> Iterator[str]:
    """[0, 1, 2, 7] -> `0-2`, `7`."""
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}"


def _call(command: list[str], none_if: re.Pattern[str] | None = None) -> str | None:
    """What the command prints; None if it fails with a message that `none_if` finds. Raises Unreachable."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS, env=_environment(),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise Unreachable(f"{command[0]}: no such command here; SLURM's commands are on a login node") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]}: no answer from SLURM in {TIMEOUT_SECONDS:g} s") from None
    except OSError as error:
        raise Unreachable(f"{command[0]}: cannot be called: {error.strerror}") from None
    message = " ".join(done.stderr.replace(f"{command[0]}: error: ", "").split())
    if done.returncode == 0:
        return done.stdout
    if none_if and none_if.search(message):
        return None
    raise Unreachable(f"{command[0]}: {message or f'ended with exit code {done.returncode}'}")


def _environment() -> dict[str, str]:
    taken = re.compile(r"(SQUEUE|SACCT|SCANCEL|SCONTROL)_|SLURM_TIME_FORMAT$")
    kept = {key: value for key, value in os.environ.items() if not taken.match(key)}
    return kept | {"SLURM_BITSTR_LEN": "0", "LC_ALL": "C"}  # 0: lists of array elements are never cut short


def _batches(items: Sequence[str]) -> Iterator[Sequence[str]]:
    return (items[at : at + BATCH] for at in range(0, len(items), BATCH))


def _state(text: str) -> str:
    """`CANCELLED by 1000` -> `CANCELLED`; a `+` marks what was cut short."""
    return text.split()[0].rstrip("+").upper() if text.strip() else "UNKNOWN"


def _known(text: str) -> str | None:
    return None if text.strip() in ("", "(null)", "None", "NONE", "N/A", "Unknown", "None assigned") else text.strip()
