"""Show how every run of a results folder stands, also while runs go on."""

from __future__ import annotations

import argparse

from lorabench.commands._arguments import HERE, JSON, as_json, open_store

ARGUMENTS = [HERE, JSON]


def main(arguments: argparse.Namespace) -> int:
    from lorabench.status import status_json, status_text

    store = open_store(arguments.results)
    print(as_json(status_json(store)) if arguments.json else status_text(store))
    return 0
