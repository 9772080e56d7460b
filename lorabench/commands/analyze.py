"""Analyze what the runs have learned and write tables, figures and report.html; prints their paths.

Without SWEEP, every sweep found in RESULTS. What is up to date is left as it is, and only what is new is
computed; if it is interrupted, what is computed is kept. Adapters that a sweep's [[transfer]] names are moved.
"""

from __future__ import annotations

import argparse

from lorabench.commands._draw import ARGUMENTS, draw

__all__ = ["ARGUMENTS", "main"]


def main(arguments: argparse.Namespace) -> int:
    return draw(arguments, again=False)
