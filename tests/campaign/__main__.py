"""Random kills and damaged files for so many minutes: `make campaign MINUTES=60`.

Half of the time goes to kills on this machine, of runs alone and in packs, a quarter each to a real SLURM (where there
can be one) and to damaged files. The figures go to stdout as JSON, with the machine and the commit; exit code 1 where
anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any

from tests.campaign import clusters, fuzz, kills

FUZZ_CASES_PER_MINUTE = 3000
SHARES = {"kills": 0.25, "packs": 0.25, "clusters": 0.25, "fuzz": 0.25}
PACK = "4"
"""Runs in a pack at most."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time, and told")
    parser.add_argument("--only", choices=[*SHARES], help="one of them, for all of the time")
    arguments = parser.parse_args()
    minutes = {arguments.only: 1.0} if arguments.only else SHARES
    found: dict[str, Any] = {"seed": arguments.seed} | _machine()
    for name, share in minutes.items():
        begin = time.monotonic()
        found[name] = _part(name, share * arguments.minutes, arguments.seed)
        found[name]["minutes"] = round((time.monotonic() - begin) / 60, 1)
    print(json.dumps(found, indent=2))
    return 1 if any(found[name].get("faults") for name in minutes) else 0


def _part(name: str, minutes: float, seed: int) -> dict[str, Any]:
    if name == "fuzz":
        return vars(fuzz.campaign(round(minutes * FUZZ_CASES_PER_MINUTE), seed, _say))
    if name == "clusters" and (problem := clusters.missing()):
        return {"skipped": problem}
    if name == "clusters":
        return vars(clusters.campaign(minutes, seed, _say))
    return vars(kills.campaign(minutes, seed, _say, PACK if name == "packs" else "off"))


def _machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "cores": os.cpu_count(), "machine": platform.machine(), "system": platform.release()}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
