"""Write any LoRA-like adapter in PEFT's format, such that PEFT computes the same ΔW.

ADAPTER is a run (its id, what it begins with, or its folder), a file, a folder or a Hub id, of any format that
lorabench reads. What was saved whole
(heads, norms, biases, rows of tokens), replicated blocks, stacked experts and fields of a PEFT configuration that
say more than scale and targets are carried over; what is not is told. Refused, with the reason, where it would not
be exact: a dense ΔW, DoRA by another formula than PEFT's, names of which it is not certain which module they mean
(--base tells). Of a file of several models, with --base the one that this is of is written, else each into a folder
below. OUTPUT must be new or empty.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lorabench.commands._arguments import ALPHA, BASE, RESULTS, argument, hush_libraries, open_adapter
from lorabench.terminal.text import talk, tell

ARGUMENTS = [
    argument("adapter", "a run's id or its beginning, a file, a folder or a Hub id", metavar="ADAPTER"),
    argument("output", "a folder, new or empty", metavar="OUTPUT", type=Path),
    BASE,
    ALPHA,
    RESULTS,
]


def main(arguments: argparse.Namespace) -> int:
    hush_libraries()
    from lorabench.adapters.examine.convert import convert as write_as_peft

    adapter = open_adapter(arguments.adapter, arguments)
    for note in write_as_peft(adapter, arguments.output, arguments.base):
        talk(f"note: {note}")
    talk(f"{adapter.num_layers} layers of {adapter.format}, scale: {adapter.scale_source or 'none'}")
    tell(arguments.output)
    return 0
