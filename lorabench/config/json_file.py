"""The one boundary where JSON files of a results folder are read: bounded in size and depth, and typed.

A file may have been cut short by a crash, edited, or replaced by something else. Whatever is wrong with it is an
InputError of one line that names the file; nothing of it reaches a reader before it is checked.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lorabench.config.decode import InputError
from lorabench.config.plugins import unknown
from lorabench.config.quote import clip, show

MAX_BYTES = 64 * 2**20
"""No file but a plan of many thousands of runs is as large."""
MAX_DEPTH = 64
MAX_DIGITS = 300
"""Of a whole number: more would not even fit a float."""
_MAX_WHOLE = 10**MAX_DIGITS
MAX_NAME_BYTES = 255
TRIES = 3
"""At reading what another machine may be replacing."""

T = TypeVar("T")


class Unreadable(InputError):
    """A file is there, and the system did not let us read it: no right to it, or a file server's trouble."""


def read_json(file: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any] | None:
    """The object in a file; None where there is no file. InputError if it is no whole JSON object.

    Unreadable where that cannot be told.
    """
    try:
        content = read_bytes(file, max_bytes)
    except FileNotFoundError:
        return None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself: nobody can read it
            raise InputError(f"{file}: cannot be read: {error.strerror}") from None
        raise Unreadable(f"{file}: cannot be read: {error.strerror}") from None
    return parse(content, str(file))


def read(cls: type[T], file: Path, max_bytes: int = MAX_BYTES) -> T | None:
    """A dataclass's instance of what a file holds, as its fields' types have it; None where there is no file.

    InputError with every problem.
    """
    table = read_json(file, max_bytes)
    if table is None:
        return None
    try:
        return build(cls, table)
    except InputError as error:
        raise InputError(error.problems, str(file)) from None


def read_bytes(file: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """What is in a file that others replace. OSError where it is none; InputError where it is too large to be ours."""
    return again(lambda: _read(file, max_bytes))


def _read(file: Path, max_bytes: int) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for without end
    with open(descriptor, "rb") as handle:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "Is not a regular file", str(file))
        if found.st_size > max_bytes:
            raise InputError(f"{file}: has {found.st_size} bytes: too large for a file of this kind")
        return handle.read(max_bytes + 1)


def again(read: Callable[[], T]) -> T:
    """What `read` returns; NFS says that a file is stale where another machine has replaced it just then."""
    for _ in range(TRIES - 1):
        try:
            return read()
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.EIO):
                raise
    return read()


def parse(content: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a text; InputError if it is none, or holds what no file of ours does."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        table = json.loads(text)
    except RecursionError:
        raise InputError(f"{where}: is nested too deep") from None
    except ValueError as error:  # of JSON, of UTF-8, or of a number of thousands of digits
        raise InputError(f"{where}: not valid JSON (cut short?): {clip(error)}") from None
    if not isinstance(table, dict):
        raise InputError(f"{where}: must be a JSON object")
    _check_bounds(table, where)
    return table


def _check_bounds(table: dict[str, Any], where: str) -> None:
    """InputError where a value is nested too deep, a number too large, or a text none that can be written again."""
    level: list[Any] = [table]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
                    raise InputError(f"{where}: holds a text that is no Unicode: {show(value)}")
            elif isinstance(value, int) and abs(value) >= _MAX_WHOLE:
                raise InputError(f"{where}: holds a whole number of {len(str(abs(value)))} digits")
        if not inner:
            return
        level = inner
    raise InputError(f"{where}: is nested too deep")


def build(cls: type[T], table: dict[str, Any], where: str = "") -> T:
    """An instance of dataclass `cls`, its fields checked against their types; `where` stands before each key.

    By hand, and not by pydantic as sweep files are: `status` reads thousands of records. InputError with every
    problem.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    problems = [f"{where}{clip(key)}: {unknown('key', key, list(fields))}" for key in table if key not in fields]
    values = {}
    for key, field in fields.items():
        if key in table:
            try:
                values[key] = fit(_hints(cls)[key], table[key], where + key)  # type: ignore[arg-type]
            except InputError as error:
                problems += error.problems
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{where}{key}: is missing")
    if problems:
        raise InputError(problems)
    return cls(**values)


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def fit(hint: Any, value: Any, where: str) -> Any:
    """The value as a type has it: `tuple[int, ...]` of a list, an enum's member of its text. InputError if it is none.

    A whole number passes for a float; what is not finite does not. `Annotated[int, Ge(1)]` has a bound.
    """
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _bounded(fit(arguments[0], value, where), arguments[1:], where)
    if origin in (Union, UnionType):
        return _one_of(arguments, value, where)
    if origin is Literal:
        return _choice(value, list(arguments), where)
    if origin in (list, tuple, frozenset, dict):
        return _collection(origin, arguments, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, _instance(dict, value, where), f"{where}.")
    if issubclass(hint, StrEnum):
        return hint(_choice(value, [str(member) for member in hint], where))
    if hint is float:
        return _number(value, where)
    return _instance(hint, value, where)


def _bounded(value: Any, bounds: Iterable[Any], where: str) -> Any:
    for bound in bounds:
        if value < getattr(bound, "ge", value):
            raise InputError(f"{where} = {show(value)}: must be at least {bound.ge}")
        if value > getattr(bound, "le", value):
            raise InputError(f"{where} = {show(value)}: must be at most {bound.le}")
    return value


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and NoneType in hints:
        return None
    problems: list[str] = []
    for hint in hints:
        if hint is not NoneType:
            try:
                return fit(hint, value, where)
            except InputError as error:
                problems = problems or error.problems
    raise InputError(problems)


def _choice(value: Any, choices: list[Any], where: str) -> Any:
    if not isinstance(value, (str, int)) or value not in choices:
        raise InputError(f"{where} = {show(value)}: {unknown(where, value, list(map(str, choices)))}")
    return value


def _collection(origin: type, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is dict:
        _instance(dict, value, where)
        if arguments[1] is Any:
            return value
        return {key: fit(arguments[1], item, f"{where}.{clip(key)}") for key, item in value.items()}
    _instance(list, value, where)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise InputError(f"{where} = {show(value)}: must be {len(arguments)} values")
        hints = arguments
    else:
        hints = arguments[:1] * len(value)
    return origin(fit(hint, item, where) for hint, item in zip(hints, value, strict=True))


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{where} = {show(value)}: must be a number")
    if not math.isfinite(value):
        raise InputError(f"{where} = {value}: must be a finite number")
    return value


def _instance(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{where} = {show(value)}: must be {kind.__name__}")
    return value


def below(folder: Path, name: str) -> Path:
    """The file of this name below a folder. InputError where it would lie outside, or a link leads there."""
    check_name(name)
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise InputError(f"{path}: is a link")
    return path


def check_name(name: str) -> None:
    """InputError for what names no file below a folder: `/a`, `../a`, `a//b`, nor one that no file system has."""
    parts = name.split("/")
    long = any(len(part.encode("utf-8", "replace")) > MAX_NAME_BYTES for part in parts) or len(name) > 4000
    if long or "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
        raise InputError(f"{show(name)}: is no name of a file below the folder")
