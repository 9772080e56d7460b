"""Merge the LoRA adapters of several runs, and evaluate the merges on every run's task.

Runs are named by their ids, or by what these begin with; they share base and layers. Rows: the base, each adapter
alone, and each merge; columns: the tasks' validation splits, each with its own run's head where there is one. With
adapters ΔW = s B A and weights w, --by takes, as PEFT's add_weighted_adapter defines them:

linear               (Σ √(ws) B)(Σ √(ws) A): the factors are summed apart, so that cross terms come in
cat                  Σ w ΔW exactly, of rank Σ r
svd                  the best approximation of Σ w ΔW of rank --rank (where not given: the largest rank)
ties                 factor by factor: only the --density largest entries stay, a sign is elected for each entry,
                     and those of that sign are averaged (Yadav et al. 2023, arXiv 2306.01708)
dare_linear          factor by factor: entries stay with probability --density and are divided by it, then summed
                     (Yu et al. 2024, arXiv 2311.03099)
dare_ties            dropped as dare_linear does, merged as ties does
magnitude_prune      factor by factor: only the --density largest entries stay, then summed
ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd
                     the same on each ΔW itself, then the best approximation of rank --rank

Those that go factor by factor, and linear, need adapters of one rank; the tables call them `A and B apart`: they are
not what the papers define, which merge ΔW. On ΔW itself, as their papers define them, --by takes

mean                 Σ w ΔW / Σ w, exactly
delta_ties           TIES: of each adapter's entries, over all layers, only the --density largest stay; then a sign is
                     elected for each entry, and those of that sign are averaged
delta_dare           DARE: entries stay with probability --density and are divided by it, then summed
iso_c                Σ w ΔW with every singular value replaced by their mean (Marczak et al. 2025, arXiv 2502.04959)
tsv                  TSV-Merge: the adapters' singular triplets side by side, the vectors made orthonormal (Gargiulo et
                     al. 2025, arXiv 2412.00081)
knots_ties           KnOTS: TIES on the right vectors of [ΔW_1 … ΔW_T] = U Σ [V_1ᵀ …], in the basis U that all share
                     (Stoica et al. 2025, arXiv 2410.19735)

of any ranks. mean, iso_c, tsv and knots_ties have rank Σ r at most; delta_ties and delta_dare have full rank, and
--rank cuts them to it, as it does the others.

Beside it: what each merge changes for each adapter on its own task, and how much every two adapters interfere
(cosine, overlap of their directions, sign conflicts; chance beside).

Results are kept in RESULTS/merges/<id>/record.json and RESULTS/pairs/, and read from there the next time. With
--output each merge is written too, as a LoRA in PEFT's format with the scale 1, of rank Σ r (cat), --rank (svd) or r,
a dense one as ΔW and the identity; how far it is from Σ w ΔW is told, and what is left out: the heads, of which each
task has its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
from lorabench.terminal.text import talk, tell

ARGUMENTS = [
    argument("runs", "a run's id, or what it begins with; two or more", nargs="+", metavar="RUN"),
    argument(
        "--by",
        "how, one or several with commas (default: linear,svd,ties,dare_linear,dare_ties; of different ranks cat, svd "
        "and those that end in svd)",
        metavar="NAME",
    ),
    argument("--weights", "one a run, with commas (default: 1 each)", type=numbers(float), metavar="W"),
    argument(
        "--density", "share of the entries that stay (default: 0.5)", type=number(float, 0), default=0.5, metavar="D"
    ),
    argument("--rank", "of a merge that ends in svd, or of ΔW itself", type=number(int, 1), metavar="R"),
    argument("-o --output", "write the merge there (several: to BY below it)", type=Path, metavar="DIR"),
    argument("--seed", "of DARE, one or several with commas (default: 0)", type=numbers(int), metavar="S"),
    RESULTS,
    DEVICE,
    HTML,
    JSON,
]


def main(arguments: argparse.Namespace) -> int:
    store, device = begin(arguments)
    from lorabench.adapters.merging.adapters import read_adapter
    from lorabench.adapters.merging.bodies import bodies, usual
    from lorabench.adapters.merging.compose import compose
    from lorabench.adapters.merging.interference import (
        change_table,
        interference,
        interference_table,
        merge_part,
        merge_table,
        peft_note,
        with_changes,
    )
    from lorabench.adapters.merging.merged_files import merge_folders, write_merges
    from lorabench.processes.distributed import pick_device

    adapters = [read_adapter(store, given) for given in arguments.runs]
    run_ids = [adapter.record.run_id for adapter in adapters]
    if arguments.by is None:
        by = usual([adapter.ranks for adapter in adapters])
    else:
        by = [name.strip() for name in arguments.by.split(",") if name.strip()]
    weights = arguments.weights or [1.0] * len(run_ids)
    wanted = bodies(run_ids, by, weights, arguments.density, arguments.rank, arguments.seed or [0])
    folders = merge_folders(wanted, arguments.output) if arguments.output else {}
    records = with_changes(compose(store, adapters, wanted, device, talk), wanted, adapters)
    pairs = interference(store, adapters, talk)
    written = write_merges(adapters, folders, pick_device(device)) if folders else []
    for each in written[:1]:
        for line in each.left_out:
            talk(f"left out: {line}: each task has its own")
    for each in written:
        talk(each.text)
    for line in peft_note(wanted):
        talk(line)
    tables = [merge_table(records, wanted), change_table(records, wanted), interference_table(pairs)]
    if arguments.html:
        from lorabench.report.page import parts_page

        weights_text = ", ".join(f"{weight:g}" for weight in weights)
        part = merge_part(run_ids, tables)
        write_page(arguments.html, parts_page("Merged adapters", [("weights", weights_text)], [part]))
    found = {"merges": records, "interference": pairs, "written": [each.to_json() for each in written]}
    tell(as_json(found) if arguments.json else "\n\n".join(table.text for table in tables))
    return 0
