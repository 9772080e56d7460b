"""Where a run was made: package versions, git commit, hardware. Goes into every record."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config import plugins

if TYPE_CHECKING:
    import torch

PACKAGES = [
    "lorabench",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "diffusers",
    "tokenizers",
    "numpy",
    "pillow",
]


def describe(device: torch.device) -> dict[str, Any]:
    import torch

    hardware: dict[str, Any] = {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return {"packages": dict(_packages()), "git": dict(_git()), "hardware": hardware}


@cache
def _packages() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def _git() -> tuple[tuple[str, Any], ...]:
    """Commit and dirty flag of the checkout that lorabench runs from; empty where it was installed."""
    root = plugins.PACKAGE.parent
    if not (root / ".git").exists():
        return ()
    try:
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ()
    return ("commit", commit.stdout.strip()), ("dirty", bool(status.stdout.strip()))


@cache
def source_digest() -> str:
    """SHA-256 of this package's code and templates: what a file was made by. As it was when it was first asked for."""
    root, digest = plugins.PACKAGE, hashlib.sha256()
    for file in sorted(file for kind in ("*.py", "*.j2") for file in root.rglob(kind)):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()
