"""Move an adapter to another base, by the weights of both alone or by data, and show what of it is left.

ADAPTER is a run (its id, what it begins with, or its folder), or a file, folder or Hub id of a LoRA-like adapter; --to
and --from are folders, files or Hub ids of bases, or builtin:NAME. Layers are matched by name, else by kind, and where
the bases have not as many blocks by relative depth, each with at most one partner; one without a partner is left out.
With the first --rank singular vectors U, V of a layer's old W0 and U', V' of its partner's, --by takes

project      ΔW' = U' U'ᵀ ΔW V' V'ᵀ; on a side whose width differs, the least-squares map U' Uᵀ or V' Vᵀ in the place
             of the projection (LoRA-X, Farhadzadeh et al. 2025, arXiv 2501.16559)
cross-lora   ΔW' = U' Uᵀ ΔW V V'ᵀ: what ΔW does between the old vectors, done between the new ones (LoRA-Align of
             Cross-LoRA, Xia et al. 2025, arXiv 2508.05232; its equation 7 as printed is project)

ΔW stays in its factors, of the same rank. The table says which share of ‖ΔW‖ is kept, and how far its directions
before and after overlap (where the width is the same), beside random updates of the same singular values. DIR holds a
LoRA in PEFT's format, of the scale 1, that loads on the new base.

trans-lora   a new adapter on the new base is taught what the old one answers to prompts that the old base makes, shown
             a handful of the task's, and that a discriminator takes for the task's (Wang et al. 2024, arXiv
             2405.17258); of a run of task completion, or --like one. --set prompts=250, examples, generator,
             generator_steps, steps, lr. What is made on the way is kept in RESULTS/transfers, and taken up again

A run is evaluated too, another adapter where --like names a run whose task and settings to take: the moved adapter on
the new base beside the untouched one, ΔW as it is where the widths allow it (copied), its size in random directions,
and the adapter of --trained; and the share of the gain that is recovered.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorabench.commands._arguments import (
    ALPHA,
    DEVICE,
    HTML,
    JSON,
    RESULTS,
    argument,
    as_json,
    changes,
    device_here,
    hush_libraries,
    number,
    write_page,
)
from lorabench.terminal.text import talk, tell

ARGUMENTS = [
    argument("adapter", "a run, or a file, folder or Hub id of an adapter", metavar="ADAPTER"),
    argument("--to", "the new base", required=True, metavar="BASE"),
    argument("--from", "the old base (default: the one that the adapter names)", dest="source", metavar="BASE"),
    argument("--by", "project, cross-lora or trans-lora (default: project)", default="project", metavar="NAME"),
    argument("--set", "of trans-lora; VALUE is TOML (several: --set ... --set ...)", action="append", default=[],
             metavar="KEY=VALUE"),
    argument(
        "--rank", "singular vectors of each base that are used (default: 320)", type=number(int, 1), default=320,
        metavar="K",
    ),
    argument("-o --output", "a folder, new or empty", required=True, type=Path, metavar="DIR"),
    argument("--like", "the run whose task and settings another adapter is evaluated with", metavar="RUN"),
    argument("--trained", "an adapter trained on the new base, to be held against", metavar="ADAPTER"),
    ALPHA,
    RESULTS,
    DEVICE,
    HTML,
    JSON,
]  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    from lorabench.store.store import Store

    store, device = Store(arguments.results), device_here(arguments.device)
    hush_libraries()
    from lorabench.adapters.compression.compressible import open_subject
    from lorabench.adapters.moving.kept_moves import moves_folder
    from lorabench.adapters.moving.move import ByData, move_adapter
    from lorabench.adapters.moving.transfer import Transfer
    from lorabench.adapters.moving.transfer_text import transfer_part, transfer_text
    from lorabench.config.decode import InputError, decode
    from lorabench.spec.move import BY_DATA, Distillation

    subject = open_subject(store, arguments.adapter, like=arguments.like, alpha=arguments.alpha)
    trained = open_subject(store, arguments.trained) if arguments.trained else None
    transfer = Transfer(subject, arguments.to, arguments.source, arguments.by, arguments.rank)
    given = changes(arguments.set)
    if given and not transfer.by_data:
        raise InputError(f"--set {next(iter(given))}: is of --by {BY_DATA} alone")
    how = decode(Distillation, given, "--set ")
    by_data = ByData(how=how, folder=moves_folder(store, transfer, how)) if transfer.by_data else None
    found = move_adapter(transfer, arguments.output, trained, device, talk, by_data)
    for line in subject.notes:
        talk(line)
    if arguments.html:
        from lorabench.report.page import parts_page

        header = [(key, str(found[key])) for key in ("adapter", "from", "to", "by")]
        write_page(arguments.html, parts_page("A moved adapter", header, [transfer_part(found)]))
    tell(as_json(found) if arguments.json else f"{transfer_text(found)}\n\n{arguments.output}")
    return 0
