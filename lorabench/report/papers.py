"""A page of published figures made again: of each sweep its figures beside what the paper reports, and the verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lorabench.report.beside import Beside, beside
from lorabench.report.claims import FAILS, claims_sheet
from lorabench.report.outputs import draw_figure, named_figures, read_header
from lorabench.report.page import Attempts, Broken, Drawn, fill
from lorabench.report.results import Results
from lorabench.report.tables import build_tables
from lorabench.report.typeset import Sheet
from lorabench.spec.paper import Paper
from lorabench.store.record import Status

TEMPLATE = "papers.html.j2"
FOUND = "Found there"
"""Which the page tells in whole."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One table or figure of a paper, and what the sweep shows of it: tables, figures, and what of these raised."""

    beside: Beside
    figures: list[Drawn]
    tables: list[Sheet]
    broken: list[Broken]
    empty: list[str]
    """Those that have nothing to show, for want of runs."""


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """A sweep that repeats a part of a paper."""

    sweep: str
    paper: Paper
    header: dict[str, str]
    """Question, source, cost, expectation."""
    num_runs: int
    counts: dict[str, int]
    """Status -> runs."""
    shown: list[Shown]
    errors: dict[str, str]
    """What raised, by name."""

    @property
    def rows(self) -> list[list[str]]:
        """Of the page's first table."""
        return [
            [self.paper.title, each.beside.item.item, each.beside.shows, each.beside.counts or "–"]
            for each in self.shown
        ]

    @property
    def failing(self) -> list[list[str]]:
        """The rows of the claims that do not hold."""
        found = [zip(each.beside.claims, each.beside.verdicts, strict=True) for each in self.shown]
        return [row for rows in found for row, verdict in rows if verdict == FAILS]

    def to_json(self) -> dict[str, Any]:
        items = [
            {
                "item": each.beside.item.item, "shows": each.beside.shows,
                "claims": [dict(zip(each.beside.heads, row, strict=True)) for row in each.beside.claims],
            }
            for each in self.shown
        ]  # fmt: skip
        return {"sweep": self.sweep, "title": self.paper.title, "source": self.paper.source, "counts": self.counts,
                "reports": items, "errors": self.errors}  # fmt: skip


def repeated(results: Results, paper: Paper) -> Repeated:
    """Tables and figures that `paper` names, drawn for a page; what raises is told there, and the rest is made."""
    attempt = Attempts()
    claims = attempt("claims", lambda: claims_sheet(results))
    sheets = {sheet.name: sheet for sheet in build_tables(results, attempt)}
    figures = named_figures(results)
    wanted = dict.fromkeys(name for item in paper.reports for name in item.shown_by)
    made: dict[str, Any] = {name: sheets[name] for name in wanted if name in sheets}
    for name in wanted:
        if name in figures:
            made[name] = attempt(f"figure {name}", partial(draw_figure, results, name, figures[name]))
    counts = Counter(results.runs["status"])
    return Repeated(
        sweep=results.sweep.name,
        paper=paper,
        header={name: words for name, words in read_header(results.sweep.text).items() if name != FOUND},
        num_runs=len(results.runs),
        counts={str(status): counts[status] for status in (*Status, "missing") if counts[status]},
        shown=[
            _shown(each, results.sweep.name, made)
            for each in beside(paper, claims if isinstance(claims, Sheet) else None)
        ],
        errors={f"analysis {name}": error for name, error in results.broken.items()} | attempt.errors,
    )


def _shown(found: Beside, sweep: str, made: dict[str, Any]) -> Shown:
    own = {name: made.get(name) for name in found.item.shown_by}
    return Shown(
        beside=found,
        figures=[replace(each, name=f"{sweep}-{each.name}") for each in own.values() if isinstance(each, Drawn)],
        tables=[each for each in own.values() if isinstance(each, Sheet)],
        broken=[each for each in own.values() if isinstance(each, Broken)],
        empty=[name for name, each in own.items() if each is None],
    )


def papers_page(found: Sequence[Repeated]) -> str:
    """The HTML of all of them, in this order."""
    return fill(TEMPLATE, papers=found, heads=["Paper", "Reports", "Here", "Claims"])
