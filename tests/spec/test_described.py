"""What `list NAME` prints of every plug-in: read back by the decoder that sweep files go through."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le

from lorabench.config import plugins
from lorabench.config.decode import Pattern, decode
from lorabench.spec import described
from lorabench.spec.sweep import parse_sweep
from tests.conftest import TOY

EVERY = [(folder, name) for folder in plugins.FOLDERS for name in plugins.names(folder)]


@pytest.mark.parametrize(("folder", "name"), [each for each in EVERY if each[0] != "analyses"])
def test_a_block_changes_nothing_until_it_is_changed(folder: str, name: str) -> None:
    found, example = described.describe(folder, name), plugins.example(folder, name)
    cls = type(example)
    given = {
        field.name: getattr(example, field.name)
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
        or dataclasses.is_dataclass(getattr(example, field.name))
    }
    for text in (found.block, re.sub(r"^# (?!.*(…|\[\]|{}))", "", found.block, flags=re.M)):
        table: Any = tomllib.loads(text)
        section, head = cls.in_sweep
        table = table[section.strip("[]")]
        table = table[0] if section.startswith("[[") else table
        table = table[head] if head else table
        assert table.pop("name") == name
        assert decode(cls, table) == cls(**given)
    own = [field.key.removeprefix(f"{head}.") for field in found.fields if field.key.count(".") <= bool(head)]
    assert own == [field.name for field in dataclasses.fields(cls)]


@pytest.mark.parametrize("name", plugins.names("analyses"))
def test_an_analysis_is_told_by_its_metrics(name: str) -> None:
    found = described.describe("analyses", name)
    assert set(found.metrics) == {f"{name}.{key}" for key in plugins.plugin_class("analyses", name).metrics}
    if found.block:
        table = {"base": TOY | {"method": {"name": "lora"}, "steps": 4, "snapshot_every": 2}} | tomllib.loads(
            found.block
        )
        assert len(parse_sweep(table).tables) == 1


def test_a_field_is_told_with_its_meaning_also_where_it_is_inherited() -> None:
    fields = {field.key: field for field in described.describe("methods", "lora").fields}
    assert fields["method.alpha"].text.startswith("A number, or a multiple of each layer's rank")
    assert "regular expression" in fields["method.targets"].text and fields["method.targets"].default == "all-linear"
    tasks = {field.key: field for field in described.describe("tasks", "completion").fields}
    assert tasks["task.generate.max_new_tokens"].default == 128 and not tasks["task.generate"].default


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Annotated[int, Ge(1), Le(4)] | None, "int ≥ 1 ≤ 4"),
        (Literal["a", "b"], '"a" | "b"'),
        (Annotated[str, Pattern("x+", "only x")], "only x"),
        (tuple[str, ...], "list of text"),
        (dict[str, Annotated[float, Ge(0)]], "table of float ≥ 0"),
        (Annotated[int, Le(2**32)], "int ≤ 4294967296"),
    ],
)
def test_types_are_told_in_words(hint: Any, text: str) -> None:
    assert described.type_text(hint) == text


def test_a_name_of_two_registries_is_shown_twice() -> None:
    assert [each.kind for each in described.find("dynamics")] == ["analyses", "figures"]
    assert described.find("lorra") == []
