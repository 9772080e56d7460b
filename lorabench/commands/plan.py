"""Show the runs of a sweep, which are done, and what each will take.

For each run: trainable and total parameters (exact), estimated peak memory and time. `basis` says what an
estimate rests on: `measured` (this run is done), `similar runs` (a finished run of the same model on the same
kind of device corrects the formula) or `formula`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorabench.commands._arguments import (
    DEVICE,
    JSON,
    LIMIT,
    RESULTS,
    SET,
    SWEEP,
    argument,
    as_json,
    changes,
    import_for_plan,
)  # fmt: skip
from lorabench.terminal.text import tell

ARGUMENTS = [
    SWEEP,
    RESULTS,
    SET,
    LIMIT,
    argument("--show", "print the whole spec of a run, by its id or how that begins, instead", metavar="RUN"),
    DEVICE,
    JSON,
]


def main(arguments: argparse.Namespace) -> int:
    from lorabench.spec.source import as_sweep

    sweep = as_sweep(Path(arguments.sweep), changes(arguments.set))
    if arguments.show is not None:
        from lorabench.spec.resolved import find_run, resolved, resolved_text

        spec = find_run(sweep, arguments.show)
        tell(as_json(resolved(sweep, spec)) if arguments.json else resolved_text(sweep, spec))
        return 0
    import_for_plan()
    from lorabench.api.plan import plan

    made = plan(sweep, arguments.results, limit=arguments.limit, device=arguments.device)
    tell(as_json(made.to_json()) if arguments.json else repr(made))
    return 0
