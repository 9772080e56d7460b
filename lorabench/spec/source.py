"""A sweep from what a person has, a file, a text or a dict, and with some of its keys changed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorabench.config.decode import InputError, parse_toml
from lorabench.config.quote import clip
from lorabench.config.toml_text import as_toml, changed, in_line
from lorabench.spec.run_spec import flatten
from lorabench.spec.sweep import Sweep, parse_sweep, read_sweep

Source = str | os.PathLike[str] | Mapping[str, Any] | Sweep
"""A sweep's file, its TOML text (of several lines, or one with `=`), its table as a dict, or itself."""
DEFAULT_NAME = "sweep"
"""Of a sweep that is in no file and has no name."""


def as_sweep(source: Source, changes: Mapping[str, Any] | None = None) -> Sweep:
    """The sweep of `source`, with `changes` of its runs' keys: `{"lr": [1e-3, 3e-3], "method.rank": 8}`.

    Its `text` is what explains its runs: a dict's is written, and of a changed sweep the text is changed too, so that
    it says the same, with a comment that tells what was changed. Raises InputError with all problems at once.
    """
    if isinstance(source, Sweep):
        return _parsed(changed_text(source.text, changes), source.name) if changes else source
    if isinstance(source, Mapping):
        return _parsed(changed_text(as_toml(source), changes or {}), DEFAULT_NAME)
    if isinstance(source, str) and _is_text(source):
        return _parsed(changed_text(source, changes or {}), DEFAULT_NAME)
    return read_sweep(Path(source), edit=lambda text: changed_text(text, changes or {}))


def _is_text(source: str) -> bool:
    return "\n" in source or ("=" in source and not os.path.isfile(source))


def _parsed(text: str, name: str) -> Sweep:
    return parse_sweep(parse_toml(text), text, default_name=name)


def parse_change(text: str) -> tuple[str, Any]:
    """`lr=[1e-3, 3e-3]` -> key and value, which is read as TOML. InputError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {clip(text)}: must be KEY=VALUE")
    try:
        if len(table := parse_toml(f"value = {value}")) > 1:
            raise InputError("not valid TOML: several values")
        return key.strip(), table["value"]
    except InputError as error:
        if "not valid TOML" not in str(error):
            raise InputError(f"--set {clip(text)}: {error}") from None
        hint = f"; a text has quotes: --set '{clip(key)}=\"{clip(value)}\"'" if "\n" not in value else ""
        raise InputError(f"--set {clip(text)}: the value is not valid TOML{hint}") from None


def changed_text(text: str, changes: Mapping[str, Any]) -> str:
    """A sweep's text in which the runs have these keys; `name` is the sweep's own.

    A key is set in `[base]`, and in every `[[grid]]` block that has one of its own; what blocks alone have of a method
    or a task (`method.rank`) in these blocks alone, for those of another method have no such key.
    """
    if not changes:
        return text
    table = parse_toml(text)
    texts = [f"{key} = {in_line(value)}" for key, value in changes.items()]
    for key, value in changes.items():
        text = changed(text, dict.fromkeys(_places(table, key), value)) if key != "name" else _named(text, value)
    return f"# Changed: {clip('; '.join(texts), 1000)}.\n{text}"


def _places(table: Mapping[str, Any], key: str) -> Iterator[tuple[str | int, ...]]:
    parts, blocks, base = key.split("."), table.get("grid", []), table.get("base", {})
    blocks = blocks if isinstance(blocks, list) else []
    own = [number for number, block in enumerate(blocks) if isinstance(block, dict) and _has(block, key)]
    if not own or len(parts) == 1 or _has(base, key):
        yield ("base", *parts)
    for number in own:
        yield ("grid", number, *parts)


def _has(block: Any, key: str) -> bool:
    return isinstance(block, dict) and any(name == key or name.startswith(f"{key}.") for name in flatten(block))


def _named(text: str, name: Any) -> str:
    """The text with this `name` at its top."""
    if "name" in parse_toml(text):
        return changed(text, {("name",): name})
    lines = text.splitlines(keepends=True)
    header = [*itertools.takewhile(lambda line: line.startswith("#"), lines)]  # which the report shows
    return "".join([*header, f"name = {in_line(name)}\n", *lines[len(header) :]])
