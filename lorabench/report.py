"""Everything that is drawn from a sweep: tables, figures and one self-contained page to read."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from lorabench import drawing, plugins
from lorabench.aggregate import FAILED, plain
from lorabench.changes import changes_sheet
from lorabench.figure import SECTIONS, Figure
from lorabench.labels import capitalized, distinct, key_label, measure, series_label, value_label, with_unit
from lorabench.page import TEMPLATES, Drawn, fill, picture
from lorabench.record import Status, write_bytes, write_json
from lorabench.results import Results, selected
from lorabench.tables import build_tables, quality, write_tables
from lorabench.typeset import Sheet

TEMPLATE = "report.html.j2"
MANIFEST = ".report.json"
"""What the files of a report were made of, and their names."""
HEADINGS = ("Question", "Cost", "Expect")


@dataclass(frozen=True, kw_only=True, eq=False)
class Content:
    """What a page shows of the results."""

    summary: Sheet
    changes: Sheet | None
    tables: list[Sheet]
    figures: dict[str, list[Drawn]]
    """By section, in order."""
    empty: list[str]
    """Names of the figures that had nothing to draw."""


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write `tables/`, `figures/`, `sweep.toml` and `report.html` below `folder`; returns the files.

    The same results give the same bytes, since nothing tells when or where the report was made; where the files are
    there already, made of the same results by the same code, they stay. Files of an earlier report that this one no
    longer has are deleted.
    """
    inputs = _digest(results)
    before = _read_manifest(folder)
    if before["inputs"] == inputs and all((folder / name).is_file() for name in before["files"]):
        return [folder / name for name in before["files"]]
    files = _write(results, folder)
    names = [str(file.relative_to(folder)) for file in files]
    for stale in set(before["files"]) - set(names):
        (folder / stale).unlink(missing_ok=True)
    write_json(folder / MANIFEST, {"inputs": inputs, "files": names})
    return files


def _write(results: Results, folder: Path) -> list[Path]:
    summary, *tables = build_tables(results)
    changes = changes_sheet(results, selected(results), distinct("changes", [sheet.name for sheet in tables]))
    files = write_tables(results, [summary, *([changes] if changes else []), *tables], folder / "tables")
    shown: dict[str, list[Drawn]] = {section: [] for section in SECTIONS}
    empty = []
    for name, figure in _figures(results).items():
        canvas = figure.draw(results)
        if canvas is None:
            empty.append(name)
            continue
        inches = float(canvas.get_figwidth())
        pdf, png = drawing.save(canvas, folder / "figures" / name)
        shown[figure.section].append(picture(name, figure.caption(), png.read_bytes(), inches))
        files += [pdf, png]
    write_bytes(folder / "sweep.toml", results.sweep.text.encode())
    page = Content(summary=summary, changes=changes, tables=tables, figures=shown, empty=empty)
    write_bytes(folder / "report.html", render(results, page).encode())
    return [*files, folder / "sweep.toml", folder / "report.html"]


def _digest(results: Results) -> str:
    """Of all that a report is made of: results, this package's code, and the library that draws."""
    digest = hashlib.sha256(f"{matplotlib.__version__} {pd.__version__} {results.sweep.text}".encode())
    digest.update(results.runs.to_csv().encode())
    digest.update(
        json.dumps([results.environments, results.provenance, results.unread], sort_keys=True, default=str).encode()
    )
    for name, frame in sorted(results.analyses.items()):
        digest.update(f"{name} {list(frame.columns)}".encode())
        digest.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())
    for file in [*sorted(Path(__file__).parent.rglob("*.py")), *sorted(TEMPLATES.glob("*.j2"))]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        return json.loads(file.read_text("utf-8")) if file.is_file() else {"inputs": None, "files": []}
    except json.JSONDecodeError:  # cut short: the report is made again
        return {"inputs": None, "files": []}


def render(results: Results, page: Content) -> str:
    """The page's HTML."""
    counts = Counter(results.runs["status"])
    return fill(
        TEMPLATE,
        sweep=results.sweep,
        header=read_header(results.sweep.text),
        counts=[(status, counts[status]) for status in Status if counts[status]],
        num_runs=len(results.runs),
        failures=_failures(results),
        unread=_unread(results),
        page=page,
        sections=[(SECTIONS[section], drawn) for section, drawn in page.figures.items() if drawn],
        runs=_run_rows(results),
        provenance=_provenance(results.environments),
        made=_provenance(results.provenance),
        has_dirty=any(item.get("git", {}).get("dirty") for item in results.environments.values()),
        failed=[str(status) for status in FAILED],
        is_bad=lambda text: any(re.search(rf"\b{status}\b", str(text)) for status in FAILED),
    )


def read_header(text: str) -> dict[str, str]:
    """Question, cost and expected result from the comment that opens a sweep file; other words as `About`."""
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


def _figures(results: Results) -> dict[str, Figure]:
    """File name -> figure: the sweep's own, or every figure as it comes."""
    figures: Iterable[Any] = results.sweep.figures or (
        plugins.example("figures", name) for name in plugins.names("figures")
    )
    named: dict[str, Figure] = {}
    for figure in figures:
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
    stem = quality(results)
    names = [f"valid_{stem}", f"test_{stem}", "forgetting", "peak_gib", "tokens_per_second", "total_seconds"]
    names = [name for name in names if name in results.runs]
    keys = list(dict.fromkeys(["method.name", *results.keys]))
    chosen = set(selected(results).run_ids)
    factors = {name: 100 if measure(name).unit == "%" else 1 for name in names}
    rows = []
    for run_id, run in results.runs.iterrows():
        numbers = [_measured(factors[name] * run[name]) for name in names]
        rows.append({
            "id": run_id, "status": run["status"], "selected": run_id in chosen, "error": run["error"] or "",
            "keys": [value_label(run[key]) for key in keys], "numbers": numbers,
        })  # fmt: skip
    heads = [capitalized(with_unit(name)) for name in names]
    return {"keys": [capitalized(key_label(key)) for key in keys], "heads": heads, "rows": rows}


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
