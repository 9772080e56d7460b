"""Looking at how runs stand again and again: all of it drawn anew in a terminal, only what changes anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from lorabench.cluster.run_states import UNSETTLED, Standing
from lorabench.store.record import Status
from lorabench.terminal.text import tell, visible

PAUSE_SECONDS = 2.0
"""It is over when nothing has waited or run in two looks: between two runs a worker has none for a moment."""

Show = Callable[[list[Standing]], None]


def watch(look: Callable[[], list[Standing]], seconds: float, show: Show) -> list[Standing]:
    """Look and show every so many seconds, until all is settled; how it stands then."""
    was_quiet = False
    while True:
        standings = look()
        show(standings)
        is_quiet = not any(standing.status in UNSETTLED for standing in standings)
        if is_quiet and was_quiet:
            return standings
        was_quiet = is_quiet
        time.sleep(min(seconds, PAUSE_SECONDS) if is_quiet else seconds)


@contextlib.contextmanager
def redrawn(draw: Callable[[list[Standing]], str]) -> Iterator[Show]:
    """Shows the picture in place of the one before; the last one stays."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False, vertical_overflow="visible") as live:
        yield lambda standings: live.update(
            Text(visible(draw(standings)), no_wrap=True, overflow="ellipsis"), refresh=True
        )


def changes(line: Callable[[Standing, Status | None], str], begin: Callable[[list[Standing]], str | None]) -> Show:
    """Prints a line for each run that is new or has another status than it had; `line` makes it.

    The first time it prints what `begin` makes instead, if anything.
    """
    before: dict[str, Status] = {}

    def show(standings: list[Standing]) -> None:
        if not before and (text := begin(standings)):
            tell(text)
            before.update({standing.run_id: standing.status for standing in standings})
        for standing in standings:
            if before.get(standing.run_id) != standing.status:
                tell(line(standing, before.get(standing.run_id)))
                before[standing.run_id] = standing.status

    return show
