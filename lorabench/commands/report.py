"""Draw the tables, figures and report.html again; analyses that are up to date are not repeated."""

from __future__ import annotations

import argparse

from lorabench.commands._draw import ARGUMENTS, draw

__all__ = ["ARGUMENTS", "main"]


def main(arguments: argparse.Namespace) -> int:
    return draw(arguments, again=True)
