"""Plain tables (TOML, JSON) -> validated frozen dataclasses, and back: the one boundary where input is checked.

Values are checked field by field with pydantic in strict mode (a string is never a number), unknown keys are
errors, and every problem is reported, each as `key = value: what is wrong`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from lorabench.config import plugins
from lorabench.config.quote import clip, message, show_path
from lorabench.config.quote import show as show

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class InputError(Exception):
    """The input was wrong. `problems` lists everything found, one line each; the command line exits with 2.

    A line is bounded and printable, whatever stands in it; so values that may be long are quoted (`show`).
    """

    def __init__(self, problems: str | list[str], source: str = ""):
        found = [problems] if isinstance(problems, str) else problems
        self.problems = [message(text) for text in found]
        prefix = f"{show_path(source)}: " if source else ""
        super().__init__("\n".join(prefix + problem for problem in self.problems))


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Annotation of a string that must match `regex` as a whole; `choices` says in words what may stand there."""

    regex: str
    choices: str

    def check(self, value: str) -> str:
        if not re.fullmatch(self.regex, value):
            raise ValueError(f"must be {self.choices}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema  # not at the top: `lorabench status` decodes nothing

        return core_schema.no_info_after_validator_function(self.check, handler(source))


def read_toml(file: Path) -> tuple[dict[str, Any], str]:
    """The table in a TOML file, and the file's text. FileNotFoundError; InputError where it cannot be read."""
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{show_path(file)}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return parse_toml(text), text
    except InputError as error:
        raise InputError(error.problems, str(file)) from None


def parse_toml(text: str) -> dict[str, Any]:
    """The table in a text. InputError where it is not TOML.

    Numbers must be finite, for an id is the hash of JSON, which has no others; whole ones of 64 bits, as TOML has them.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise InputError("not valid TOML: nested too deep") from None
    except ValueError as error:  # also of a whole number of thousands of digits
        raise InputError(f"not valid TOML: {clip(error, 320)}") from None
    if problems := [*_unfit_numbers(table)]:
        raise InputError(problems)
    return table


def _unfit_numbers(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where} = {value}: must be a finite number"
    elif _is_too_large(value):
        yield f"{where} = {show(value)}: {TOO_LARGE}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _unfit_numbers(item, f"{where}.{clip(key)}" if where else clip(key))
    elif isinstance(value, list):
        for item in value:
            yield from _unfit_numbers(item, where)


TOO_LARGE = "must be a whole number of at most 64 bits"


def _is_too_large(value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= 2**63


def decode(cls: type, table: dict[str, Any], where: str = "") -> Any:
    """An instance of dataclass `cls` from `table`.

    A field whose type is a plug-in base class (`method: Method`) takes a table with `name` and the plug-in's own
    fields; one like `tasks: tuple[Task, ...]` a list of such tables. `where` is put before each key in messages.
    Raises InputError with all problems.
    """
    values = {}
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if not isinstance(table, dict):
        raise InputError(f"{where.rstrip('.') or 'the file'} = {show(table)}: must be a table")
    problems = [
        f"{where}{clip(key)} = {show(value)}: {plugins.unknown('key', key, list(fields))}"
        for key, value in table.items()
        if key not in fields
    ]
    for key, field in fields.items():
        if key in table:
            try:
                values[key] = _decode_value(_hints(cls)[key], table[key], where + key)
            except InputError as error:
                problems += error.problems
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{where}{key}: is missing")
    if problems:
        raise InputError(problems)
    try:
        return cls(**values)
    except ValueError as error:
        raise InputError([f"{where}{line}" for line in str(error).splitlines()]) from None


def decode_plugin(base: type[plugins.Plugin], table: Any, where: str) -> Any:
    """The plug-in that `table["name"]` names, with its own fields from the rest of the table; or a name alone."""
    table = {"name": table} if base.by_name and isinstance(table, str) else table
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        choices = ", ".join(plugins.names(base.folder))
        raise InputError(f"{where}.name: is missing. Choices: {choices}")
    try:
        cls = plugins.plugin_class(base.folder, table["name"])
    except KeyError as error:
        raise InputError(f"{where}.name = {show(table['name'])}: {error.args[0]}") from None
    return decode(cls, {key: value for key, value in table.items() if key != "name"}, where + ".")


def later(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING) -> Any:
    """The default of a field that came later than the runs of many stores: `encode` leaves it out while it holds.

    A key more would change the ids of the specs that do without it, and nothing else. `factory` makes a default that
    is not to be imported before it is asked for.
    """
    return dataclasses.field(default=default, default_factory=factory, metadata={"later": True})


def encode(value: Any, whole: bool = False) -> Any:
    """The inverse of `decode`: plain tables of str, int, float, bool, None and lists; `whole`: later fields too."""
    if type(value) in (str, int, float, bool, type(None)):  # most values are: a sweep of thousands of runs is quick
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        head = {"name": value.name} if isinstance(value, plugins.Plugin) else {}
        fields = [f for f in dataclasses.fields(value) if (f.init if whole else _written(value, f))]
        return head | {f.name: encode(getattr(value, f.name), whole) for f in fields}
    if isinstance(value, (list, tuple)):
        return [encode(item, whole) for item in value]
    if isinstance(value, dict):
        return {key: encode(item, whole) for key, item in value.items()}
    return value


def _written(value: Any, field: dataclasses.Field[Any]) -> bool:
    if "later" not in field.metadata:
        return field.init
    default = field.default_factory() if callable(field.default_factory) else field.default
    return field.init and getattr(value, field.name) != default


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@cache
def _adapter(hint: Any) -> TypeAdapter:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _decode_value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and issubclass(hint, plugins.Plugin):
        return decode_plugin(hint, value, where)
    plugin = _plugin_of(hint)
    if plugin is not None:
        return _decode_plugins(plugin, value, where)
    part = _part_of(hint)
    if part is not None:
        return None if value is None else _decode_part(part, value, where)
    from pydantic import ValidationError

    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} = {value}: must be finite")
    if _is_too_large(value):
        raise InputError(f"{where} = {show(value)}: {TOO_LARGE}")
    try:
        return _adapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        messages = list(dict.fromkeys(map(_message, error.errors())))
        raise InputError(f"{where} = {show(value)}: {' or '.join(messages)}") from None


def _plugin_of(hint: Any) -> type[plugins.Plugin] | None:
    """`Task` of the hint `tuple[Task, ...]`; None of any other."""
    first = next(iter(get_args(hint)), None) if get_origin(hint) is tuple else None
    return first if isinstance(first, type) and issubclass(first, plugins.Plugin) else None


def _part_of(hint: Any) -> type | None:
    """`Lora` of the hint `Lora | None`: a plug-in, or another dataclass, inside another."""
    kinds = [kind for kind in get_args(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds and get_origin(hint) in (Union, UnionType) else None


def _decode_part(cls: type, value: Any, where: str) -> Any:
    is_plugin = issubclass(cls, plugins.Plugin)
    name = plugins.plugin_name(cls) if is_plugin else cls.__name__.lower()
    if not isinstance(value, dict):
        raise InputError(f"{where} = {show(value)}: must be a table with the fields of {name}")
    if is_plugin and value.get("name", name) != name:
        raise InputError(f"{where}.name = {show(value['name'])}: can only be {name}")
    fields = {key: item for key, item in value.items() if key != "name"} if is_plugin else value
    return decode(cls, fields, where + ".")


def _decode_plugins(base: type[plugins.Plugin], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where} = {show(value)}: must be a list of tables, each with its name")
    found, problems = [], []
    for number, table in enumerate(value, 1):
        try:
            found.append(decode_plugin(base, table, f"{where} {number}: {base.folder.removesuffix('s')}"))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return tuple(found)


def _message(error: Any) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "greater_than":
            return f"must be greater than {context['gt']:g}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}"
        case "less_than":
            return f"must be less than {context['lt']:g}"
        case "literal_error":
            choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return plugins.unknown("value", error["input"], choices)
        case "tuple_type" | "list_type":
            return "must be a list"
        case "dict_type":
            return "must be a table"
        case "missing" | "value_error" | _:
            text = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
            return text[:1].lower() + text[1:]
