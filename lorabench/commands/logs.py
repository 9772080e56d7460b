"""Print the log of a run, or of its job on a cluster.

RUN is the run's id, or enough of its beginning. The job's own log (--job) holds what came before the run and around
it: the set-up lines, what SLURM had to say, the warm-up. With --follow, stderr says what the run
is doing and how far it is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.commands._arguments import RESULTS, argument, number, open_store
from lorabench.terminal.text import talk, tell

if TYPE_CHECKING:
    from lorabench.cluster.run_states import Standing
    from lorabench.store.store import Store

ARGUMENTS = [
    argument("run", "a run's id, or enough of its beginning", metavar="RUN"),
    RESULTS,
    argument("--follow", "go on printing what is added, until the run is settled", action="store_true"),
    argument("--lines", "only the last so many lines", type=number(int, 1), metavar="N"),
    argument("--job", "the log of the run's job instead of its own", action="store_true"),
]
FOLLOWED_LINES = 20
SAY_SECONDS = 20.0
"""After so many it is said again where a run is that does the same still."""
WHOLE = 10**9


def main(arguments: argparse.Namespace) -> int:
    from lorabench.cluster.run_states import UNSETTLED
    from lorabench.status.logs import find_run, follow, last_lines

    store = open_store(arguments.results)
    run_id = find_run(store, arguments.run)

    def files() -> list[Path]:
        return [file for file in _files(store, run_id, arguments.job) if file.is_file()]

    say = _Whereabouts()

    def has_ended() -> bool:
        standing = _stand(store, run_id)
        say.of(standing)
        return standing.status not in UNSETTLED

    if arguments.follow:
        for text in follow(files, has_ended, arguments.lines or FOLLOWED_LINES):
            tell(_lines(text), end="")
        return 0
    found = files()
    for file in found:
        if len(found) > 1:
            tell(f"==> {file} <==")
        tell(_lines("\n".join(last_lines(file, arguments.lines or WHOLE))))
    if not found:
        talk(f"{run_id}: {_without_log(_stand(store, run_id), arguments.job)}")
    return 0 if found else 1


class _Whereabouts:
    """Says where a run is as soon as it does something else, and now and then in between."""

    def __init__(self) -> None:
        self._doing, self._said = "", 0.0

    def of(self, standing: Standing) -> None:
        from lorabench.status.pace import where_it_is
        from lorabench.terminal.text import doing

        line, now = where_it_is(standing), time.monotonic()
        phase = doing(standing.state.claim.progress) if line and standing.state.claim else ""
        if line and (phase != self._doing or now > self._said + SAY_SECONDS):
            talk(line)
            self._doing, self._said = phase, now


def _files(store: Store, run_id: str, of_job: bool) -> list[Path]:
    from lorabench.status.logs import jobs_of, run_log

    if not of_job:
        return [run_log(store, run_id)]
    return [file for submission, job_id in jobs_of(store, run_id)[:1] for file in submission.job_logs(job_id)]


def _stand(store: Store, run_id: str) -> Standing:
    from lorabench.cluster.run_states import standings

    return standings(store, [run_id], tell=talk)[0]


def _without_log(standing: Standing, of_job: bool) -> str:
    """Why there is none."""
    if of_job and standing.queue is None:
        return "was never submitted: it has no job"
    reason = standing.queue.reason if standing.queue else standing.state.error
    return f"no log yet: {standing.status}{f' ({reason})' if reason else ''}"


def _lines(text: str) -> str:
    """What a progress bar wrote over stands in lines of its own."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
