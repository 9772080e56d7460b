"""Jobs on this machine: starts submitit's controllers in a session of its own, so that jobs outlive the command.

A process of this module reads the submission's plan, starts its jobs, notes their process ids and ends; closing the
terminal or a pipe behind the command then means nothing to them.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from lorabench.cluster.enqueue import write_jobs
from lorabench.cluster.job import command
from lorabench.cluster.profile import Profile
from lorabench.cluster.queue import Array, Submission, read_submission
from lorabench.config.decode import InputError, decode


def start(submission: Submission) -> None:
    """Start the jobs of a submission. InputError with the last words of what went wrong."""
    log = submission.folder / "start.txt"
    with open(log, "wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "lorabench.cluster.background", str(submission.folder.absolute())],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, check=False,
        )  # fmt: skip
    if done.returncode:
        lines = log.read_text("utf-8", "replace").strip().splitlines()
        raise InputError(f"{submission.folder}: jobs could not be started: {lines[-1] if lines else 'for no reason'}")


def _python(profile: Profile) -> str:
    """Python, behind the set-up lines. submitit's own `setup` needs a shell that stays, as not every /bin/sh does."""
    if not profile.shell:
        return profile.command
    lines = "\n".join([*profile.shell, 'exec "$0" "$@"'])
    return f"bash -c {shlex.quote(lines)} {profile.command}"


def _main(folder: Path) -> None:
    os.environ.pop("SUBMITIT_PREEMPT_SIGNAL", None)
    from submitit.local.local import start_controller

    submission = read_submission(folder)
    assert submission is not None
    profile: Profile = decode(Profile, submission.profile)
    taken: list[Array] = []
    for number in range(len(submission.jobs)):
        controller = start_controller(
            folder=submission.submitit,
            command=command(_python(profile), folder, number),
            tasks_per_node=profile.ranks,
            cuda_devices=",".join(map(str, range(profile.gpus))),
            timeout_min=profile.minutes,
            signal_delay_s=profile.signal_seconds,
        )
        taken.append(Array(first=number, count=1, job_id=str(controller.pid)))
        write_jobs(submission, taken)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
