"""What a benchmark's figures were made on, and where its JSON goes."""

from __future__ import annotations

import json
import random
import re
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lorabench.processes.distributed import pick_device
from lorabench.training import environment

RESULTS = Path(__file__).parent / "results"


def spread(values: list[float]) -> dict[str, Any]:
    """Median with its 95% bootstrap interval (None for fewer than five rounds), extremes, and every round."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(2000))
    interval = [medians[50], medians[-51]] if len(values) >= 5 else None
    return {
        "median": statistics.median(values),
        "interval": interval,
        "min": min(values),
        "max": max(values),
        "rounds": values,
    }


def write(name: str, device: str, settings: dict[str, Any], figures: dict[str, Any]) -> Path:
    """Write `results/<name>-<cpu or GPU name>.json`: machine, versions, settings and every figure."""
    described = environment.describe(pick_device(device))
    hardware = {key: value for key, value in described["hardware"].items() if key != "host"}
    kind = re.sub(r"[^a-z0-9]+", "-", hardware.get("gpu", hardware["device"]).lower()).strip("-")
    content = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware | {"threads": torch.get_num_threads()},
        "packages": described["packages"],
        "git": described["git"],
        "settings": settings,
    }
    file = RESULTS / f"{name}-{kind}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content | figures, indent=1) + "\n")
    return file
