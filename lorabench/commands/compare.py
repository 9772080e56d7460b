"""Show how far adapters changed the same directions, layer by layer, beside chance.

Adapters are runs (their ids, or what these begin with), files, folders or Hub ids, of any known formats; a sweep (its
file, or its name in RESULTS) stands for all its runs that are done. Scales play no part in any of the numbers.

Of two, for every layer that both have, on its input and its output side: subspace similarity φ(i, j), principal angles,
Grassmann distance, how much of each ΔW lies in the other's subspace, and a permutation test of whether the two share
directions (or have the same large coordinates), corrected over the layers.

Of three or more: how much of all of them the best k directions hold; how much of one that is left out lies in k
directions of the others, beside the others' mean adapter alone; and how alike their factors A and B are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from lorabench.commands._arguments import ALPHA, BASE, HTML, JSON, RESULTS, argument, as_json, open_adapter, write_page
from lorabench.config.decode import InputError
from lorabench.config.quote import show_path
from lorabench.terminal.text import tell

ARGUMENTS = [
    argument("adapters", "a run's id or its beginning, a file, a folder or a Hub id; two or more, or a sweep",
             nargs="+", metavar="ADAPTER"),
    BASE,
    ALPHA,
    RESULTS,
    HTML,
    JSON,
]  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    sources = [source for given in arguments.adapters for source in _meant(given, arguments.results)]
    if len(sources) < 2:
        raise InputError(f"ADAPTER = {show_path(arguments.adapters[0])}: needs another to be compared with")
    found, page, text = (_pair if len(sources) == 2 else _many)(sources, arguments)
    if arguments.html:
        write_page(arguments.html, page)
    tell(as_json(found) if arguments.json else text)
    return 0


def _meant(given: str, results: Path) -> Iterator[str]:
    """The runs of a sweep that are done and have kept what they learned; anything else is itself."""
    file = results / given / "sweep.toml" if os.path.isfile(results / given / "sweep.toml") else Path(given)
    if file.suffix != ".toml" or not file.is_file():
        yield given
        return
    from lorabench.analysis.jobs import files_of
    from lorabench.spec.sweep import read_sweep
    from lorabench.store.record import Status
    from lorabench.store.store import Store

    states = Store(results).states(list(read_sweep(file, stored=True).runs))
    done = [state.run_id for state in states
            if state.status == Status.DONE and state.record is not None and files_of(state.record)]  # fmt: skip
    if not done:
        raise InputError(f"ADAPTER = {show_path(given)}: no run of it is done and has kept updates in {results}")
    yield from done


def _pair(sources: list[str], arguments: argparse.Namespace) -> tuple[object, str, str]:
    from lorabench.adapters.examine.comparison import compare_adapters
    from lorabench.adapters.examine.comparison_page import comparison_page
    from lorabench.adapters.examine.comparison_text import comparison_text
    from lorabench.adapters.examine.fused_layers import in_parts
    from lorabench.terminal.text import tracked

    a, b = (open_adapter(source, arguments) for source in sources)
    a, b = in_parts(a, b, arguments.base)
    found = compare_adapters(a, b, lambda pairs, total: tracked(pairs, total, "comparing"))
    return found, comparison_page(found) if arguments.html else "", comparison_text(found, bold=sys.stdout.isatty())


def _many(sources: list[str], arguments: argparse.Namespace) -> tuple[object, str, str]:
    from lorabench.adapters.examine.ensemble import compare_many
    from lorabench.adapters.examine.ensemble_page import ensemble_page
    from lorabench.adapters.examine.ensemble_text import ensemble_text
    from lorabench.terminal.text import tracked

    adapters = [open_adapter(source, arguments) for source in sources]
    found = compare_many(adapters, lambda rows, total: tracked(rows, total, "comparing"))
    return found, ensemble_page(found) if arguments.html else "", ensemble_text(found, bold=sys.stdout.isatty())
