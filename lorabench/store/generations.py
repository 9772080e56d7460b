"""`generations.jsonl`: what a run's model wrote at the end, a line an answer, with its own scores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lorabench.config.durable import remove, write_bytes
from lorabench.config.json_file import build, parse, read_bytes

MAX_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer."""

    split: str
    number: int
    """Of the prompt in its split: 1, 2, …"""
    prompt: str
    reference: str
    output: str
    scores: dict[str, float]
    """By metric."""


def write_generations(file: Path, answers: list[Generation]) -> str:
    """Write them whole and to last, whatever lies there; the file's SHA-256."""
    lines = (json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    content = "".join(lines).encode()
    if file.is_dir():
        remove(file)
    write_bytes(file, content)
    return hashlib.sha256(content).hexdigest()


def read_generations(file: Path) -> list[Generation]:
    """InputError where a line is not what is written here, OSError where the file cannot be read."""
    lines = read_bytes(file, MAX_BYTES).split(b"\n")
    return [build(Generation, parse(line, str(file))) for line in lines if line]
