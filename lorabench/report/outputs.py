"""Everything that is drawn from a sweep: tables, figures and one self-contained page to read."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import seaborn as sns

from lorabench.config import json_file, plugins
from lorabench.config.decode import InputError
from lorabench.config.durable import write_bytes, write_json
from lorabench.report import drawing
from lorabench.report.aggregate import FAILED, plain
from lorabench.report.answers import Shown, read_answers
from lorabench.report.beside import beside, by_name
from lorabench.report.claims import claims_sheet
from lorabench.report.comparisons import Outcome, instabilities, outcome
from lorabench.report.footnotes import figure_notes, part_note
from lorabench.report.labels import (
    capitalized,
    distinct,
    key_label,
    losses_of,
    series_label,
    shown_factor,
    value_label,
    with_unit,
)
from lorabench.report.page import Attempts, Broken, Drawn, Part, drawn, fill
from lorabench.report.results import Results, selected
from lorabench.report.run_details import cost_against_quality, run_details
from lorabench.report.tables import build_tables, write_tables
from lorabench.report.typeset import Sheet
from lorabench.report.update_table import changes_sheet
from lorabench.spec.figure import SECTIONS, Figure
from lorabench.spec.generate import METRICS
from lorabench.store.record import Status
from lorabench.training.environment import source_digest

TEMPLATE = "report.html.j2"
MANIFEST = ".report.json"
"""What the files of a report were made of, and their names."""
HEADINGS = ("Question", "Source", "Found there", "Cost", "Expect")


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """What a page shows of the results; a `Broken` in the place of what raised."""

    summary: Sheet | Broken
    changes: Sheet | Broken | None
    tables: list[Sheet | Broken]
    figures: dict[str, list[Drawn | Broken]]
    """By section, in order."""
    empty: dict[str, str]
    """The figures that had nothing to draw, by name, and what they need."""
    errors: dict[str, str]
    """All that raised, by name."""
    outcome: list[str] = field(default_factory=list)
    """What came out, in sentences."""
    claims: Sheet | Broken | None = None
    comparisons: Sheet | Broken | None = None
    answers: list[Shown] = field(default_factory=list)
    kept: list[Part] = field(default_factory=list)
    """What merging, compressing and intervening have kept of the sweep's runs."""
    details: dict[str, Any] = field(default_factory=dict)
    """What `run_details` gives."""
    costs: dict[str, Any] = field(default_factory=dict)
    """What `cost_against_quality` gives."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a report was made of, and the names of its files."""

    inputs: str | None = None
    """None where a part of it raised: it is made again."""
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The files of a report, and what of it raised, by name."""

    files: list[Path]
    errors: dict[str, str] = field(default_factory=dict)


def write_report(results: Results, folder: Path, kept: Sequence[Part] = (), further: Sequence[Sheet] = ()) -> Report:
    """Write `tables/`, `figures/`, `sweep.toml` and `report.html` below `folder`; `kept` has sections of its own, and
    `further` tables stand behind the sweep's.

    The same results give the same bytes, since nothing tells when or where the report was made; where the files are
    there already, made of the same results by the same code, they stay. Files of an earlier report that this one no
    longer has are deleted. Where a table or a figure raises, the rest is made, and the page shows the error there.
    """
    with losses_of(results.sweep.runs):
        return _write_report(results, folder, kept, further)


def _write_report(results: Results, folder: Path, kept: Sequence[Part], further: Sequence[Sheet]) -> Report:
    attempt = Attempts()
    answers = attempt("answers", lambda: read_answers(results))
    details = attempt("run details", lambda: run_details(results))
    rows = [[sheet.name, sheet.rows, sheet.notes] for sheet in further]
    inputs = attempt("digest", lambda: _digest(results, [answers, details, *kept, rows]))
    before = _read_manifest(folder)
    there = [file for name in before.files if (file := _own_file(folder, name))]
    if before.inputs == inputs and len(there) == len(before.files):
        return Report(files=there, errors=_named(results.broken))
    more = {"answers": answers, "details": details, "kept": list(kept), "further": list(further)}
    more = {name: value for name, value in more.items() if not isinstance(value, Broken)}
    made = attempt("report", lambda: _write(results, more, folder, attempt))
    files = [_write_page(results, folder, attempt)] if isinstance(made, Broken) else made
    errors = _named(results.broken) | attempt.errors
    for stale in set(there) - set(files):
        stale.unlink()
    names = [str(file.relative_to(folder)) for file in files]
    write_json(folder / MANIFEST, {"inputs": None if errors else inputs, "files": names})
    return Report(files=files, errors=errors)


def _named(broken: dict[str, str]) -> dict[str, str]:
    return {f"analysis {name}": error for name, error in broken.items()}


def _write(results: Results, more: dict[str, Any], folder: Path, attempt: Attempts) -> list[Path]:
    """`more`: fields of `Content` that are made already."""
    summary, *tables = build_tables(results, attempt)
    taken = [sheet.name for sheet in tables]
    tables += [replace(sheet, name=distinct(sheet.name, taken)) for sheet in more.pop("further", [])]
    name = distinct("changes", [sheet.name for sheet in tables])
    changes = attempt("table changes", lambda: changes_sheet(results, selected(results), name))
    claims = attempt("table claims", lambda: claims_sheet(results))
    told = attempt("table comparisons", lambda: outcome(results))
    compared = told.sheet if isinstance(told, Outcome) else told
    sheets = [sheet for sheet in (claims, summary, compared, changes, *tables) if isinstance(sheet, Sheet)]
    files = write_tables(results, sheets, folder / "tables", attempt)
    shown: dict[str, list[Drawn | Broken]] = {section: [] for section in SECTIONS}
    empty = {}
    for name, figure in named_figures(results).items():
        made = attempt(f"figure {name}", partial(draw_figure, results, name, figure, folder / "figures"))
        if made is None:
            if figure in results.sweep.figures or not results.sweep.figures:
                empty[name] = " ".join([f"{name} needs {figure.needs}.", *part_note(figure.where)])
        else:
            shown[figure.section].append(made)
            files += made.files if isinstance(made, Drawn) else []
    drawing.plt.close("all")  # those that raised before they were saved
    write_bytes(folder / "sweep.toml", results.sweep.text.encode())
    costs = attempt("cost against quality", lambda: cost_against_quality(results))
    errors = _named(results.broken) | attempt.errors
    sentences = [*(told.sentences if isinstance(told, Outcome) else []), *instabilities(results)]
    page = Content(
        summary=summary, changes=changes, tables=tables, figures=shown, empty=empty, errors=errors,
        outcome=sentences, claims=claims, comparisons=compared,
        costs={} if isinstance(costs, Broken) else costs, **more,
    )  # fmt: skip
    return [*files, folder / "sweep.toml", _write_page(results, folder, attempt, page)]


def _write_page(results: Results, folder: Path, attempt: Attempts, page: Content | None = None) -> Path:
    text = attempt("page", lambda: render(results, page)) if page else None
    text = text if isinstance(text, str) else _errors_alone(results, attempt)
    write_bytes(folder / "report.html", text.encode())
    return folder / "report.html"


def draw_figure(results: Results, name: str, figure: Figure, folder: Path | None = None) -> Drawn | None:
    """The figure for a page, saved in `folder` where one is given; None where there is nothing to draw."""
    results = results.of(figure.where)
    canvas = figure.draw(results)
    if canvas is None:
        return None
    files = drawing.save(canvas, folder / name) if folder else []
    return drawn(name, f"{figure.caption()} {figure_notes(results, figure)}".strip(), canvas, files)


def _errors_alone(results: Results, attempt: Attempts) -> str:
    """The page where there is nothing else to show."""
    errors = {**_named(results.broken), **attempt.errors}
    lines = [f"<p>{escape(name)}: <code>{escape(error)}</code></p>" for name, error in errors.items()]
    return "\n".join(["<!doctype html>", f"<h1>{escape(results.sweep.name)}</h1>", *lines, ""])


def _digest(results: Results, more: list[Any]) -> str:
    """Of all that a report is made of: results, this package's code, and the libraries that draw."""
    digest = hashlib.sha256(
        f"{matplotlib.__version__} {sns.__version__} {pd.__version__} {source_digest()} {results.sweep.text}".encode()
    )
    digest.update(results.runs.to_csv().encode())
    kept = [results.paths, results.interventions]
    digest.update(
        json.dumps(
            [results.environments, results.provenance, results.unread, results.broken, kept, more],
            sort_keys=True,
            default=str,
        ).encode()
    )
    for name, frame in sorted({**results.analyses, "steps": results.steps}.items()):
        digest.update(f"{name} {list(frame.columns)}".encode())
        digest.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())
    return digest.hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    try:
        return json_file.read(Manifest, folder / MANIFEST) or Manifest()
    except InputError:  # cut short, or not what was written: the report is made again
        return Manifest()


def _own_file(folder: Path, name: str) -> Path | None:
    """The file of that name, if it is one of the folder's own: no link, and not elsewhere."""
    try:
        file = json_file.below(folder, name)
    except InputError:
        return None
    return file if file.is_file() else None


def render(results: Results, page: Content) -> str:
    """The page's HTML."""
    counts = Counter(results.runs["status"])
    sheets = [page.summary, page.comparisons, page.claims, page.changes, *page.tables]
    return fill(
        TEMPLATE,
        sweep=results.sweep,
        header=read_header(results.sweep.text),
        counts=[(status, counts[status]) for status in Status if counts[status]],
        num_runs=len(results.runs),
        failures=_failures(results),
        unread=_unread(results),
        page=page,
        beside=by_name(beside(results.sweep.paper, page.claims if isinstance(page.claims, Sheet) else None)),
        sections=[(SECTIONS[section], drawn) for section, drawn in page.figures.items() if drawn],
        runs=_run_rows(results),
        notes=notes_once([sheet for sheet in sheets if isinstance(sheet, Sheet)]),
        provenance=_provenance(results.environments),
        made=_provenance(results.provenance),
        has_dirty=any(item.get("git", {}).get("dirty") for item in results.environments.values()),
        failed=[str(status) for status in FAILED],
        is_bad=lambda text: any(re.search(rf"\b{status}\b", str(text)) for status in FAILED),
    )


def notes_once(sheets: Sequence[Sheet]) -> dict[str, tuple[list[str], list[str]]]:
    """By a table's name: the notes that stand under it, and the captions of the tables under which its others stand."""
    told: dict[str, str] = {}
    found = {}
    for sheet in sheets:
        own = [note for note in sheet.notes if note not in told]
        found[sheet.name] = own, list(dict.fromkeys(told[note] for note in sheet.notes if note in told))
        told |= dict.fromkeys(own, sheet.caption)
    return found


def read_header(text: str) -> dict[str, str]:
    """Each of HEADINGS with its words, from the comment that opens a sweep file; other words as `About`."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    parts = re.split(rf"\b({'|'.join(HEADINGS)}):", " ".join(lines))
    found = {"About": parts[0].strip()} | {
        name: " ".join(words.split()) for name, words in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {name: words for name, words in found.items() if words}


def named_figures(results: Results) -> dict[str, Figure]:
    """File name -> figure: the sweep's own and those that always stand there, or every figure as it comes."""
    every: list[Any] = [plugins.example("figures", name) for name in plugins.names("figures")]
    asked = {figure.name for figure in results.sweep.figures}
    also = [figure for figure in every if figure.name not in asked and (figure.always or not asked)]
    named: dict[str, Figure] = {}
    for figure in (*results.sweep.figures, *also):
        named[distinct(figure.name, named)] = figure
    return named


def _failures(results: Results) -> list[dict[str, Any]]:
    """What did not end well, one entry a status and message, with the settings that it struck."""
    runs = results.runs[results.runs["status"].isin(FAILED)]
    groups: dict[tuple[str, str], list[str]] = {}
    keys = list(dict.fromkeys(["method.name", *results.keys]))
    for _, run in runs.iterrows():
        what = series_label(keys, [run[key] for key in keys], full=True)
        groups.setdefault((run["status"], run["error"] or "no message"), []).append(what)
    return [{"status": status, "error": error, "runs": where} for (status, error), where in groups.items()]


def _unread(results: Results) -> dict[str, list[str]]:
    """Why ΔW of some runs could not be read, and which those are."""
    found: dict[str, list[str]] = {}
    for run_id, reason in results.unread.items():
        found.setdefault(reason, []).append(run_id)
    return found


def _run_rows(results: Results) -> dict[str, Any]:
    """The table of single runs: swept keys, status, a few measures, error."""
    stem = results.quality
    names = [f"{split}_{what}" for split in ("valid", "test") for what in dict.fromkeys([stem, *METRICS])]
    names += ["forgetting", "peak_gib", "tokens_per_second", "images_per_second", "total_seconds"]
    names = [name for name in names if name in results.runs]
    keys = list(dict.fromkeys(["method.name", *results.keys]))
    chosen = set(selected(results).run_ids)
    factors = {name: shown_factor(name) for name in names}
    tables = [[value_label(value) for value in results.runs[key]] for key in keys]
    tables += [list(results.runs["status"]), ["✓" if run_id in chosen else "" for run_id in results.runs.index]]
    tables += [[_measured(factors[name] * value) for value in results.runs[name]] for name in names]
    about = {run_id: notes.get("unstable") for run_id, notes in results.provenance.items()}
    unstable = [f"unstable: {about[run_id]}" if about.get(run_id) else "" for run_id in results.runs.index]
    tables.append([error or note for error, note in zip(results.runs["error"], unstable, strict=True)])
    numeric = [capitalized(with_unit(name)) for name in names]
    heads = ["Run", *(capitalized(key_label(key)) for key in keys), "Status", "Used", *numeric, "Error"]
    rows = [[str(run_id), *texts] for run_id, *texts in zip(results.runs.index, *tables, strict=True)]
    return {"heads": heads, "numeric": numeric, "rows": rows}


def _measured(value: float) -> str:
    return "–" if value != value else plain(value)


def _provenance(tables: dict[str, dict[str, Any]]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Each entry of the runs' environments with its distinct values and how many runs have them."""
    found: dict[str, Counter[str]] = {}
    for table in tables.values():
        for key, value in table.items():
            if value not in (None, {}, ""):
                found.setdefault(key, Counter())[_plain(value)] += 1
    return [(key.replace("_", " "), counts.most_common()) for key, counts in found.items()]


def _plain(value: Any) -> str:
    """`{"torch": "2.13", "git": None}` -> `torch 2.13`."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(item)}" for key, item in value.items() if item is not None)
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
