"""Cut an adapter to the smallest ranks that keep a share of its energy, and show what that costs.

ADAPTER is a run (its id, what it begins with, or its folder), or a file, folder or Hub id of an adapter. Each
layer gets the smallest rank k whose singular values hold the share --energy of Σσ² of ΔW, and the best
approximation of that rank, from the exact SVD: B = U√S and A = √S Vh. It is written as a LoRA in PEFT's format
with α = r in every layer, so that the scale is 1; what was saved whole beside the factors (a task head, norms,
biases, rows of tokens) and what the configuration says beside ranks is carried over; all experts of a stack get the
rank of the largest. With --base the modules are named and held against it, which kohya's names (`_` for `.`) and
files of several models need. A dense ΔW, as of full fine-tuning, becomes a LoRA too; its vectors (biases, norms) have
no such factors and are left out.

A run is evaluated on its own validation and retention data; another adapter as --like says.

Results are kept in RESULTS/compressions/<id>/ (record.json, adapter/), and read from there the next time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorabench.commands._arguments import (
    ALPHA,
    BASE,
    DEVICE,
    HTML,
    JSON,
    RESULTS,
    argument,
    as_json,
    device_here,
    hush_libraries,
    numbers,
    write_page,
)
from lorabench.terminal.text import talk, tell

ARGUMENTS = [
    argument("adapter", "a run, or a file, folder or Hub id of an adapter", metavar="ADAPTER"),
    argument(
        "--energy",
        "share of Σσ² to keep in each layer, one or several with commas (default: 0.95)",
        type=numbers(float),
        default=[0.95],
        metavar="E",
    ),
    argument("-o --output", "copy the adapter there (several: to energy-E below it)", type=Path, metavar="DIR"),
    argument("--like", "the run whose base, task and settings another adapter is evaluated with", metavar="RUN"),
    BASE,
    ALPHA,
    RESULTS,
    DEVICE,
    HTML,
    JSON,
]


def main(arguments: argparse.Namespace) -> int:
    from lorabench.store.store import Store

    store, device = Store(arguments.results), device_here(arguments.device)
    hush_libraries()
    from lorabench.adapters.compression.compress import compress as compress_subject
    from lorabench.adapters.compression.compress import provenance
    from lorabench.adapters.compression.compressible import open_subject
    from lorabench.adapters.compression.compression_text import compression_part, compression_text, copy_adapters

    given = {key: getattr(arguments, key) for key in ("like", "base", "alpha")}
    subject = open_subject(store, arguments.adapter, **given)
    records = compress_subject(store, subject, arguments.energy, device, talk)
    for line in subject.notes:
        talk(line)
    if arguments.output:
        copy_adapters(store, records, arguments.output)
    if arguments.html:
        from lorabench.report.page import parts_page

        about = provenance(subject)
        header = [(key.replace("_", " "), str(about[key])) for key in ("adapter", "format", "scale_source")]
        part = compression_part(subject.name, records)
        write_page(arguments.html, parts_page("A compressed adapter", header, [part]))
    table = provenance(subject) | {"compressions": records}
    tell(as_json(table) if arguments.json else compression_text(store, records))
    return 0
