"""A plug-in as a sweep file has it: its fields with types, defaults and meaning, and a block of TOML to paste."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from lorabench.config import plugins
from lorabench.config.decode import Pattern, encode
from lorabench.spec.analysis import Analysis
from lorabench.spec.run_spec import flatten

WIDTH = 100
"""Characters of a line of text."""
SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """A key of a sweep file."""

    key: str
    type: str
    required: bool
    """Whether it has no default."""
    default: Any
    """As TOML has it; None where it is not set."""
    text: str
    """What it means, as its docstring says; empty where its name says it all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """A plug-in of one registry."""

    kind: str
    """The registry: `methods`, `tasks`, …"""
    name: str
    description: str
    fields: tuple[Field, ...]
    metrics: dict[str, str]
    """Of an analysis: what it measures, as tables have it -> what that is."""
    block: str
    """Of a sweep file; empty where no section names it."""


def find(name: str) -> list[Described]:
    """The plug-ins of that name, one in each registry that has it."""
    return [describe(folder, name) for folder in plugins.FOLDERS if name in plugins.names(folder)]


def describe(folder: str, name: str) -> Described:
    cls: Any = plugins.plugin_class(folder, name)
    head = cls.in_sweep[1]
    metrics = {f"{name}.{key}": text for key, text in cls.metrics.items()} if issubclass(cls, Analysis) else {}
    return Described(
        kind=folder,
        name=name,
        description=plugins.describe(folder)[name],
        fields=() if metrics else tuple(_with_parts(cls, head)),
        metrics=metrics,
        block=_block(cls, name),
    )


def _with_parts(cls: type, head: str) -> Iterator[Field]:
    """Its fields, and below one that is a table with fields of its own, these; a plug-in's own are its own to tell."""
    hints = get_type_hints(cls)
    for field, own in zip(_fields(cls, head), dataclasses.fields(cls), strict=True):
        yield field
        for part in get_args(hints[own.name]):
            if dataclasses.is_dataclass(part) and isinstance(part, type) and not issubclass(part, plugins.Plugin):
                yield from _with_parts(part, field.key)


def _fields(cls: type, head: str) -> Iterator[Field]:
    texts, hints = _texts(cls), get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        default = _default(field)
        yield Field(
            key=f"{head}.{field.name}" if head else field.name,
            type=type_text(hints[field.name]),
            required=default is dataclasses.MISSING,
            default=None if default is dataclasses.MISSING else encode(default),
            text=texts.get(field.name, ""),
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def _texts(cls: type) -> dict[str, str]:
    """The docstrings below the fields, also of those that are inherited."""
    found: dict[str, str] = {}
    for part in [part for part in reversed(cls.__mro__) if dataclasses.is_dataclass(part)]:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def type_text(hint: Any) -> str:
    """`int ≥ 1`, `"linear" | "cosine"`, `list of text`; that a value may be left out (None) is not told."""
    if get_origin(hint) is Annotated:
        inner, *rules = get_args(hint)
        patterns = [rule.choices for rule in rules if isinstance(rule, Pattern)]
        return ", ".join(patterns) or " ".join([type_text(inner), *map(_rule, rules)])
    if get_origin(hint) is Literal:
        return " | ".join(map(json.dumps, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(type_text(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) in (tuple, list):
        parts = dict.fromkeys(type_text(part) for part in get_args(hint) if part is not Ellipsis)
        return f"list of {' | '.join(parts)}"
    if get_origin(hint) is dict:
        return f"table of {type_text(get_args(hint)[1])}"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return f"table with the fields of {hint.__name__.lower()}"
    return {str: "text", bool: "true | false", Any: "values"}.get(hint, getattr(hint, "__name__", str(hint)))


def _rule(rule: Any) -> str:
    name, sign = SIGNS[type(rule)]
    return f"{sign} {getattr(rule, name):g}" if getattr(rule, name) < 1e6 else f"{sign} {getattr(rule, name)}"


def toml(value: Any) -> str:
    """A value of plain tables and lists as TOML has it in a line."""
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _block(cls: type[plugins.Plugin], name: str) -> str:
    """All fields at their defaults, so that it changes nothing yet; what is not set, and lists, are commented out."""
    section, head = cls.in_sweep
    if issubclass(cls, Analysis):
        shown = cls.metrics if cls.needs == "layer" else cls.per_layer
        lines = [f'value = "{name}.{key}"' for key in list(shown)[:1]]
        return "\n".join([section, 'rows = ["method.name"]', *lines]) if lines else ""
    lines = [section, f'{head}.name = "{name}"' if head else f'name = "{name}"']
    example = plugins.example(cls.folder, name)
    for field, own in zip(_fields(cls, head), dataclasses.fields(cls), strict=True):  # type: ignore[arg-type]
        value, example_value = field.default, getattr(example, own.name)
        if field.required or (value is None and dataclasses.is_dataclass(example_value)):
            value = encode(example_value)
        flat = flatten(value, f"{field.key}.") if isinstance(value, dict) else {field.key: value}
        for key, item in flat.items():
            is_set = item is not None and not isinstance(item, (list, dict))
            lines.append(f"{'' if is_set else '# '}{key} = {'…' if item is None else toml(item)}")
        lines += [f"# {field.key} = {{}}"] * (not flat)
    return "\n".join(lines)


def text(found: Described) -> str:
    """For a terminal: what it is, a paragraph a field, and the block."""
    about = textwrap.fill(f"{found.name} ({found.kind}): {found.description}", WIDTH)
    keys = [*map(_paragraph, found.fields)]
    keys += [_indented(name, what) for name, what in found.metrics.items()]
    block = f"To paste into a sweep file:\n\n{found.block}" if found.block else "No section of a sweep file names it."
    return "\n\n".join(filter(None, [about, "\n".join(keys), block]))


def _paragraph(field: Field) -> str:
    default = "not set" if field.default is None else toml(field.default)
    return _indented(
        f"{field.key}  ({field.type}; {'required' if field.required else f'default {default}'})", field.text
    )


def _indented(head: str, body: str) -> str:
    return "\n".join([head, *textwrap.wrap(body, WIDTH, initial_indent="    ", subsequent_indent="    ")])
