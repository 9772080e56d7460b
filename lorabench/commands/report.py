"""Draw the tables, figures and report.html again; analyses that are up to date are not repeated."""

from __future__ import annotations

import argparse

from lorabench.commands._arguments import FOLDER, NAMED, PROCESSES
from lorabench.commands._draw import draw

ARGUMENTS = [FOLDER, NAMED, PROCESSES]


def main(arguments: argparse.Namespace) -> int:
    return draw(arguments, again=True)
