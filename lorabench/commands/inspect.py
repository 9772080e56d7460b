"""Show what an adapter changed in the weights, layer by layer, beside chance.

ADAPTER is a run (its id, or what it begins with), a file, a folder or a Hub id, of any known format; nothing is
unpickled, and no model is loaded. For every matrix ΔW: singular values, effective ranks, norms and power-law tail,
beside those of a random update of the same shape, and with --base its share of ‖W0‖; and the smallest ranks that keep a
share of ΔW's energy, as PEFT's `rank_pattern`.
"""

from __future__ import annotations

import argparse
import sys

from lorabench.commands._arguments import (
    ALPHA,
    BASE,
    HTML,
    JSON,
    RESULTS,
    argument,
    as_json,
    open_adapter,
    share_of,
    write_page,
)
from lorabench.terminal.text import tell

ARGUMENTS = [
    argument("adapter", "a run's id or its beginning, a file, a folder or a Hub id", metavar="ADAPTER"),
    BASE,
    ALPHA,
    RESULTS,
    argument(
        "--energy", "share of ‖ΔW‖² that the advised ranks keep (default: 0.95)", type=float, default=0.95, metavar="Q"
    ),
    HTML,
    JSON,
]


def main(arguments: argparse.Namespace) -> int:
    energy = share_of("--energy", arguments.energy)
    from lorabench.adapters.examine.fused_layers import fused_layers, with_parts
    from lorabench.adapters.examine.inspection import inspect_adapter
    from lorabench.terminal.text import tracked
    from lorabench.updates.locate import weights_path
    from lorabench.updates.weightfile import WeightFiles

    adapter = open_adapter(arguments.adapter, arguments)
    adapter = with_parts(adapter, fused_layers(adapter, arguments.base))
    base = WeightFiles(weights_path(arguments.base)) if arguments.base else None
    found = inspect_adapter(adapter, energy, lambda layers: tracked(layers, len(adapter.entries), "inspecting"), base)
    if arguments.html:
        from lorabench.adapters.examine.inspection_page import inspection_page

        write_page(arguments.html, inspection_page(found, energy))
    from lorabench.adapters.examine.inspection_text import inspection_text

    tell(as_json(found) if arguments.json else inspection_text(found, energy, bold=sys.stdout.isatty()))
    return 0
