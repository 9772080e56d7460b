"""TOML as text: a table written as a person would write a sweep file, and a text with some of its values changed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip, show

if TYPE_CHECKING:
    from tomlkit.items import Key


def as_toml(table: Mapping[str, Any]) -> str:
    """The table as TOML: `[section]` or `[[section]]` for tables and lists of them, dotted keys for what is nested.

    A dotted key of the table (`{"base": {"method.name": "lora"}}`) says the same as a table inside. InputError for
    what TOML does not have, such as None.
    """
    table = {key: plain(value, key) for key, value in table.items()}
    head = [f"{dotted([key])} = {in_line(value)}" for key, value in table.items() if not _blocks(value)]
    sections = [(key, value) for key, value in table.items() if _blocks(value)]
    parts = ["\n".join(head)] if head else []
    for key, value in sections:
        title = f"[{dotted([key])}]" if isinstance(value, dict) else f"[[{dotted([key])}]]"
        parts += ["\n".join([title, *_lines(block)]) for block in _blocks(value)]
    return "\n\n".join(parts) + "\n"


def in_line(value: Any) -> str:
    """A value as it stands after `=`."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{dotted([key])} = {in_line(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(in_line, value)) + "]"
    from tomlkit import item

    return item(value).as_string()


def changed(text: str, places: Mapping[tuple[str | int, ...], Any]) -> str:
    """The text with these values in these places (`("grid", 0, "method", "rank")`); comments and all else stay.

    InputError where a place cannot be had, as below a value that is no table.
    """
    for place, value in places.items():
        wanted = _with(tomllib.loads(text), place, plain(value, ".".join(map(str, place))))
        text = next((new for new in _attempts(text, place, value) if _reads(new, wanted)), "")
        if not text:
            raise InputError(f"{'.'.join(map(str, place))} = {show(value)}: cannot be put into the file")
    return text


def _attempts(text: str, place: tuple[str | int, ...], value: Any) -> Iterator[str]:
    """The text with the value in its place: where there is one, or as a dotted key in one of the tables around it."""
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    value = tomlkit.parse(f"value = {in_line(value)}\n")["value"]
    for depth in range(len(place) - 1, -1, -1):
        document: Any = tomlkit.parse(text)
        try:
            inside = document
            for key in place[:depth]:
                inside = inside[key]
            inside[place[depth] if depth == len(place) - 1 else _key(place[depth:])] = value
            yield document.as_string()
        except (KeyError, TypeError, AttributeError, TOMLKitError):
            continue
    yield "\n".join([text.rstrip("\n"), "", f"[{place[0]}]", f"{dotted(place[1:])} = {in_line(value)}", ""])


def _reads(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        return False


def _with(table: Any, place: tuple[str | int, ...], value: Any) -> Any:
    inside = table
    for key in place[:-1]:
        inside = inside[key] if isinstance(key, int) else inside.setdefault(key, {})
        if not isinstance(inside, dict | list):
            raise InputError(f"{'.'.join(map(str, place))} = {show(value)}: {show(key)} is no table")
    inside[place[-1]] = value
    return table


def plain(value: Any, where: str) -> Any:
    """What TOML has of a Python value: tuples, ranges and arrays are lists, paths are texts."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{clip(key)}") for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item, where) for item in value]
    if isinstance(value, PathLike):
        return str(value)
    if not isinstance(value, str | bool | int | float) and hasattr(value, "tolist"):  # NumPy's
        return plain(value.tolist(), where)
    if not isinstance(value, str | bool | int | float):
        hint = "leave the key out" if value is None else "must be a text, a number, true, false, a list or a table"
        raise InputError(f"{where} = {show(value)}: {hint}")
    return value


def _blocks(value: Any) -> list[dict[str, Any]]:
    """The tables that stand under headings of their own."""
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) and value and all(isinstance(item, dict) for item in value) else []


def _lines(block: dict[str, Any], *above: str) -> Iterator[str]:
    for key, value in block.items():
        path = (*above, *(key.split(".") if all(map(str.isidentifier, key.split("."))) else [key]))
        if isinstance(value, dict) and value and all(map(str.isidentifier, value)):
            yield from _lines(value, *path)
        else:
            yield f"{dotted(path)} = {in_line(value)}"


def dotted(path: Sequence[Any]) -> str:
    """`("method", "rank")` -> `method.rank`; parts that are no plain words are quoted."""
    return _key(path).as_string()


def _key(path: Sequence[Any]) -> Key:
    from tomlkit import key

    return key([*map(str, path)] if len(path) > 1 else str(path[0]))
