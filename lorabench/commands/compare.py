"""Show how far two adapters changed the same directions, layer by layer, beside chance.

A and B are runs (their ids, or what these begin with), files, folders or Hub ids, of any known formats. For every
layer that both have, on its input and its output side: subspace similarity φ(i, j), principal angles, Grassmann
distance, how much of each ΔW lies in the other's subspace, and a permutation test of whether the two share directions
(or have the same large coordinates), corrected over the layers. Scales play no part in any of these.
"""

from __future__ import annotations

import argparse
import sys

from lorabench.commands._arguments import ALPHA, BASE, HTML, JSON, RESULTS, argument, as_json, open_adapter, write_page
from lorabench.terminal.text import tell

ARGUMENTS = [
    argument("a", "a run's id or its beginning, a file, a folder or a Hub id", metavar="A"),
    argument("b", "another", metavar="B"),
    BASE,
    ALPHA,
    RESULTS,
    HTML,
    JSON,
]


def main(arguments: argparse.Namespace) -> int:
    from lorabench.adapters.examine.comparison import compare_adapters
    from lorabench.adapters.examine.fused_layers import in_parts
    from lorabench.terminal.text import tracked

    a, b = (open_adapter(source, arguments) for source in (arguments.a, arguments.b))
    a, b = in_parts(a, b, arguments.base)
    found = compare_adapters(a, b, lambda pairs, total: tracked(pairs, total, "comparing"))
    if arguments.html:
        from lorabench.adapters.examine.comparison_page import comparison_page

        write_page(arguments.html, comparison_page(found))
    from lorabench.adapters.examine.comparison_text import comparison_text

    tell(as_json(found) if arguments.json else comparison_text(found, bold=sys.stdout.isatty()))
    return 0
