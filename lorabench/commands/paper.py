"""Write one page of published figures made again: what each sweep shows beside what its paper reports, and verdicts.

Sweeps are files, or names in RESULTS; without any, all in RESULTS that have a [paper] section, with the `reports` of it
that their claims put to the test. What the runs have learned is analyzed first, where that is not up to date, and what
claims ask of scaled intruders is evaluated, as by `lorabench intervene`; each sweep's own report is written too. Prints
the page's path; `make paper` runs the small sweeps of sweeps/paper before.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.commands._arguments import (
    PROCESSES,
    argument,
    as_json,
    hush_libraries,
    open_store,
    page_file,
    write_page,
)
from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show_path
from lorabench.terminal.text import talk, tell

if TYPE_CHECKING:
    from lorabench.report.freshness import SweepFile
    from lorabench.report.papers import Repeated
    from lorabench.report.results import Results
    from lorabench.store.store import Store

PAGE = "papers.html"
ARGUMENTS = [
    argument("results", "where the runs are kept", metavar="RESULTS", type=Path),
    argument("sweeps", "a sweep file, or the name of a sweep in the results", metavar="SWEEP", nargs="*"),
    argument("--html", f"the page (default: RESULTS/{PAGE})", type=page_file, metavar="FILE.html"),
    PROCESSES,
    argument("--check", "exit code 1 where a claim does not hold", action="store_true"),
    argument("--json", "print the verdicts as JSON", action="store_true"),
]


def main(arguments: argparse.Namespace) -> int:
    store = open_store(arguments.results)
    hush_libraries()
    found, code = [], 0
    for sweep in _sweeps(store, arguments.sweeps):
        made, is_whole = _made(store, sweep, arguments.workers)
        found.append(made)
        code = max(code, int(not is_whole or bool(made.errors)))
    from lorabench.report.papers import papers_page

    file = arguments.html or arguments.results / PAGE
    write_page(file, papers_page(found))
    tell(as_json([each.to_json() for each in found]) if arguments.json else file)
    fails = [row[0] for each in found for row in each.failing]
    for claim in fails if arguments.check else ():
        talk(f"does not hold: {claim}")
    return max(code, 1 if arguments.check and fails else 0)


def _sweeps(store: Store, names: list[str]) -> list[SweepFile]:
    """Those that are named, else all that repeat a part of a paper. InputError where one does not, or none is there."""
    from lorabench.report.freshness import find_sweeps

    if not names:  # that of a thousand runs takes a second to read
        there = [sweep for sweep in find_sweeps(store, None) if b"[paper]" in sweep.file.read_bytes()]
        found = [sweep for sweep in there if sweep.read().paper]
        if not found:
            raise InputError(f"RESULTS = {show_path(store.root)}: holds no sweep with a [paper] section")
        return found
    found = [sweep for name in names for sweep in find_sweeps(store, name)]
    lacking = [name for name, sweep in zip(names, found, strict=True) if sweep.read().paper is None]
    if lacking:
        raise InputError([f"SWEEP = {clip(name)}: has no [paper] section, what the paper reports" for name in lacking])
    return found


def _made(store: Store, sweep: SweepFile, workers: int | None) -> tuple[Repeated, bool]:
    """What the page shows of it, and whether nothing had to be left out."""
    from lorabench.api.analyze import analyze_sweep
    from lorabench.report.papers import repeated

    made = analyze_sweep(store, sweep, workers=workers)
    refused = _intervene(store, made.analyzed)
    if refused is not None:
        made = analyze_sweep(store, sweep, workers=workers)
    for name, text in made.errors.items():
        talk(f"error: {name}: {text}")
    assert made.sweep.paper is not None
    page = repeated(made.analyzed, made.sweep.paper)
    for name, text in page.errors.items() if made.whole else ():
        talk(f"error: {name}: {text}")
    for text in refused or ():
        talk(f"error: {text}")
    return page, made.whole and not refused


def _intervene(store: Store, results: Results) -> list[str] | None:
    """Scale the intruder dimensions of finished runs where claims ask for it: why it cannot be done, by run; None where
    nothing is asked."""
    from lorabench.report.claims import not_intervened

    if not (lacking := not_intervened(results)):
        return None
    from lorabench.adapters.intervention.intervene import EPSILON, TOP, Intervention, intervene, read_run

    asked: dict[tuple[str, float, int], set[float]] = {}
    for run_id, at in lacking:
        asked.setdefault((run_id, at.get("epsilon", EPSILON), at.get("k", TOP)), set()).add(at["lambda"])
    refused = []
    for (run_id, epsilon, top), scales in asked.items():
        try:
            wanted = Intervention(lambdas=tuple(sorted(scales)), epsilon=epsilon, top=top)
            intervene(store, read_run(store, run_id), wanted, "auto", talk)
        except InputError as error:
            refused += error.problems
    return refused
