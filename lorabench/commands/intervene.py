"""Scale the intruder dimensions of runs, and evaluate the task and what is retained again.

Runs are named by their ids, or by what these begin with; runs that differ in the seed alone are averaged. An
intruder is one of a matrix's top --top left singular vectors of W0 + ΔW whose |cos| with each of W0 is below
--epsilon. With its singular value σ, the model is evaluated as W0 + ΔW + (λ − 1) Σ u σ vᵀ over the intruders of
all matrices (Shuttleworth et al. 2024, arXiv 2410.21228): λ = 1 is the model as it is, λ = 0 is without them.
Rows, beside the untouched base and λ = 1 (tuned):

intruders    all of them are scaled
control      as many directions of the same matrices that are no intruders, those of the nearest singular values
random       Σ σ a bᵀ in random directions a, b instead: as large a change of the weights, of no direction

Merged and evaluated in float32, on the validation split of the run's (last) task and on its task.retain, with
changes relative to λ = 1. With five settings or more, Spearman's ρ of the number of intruders with forgetting.

With --update it is ΔW as a whole: W0 + λ ΔW from the untouched base, λ = 0, through the run's own model, λ = 1, and
beyond (Wortsman et al. 2021, arXiv 2109.01903). RUN may then also be a sweep: all of its runs that are done. The
sweep's report has them as a table, and in the figure `plane`.

With --each it is the singular directions of ΔW itself, one after the other: the i-th one of every layer is scaled by
a single λ (default: 0, it is dropped), and so are random directions of the same singular values. Beside the change of
loss stands what the gradient foretells to first order, (λ − 1) Σ σ uᵀ (∂L/∂W) v (Tian et al. 2026, arXiv 2603.03995).

Results are kept in RESULTS/interventions/<id>/record.json after each evaluation (of --each in RESULTS/usefulness, of
--update in RESULTS/paths), and read from there the next time.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.commands._arguments import (
    DEVICE,
    HTML,
    JSON,
    RESULTS,
    argument,
    as_json,
    begin,
    number,
    numbers,
    write_page,
)
from lorabench.config.decode import InputError
from lorabench.terminal.text import talk, tell

if TYPE_CHECKING:
    from lorabench.store.store import Store

ARGUMENTS = [
    argument(
        "runs", "a run's id, or what it begins with; one or more (with --update also a sweep)", nargs="+", metavar="RUN"
    ),
    argument(
        "--lambdas",
        "factors of the singular values, with commas (default: 0,0.3,0.5,0.7,1,1.5; with --each: 0)",
        type=numbers(float),
        metavar="L",
    ),
    argument(
        "--epsilon",
        "largest |cos| of an intruder with W0's vectors (default: 0.5)",
        type=number(float, 0),
        default=0.5,
        metavar="E",
    ),
    argument(
        "--top",
        "singular vectors of each matrix that are looked at (default: 10)",
        type=number(int, 1),
        default=10,
        metavar="K",
    ),
    argument("--each", "scale each of the first --top singular directions of ΔW by itself", action="store_true"),
    argument("--update", "scale ΔW as a whole (λ by default: 0,0.25,0.5,0.75,1,1.25,1.5)", action="store_true"),
    argument("--figure", "also draw it: FILE.pdf or FILE.png, both are written", type=Path, metavar="FILE"),
    RESULTS,
    DEVICE,
    HTML,
    JSON,
]


def main(arguments: argparse.Namespace) -> int:
    store, device = begin(arguments)
    from lorabench.adapters.intervention import intervene, intervene_report

    if arguments.figure is not None:
        intervene_report.check_figure(arguments.figure)
    if arguments.update:
        return _along(arguments, store, device)
    if arguments.each:
        return _each(arguments, store, device)
    wanted = intervene.Intervention(
        lambdas=tuple(arguments.lambdas or intervene.LAMBDAS), epsilon=arguments.epsilon, top=arguments.top
    )
    runs = intervene.read_runs(store, arguments.runs)
    records = [intervene.intervene(store, run, wanted, device, talk) for run in runs]
    rows = intervene_report.make_rows(records, wanted)
    if arguments.html:
        from lorabench.report.page import parts_page

        part = intervene_report.intervention_part(records, rows)
        header = [("runs", ", ".join(run.record.run_id for run in runs)), ("evaluated", records[0]["evaluated"])]
        write_page(arguments.html, parts_page("Do intruders cause forgetting?", header, [part]))
    if arguments.json:
        correlation = intervene_report.correlation(records)
        tell(as_json({"interventions": records, "rows": [row.to_json() for row in rows], "spearman": correlation}))
    else:
        tell(intervene_report.intervention_text(records, rows))
    if arguments.figure is not None:
        files = intervene_report.draw(rows, arguments.figure)
        talk("wrote " + " and ".join(map(str, files)) if files else "nothing to draw: no run has an intruder")
    return 0


def _each(arguments: argparse.Namespace, store: Store, device: str) -> int:
    from lorabench.adapters.intervention import intervene, usefulness, usefulness_report

    scales = arguments.lambdas or [usefulness.SCALE]
    if len(scales) > 1:
        raise InputError(f"--lambdas {','.join(f'{scale:g}' for scale in scales)}: --each takes a single one")
    wanted = usefulness.Usefulness(top=arguments.top, scale=scales[0])
    runs = intervene.read_runs(store, arguments.runs)
    records = [usefulness.measure(store, run, wanted, device, talk) for run in runs]
    if arguments.html:
        from lorabench.report.page import parts_page

        header = [("runs", ", ".join(run.record.run_id for run in runs)), ("evaluated", records[0]["evaluated"])]
        parts = [usefulness_report.usefulness_part(record) for record in records]
        write_page(arguments.html, parts_page("Which directions of ΔW are useful?", header, parts))
    if arguments.json:
        rows = {record["key"]["run_id"]: [*map(asdict, usefulness_report.make_rows(record))] for record in records}
        tell(as_json({"usefulness": records, "rows": rows}))
    else:
        tell(usefulness_report.usefulness_text(records))
    if arguments.figure is not None:
        talk("wrote " + " and ".join(map(str, usefulness_report.draw(records, arguments.figure))))
    return 0


def _along(arguments: argparse.Namespace, store: Store, device: str) -> int:
    from lorabench.adapters.intervention import intervene, path, path_text

    given = [name for each in arguments.runs for name in path.runs_of(store, each, talk)]
    runs = intervene.read_runs(store, list(dict.fromkeys(given)))
    lambdas = arguments.lambdas or path.LAMBDAS
    records = [path.measure(store, run, lambdas, device, talk) for run in runs]
    tables = [path_text.table(record) for record in records]
    if arguments.html:
        from lorabench.report.page import Part, parts_page

        header = [("runs", ", ".join(run.record.run_id for run in runs)), ("evaluated", records[0]["evaluated"])]
        part = Part(title="Along W0 + λ ΔW", text=path_text.ABOUT, tables=tables)
        write_page(arguments.html, parts_page("What is learned and forgotten along ΔW?", header, [part]))
    if arguments.json:
        tell(as_json({"paths": records}))
    else:
        tell("\n\n".join([path_text.ABOUT, *(each.text for each in tables)]))
    return 0
