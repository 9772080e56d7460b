"""What the tasks share whose rows are a text that is read and one that is to be written, each by a template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from lorabench.config.decode import InputError, later
from lorabench.config.quote import show
from lorabench.data.columns import are_texts, called, columns, plain
from lorabench.data.rows_file import Row, place
from lorabench.data.values import Template
from lorabench.spec.generate import Generate
from lorabench.spec.task import LanguageModeling


@dataclass(frozen=True, kw_only=True)
class Pairs(LanguageModeling):
    """Templates are written with column names in braces."""

    parts: ClassVar[tuple[str, str]]
    """The fields with the templates: of what is read, and of what is to be written."""

    columns: str | None = None
    """Column names of a csv or tsv without a header line, separated by commas."""
    generate: Generate | None = later(None)  # noqa: RUF009
    """What the model is to write to what it reads, and how that is scored (None: only losses are measured)."""

    words: ClassVar[tuple[str, str]]
    """What the columns of either are often called."""
    end: ClassVar[str] = ""
    """Of a guessed template of what is read."""

    @classmethod
    def guess(cls, rows: list[Row], model: str) -> dict[str, Any]:
        names = plain(columns(rows, are_texts))
        read = called(names, cls.words[0])
        written = called([name for name in names if name != read], cls.words[1])
        if read is None or written is None:
            return {}
        more = called([name for name in names if name not in (read, written)], "input context")  # as Alpaca has it
        template = f"{{{read}}}\n{{{more}}}" if more else f"{{{read}}}"
        return dict(zip(cls.parts, (template + cls.end, f"{{{written}}}"), strict=True))

    @property
    def generation(self) -> Generate | None:
        return self.generate

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        same = [p for key in self.parts for p in Template(f"task.{key}", getattr(self, key)).problems(rows)]
        if same and split == "train":  # and so in every other
            raise InputError(same)
        self.filled(rows)
        if self.generate and split in self.generate.measured_splits:
            if not rows:
                asked = f'task.generate.splits = "{self.generate.splits}"'
                raise InputError(f'{asked}: there is no such split; use "validation"')
            self.check_answers(rows)
        return rows

    def check_answers(self, rows: list[Row]) -> None:
        if self.generate is None or self.generate.answer is None:
            return
        for number, (row, reference) in enumerate(zip(rows, self.filled(rows)[1], strict=True), 1):
            if not re.search(self.generate.answer, reference):
                where = f"{place(row, number)}, whose {self.parts[1]} is {show(reference)}"
                raise InputError(f"task.generate.answer = {show(self.generate.answer)}: finds nothing in {where}")

    def filled(self, rows: list[Row]) -> tuple[list[str], list[str]]:
        """What is read, and what is to be written. InputError with what is wrong of either."""
        found, problems = [], []
        for key in self.parts:
            try:
                found.append(Template(f"task.{key}", getattr(self, key)).fill(rows))
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)
        return found[0], found[1]

    def nothing(self, part: int, row: Row, number: int, what: str) -> InputError:
        """`task.response = "{a}": line 3 of x.jsonl leaves nothing to predict`."""
        key = self.parts[part]
        return InputError(f"task.{key} = {show(getattr(self, key))}: {place(row, number)} {what}")
