"""A run's whole spec, every default included, and which of it the sweep gives."""

from __future__ import annotations

from typing import Any

from lorabench.config.decode import InputError, encode
from lorabench.config.plugins import unknown
from lorabench.config.quote import clip
from lorabench.config.toml_text import dotted, in_line
from lorabench.spec.run_spec import RunSpec, flatten
from lorabench.spec.sweep import Sweep


def find_run(sweep: Sweep, start: str) -> RunSpec:
    """The run of this id, or the only one whose id, or its hash alone, begins so. InputError."""
    found = [spec for spec in sweep.runs if spec.id.startswith(start) or spec.id.rpartition("-")[2].startswith(start)]
    exact = [spec for spec in found if spec.id == start]
    if len(exact or found) == 1:
        return (exact or found)[0]
    if found and start:
        names = ", ".join(spec.id for spec in found[:8])
        raise InputError(f"RUN = {clip(start)}: is the beginning of {len(found)} runs: {names}")
    raise InputError(f"RUN = {clip(start)}: {unknown('run', start, [spec.id for spec in sweep.runs])}")


def resolved(sweep: Sweep, spec: RunSpec) -> dict[str, Any]:
    """`{"run_id", "spec", "given"}`: all of its fields, defaults too, and the keys that the sweep gives."""
    table = {
        key: value for key, value in encode(spec, whole=True).items() if key != ("task" if spec.tasks else "tasks")
    }
    return {"run_id": spec.id, "spec": table, "given": list(sweep.given.get(spec.id, ()))}


def resolved_text(sweep: Sweep, spec: RunSpec) -> str:
    """The same as TOML, which as a `[base]` gives this run again; what has no value is a comment."""
    found = resolved(sweep, spec)
    lines = []
    for key, value in flatten(found["spec"]).items():
        is_given = any(key == given or key.startswith(f"{given}.") for given in found["given"])
        text = f"# {key}: none" if value is None else f"{dotted(key.split('.'))} = {in_line(_without_none(value))}"
        lines.append((text, "" if is_given else "# default"))
    width = max(len(text) for text, mark in lines if mark and len(text) < 60)
    body = [f"{text:<{width}}  {mark}".rstrip() for text, mark in lines]
    return "\n".join([f"# {spec.id} of {sweep.name}", *body])


def _without_none(value: Any) -> Any:
    """Tables in it without the keys that have no value, which TOML cannot write."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
