"""What the tasks share that give a text, a pair of texts or an image one label or score by a head on the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorabench.config.decode import InputError, later
from lorabench.config.quote import show
from lorabench.data.columns import Holds, are_labels, are_texts, called, columns, longest
from lorabench.data.rows_file import Row, place, source_of
from lorabench.data.values import check_column, in_order, labels, shown, texts
from lorabench.spec.task import Example, Task

if TYPE_CHECKING:
    from torch import Tensor

    from lorabench.spec.run_spec import RunSpec

NO_LABEL = "-1"
LABELS = "label labels class category sentiment score target gold rating"
"""What a column of labels is often called."""
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
         ("text", "text_pair"), ("question", "sentence"))  # fmt: skip
"""What the two texts of a pair are often called."""


@dataclass(frozen=True, kw_only=True)
class Labelled(Task):
    """The head starts from the same random weights in every run of one seed, and is always trained.

    A label that is null, empty or absent is missing, and -1 beside the classes 0, 1, … or in all of the test split
    (SNLI and GLUE write it so). A missing one is refused, unless `unlabelled` is given; a test split without labels
    counts as none.
    """

    data: str
    label: str = "label"
    """Column of the label, or of the score."""
    columns: str | None = None
    """Column names of a csv or tsv without a header line, separated by commas."""
    unlabelled: str | None = later(None)
    """What stands for no label, such as "-1": rows with it, or with a missing label, are left out ("": these alone)."""

    holds: ClassVar[Holds] = are_labels
    """What the values of a column of labels are."""

    @abstractmethod
    def check_content(self, rows: list[Row]) -> None:
        """InputError with what is wrong of what is to be labelled."""

    @abstractmethod
    def written(self, label: str) -> str:
        """One way of writing a label."""

    @abstractmethod
    def target(self, label: str, options: dict[str, Any]) -> int | float:
        """What is predicted. KeyError or ValueError where the label is none of the training rows' kind."""

    @abstractmethod
    def check_labels(self, split: str, found: list[tuple[str, Row]], options: dict[str, Any]) -> None:
        """InputError where labels are not of the task's kind: what stands there, and where, of rows that have one."""

    def problems(self, spec: RunSpec) -> Iterator[str]:
        if self.columns and self.label not in self.columns.split(","):
            yield f"task.label = {show(self.label)}: is not among task.columns = {show(self.columns)}"

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        if split == "test" and self._says_nothing(rows, options):
            return []
        problems = []
        for check in (self.check_content, lambda rows: self._checked(split, rows, options)):
            try:
                check(rows)
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)
        return [row for row, label in zip(rows, self._labels(rows), strict=True) if label is not None]

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def classes(self, rows: list[Row]) -> list[str]:
        return in_order(label for label in self._labels(rows) if label is not None)

    def targets(self, rows: list[Row], options: dict[str, Any]) -> list[int | float]:
        """Of usable rows."""
        return [self.target(label, options) for label in self._labels(rows) if label is not None]

    def _labels(self, rows: list[Row]) -> list[str | None]:
        """In one way of writing; None where one is missing or is what `unlabelled` says."""
        found = labels(rows, "task.label", self.label)
        written = [None if label is None else self.written(label) for label in found]
        none = self.written(self.unlabelled) if self.unlabelled else None
        return [None if label == none else label for label in written]

    def _says_nothing(self, rows: list[Row], options: dict[str, Any]) -> bool:
        is_class = NO_LABEL in options.get("label2id", {})
        return set(self._labels(rows)) <= ({None} if is_class else {None, NO_LABEL})

    def _checked(self, split: str, rows: list[Row], options: dict[str, Any]) -> None:
        where = f"task.label = {show(self.label)}"
        check_column(rows, "task.label", self.label)
        found = self._labels(rows)
        if set(found) == {None}:
            raise InputError(f"{where}: no row{f' of {source}' if (source := source_of(rows)) else ''} has a label")
        if None in found and self.unlabelled is None:
            raise InputError(f"{where}: {_first(rows, found, None)} has no label; {self._way_out('')}")
        if NO_LABEL in found and self.unlabelled is None and self._is_in_doubt(found, options):
            doubt = f'may stand for itself, or mean "no label" as in SNLI; {self._way_out(NO_LABEL)}'
            raise InputError(f"{where}: {_first(rows, found, NO_LABEL)} has -1, which {doubt}")
        three = zip(labels(rows, "task.label", self.label), found, rows, strict=True)
        self.check_labels(split, [(raw, row) for raw, label, row in three if raw and label], options)

    def _is_in_doubt(self, found: list[str | None], options: dict[str, Any]) -> bool:
        """Whether -1 stands beside the classes 0, 1, …: of these rows, or else of the training split."""
        others = set(options.get("label2id", found)) - {None}
        others = others - {NO_LABEL} if not options else others
        return len(others) > 1 and others == {str(number) for number in range(len(others))}

    def _way_out(self, none: str) -> str:
        also = ', task.unlabelled = "" takes them as they are' if none else ""
        return f"task.unlabelled = {shown(none)} leaves such rows out{also}"


@dataclass(frozen=True, kw_only=True)
class LabelledText(Labelled):
    """A text, or a pair of texts."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    text: str = "text"
    """Column of the (first) text."""
    text_pair: str | None = None
    """Column of the second text of a pair."""

    @classmethod
    def guess(cls, rows: list[Row], model: str) -> dict[str, Any]:
        label = called(columns(rows, cls.holds), LABELS)
        texts = [name for name in columns(rows, are_texts) if name != label]
        pair = next((pair for pair in PAIRS if {*pair} <= {*texts}), None)
        text = called(texts, "text sentence review content question") or longest(rows, texts)
        if label is None or text is None:
            return {}
        return ({"text": pair[0], "text_pair": pair[1]} if pair else {"text": text}) | {"label": label}

    def check_content(self, rows: list[Row]) -> None:
        self._texts(rows)

    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> list[Example]:
        if not rows:
            return []
        encoded = tokenizer(*self._texts(rows), truncation=True, max_length=seq_len)
        if [] in encoded["input_ids"]:
            empty = encoded["input_ids"].index([])
            raise InputError(f"task.text = {show(self.text)}: {place(rows[empty], empty + 1)} has no tokens")
        segments = encoded.get("token_type_ids", [[]] * len(rows))
        targets = self.targets(rows, options)
        return [
            {"input_ids": ids, "labels": target} | ({"token_type_ids": kinds} if any(kinds) else {})
            for ids, kinds, target in zip(encoded["input_ids"], segments, targets, strict=True)
        ]

    def _texts(self, rows: list[Row]) -> list[list[str]]:
        """Of each text column. InputError with what is wrong in all of them."""
        found, problems = [], []
        for key, column in (("task.text", self.text), ("task.text_pair", self.text_pair)):
            try:
                found += [] if column is None else [texts(rows, key, column)]
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)
        return found


def _first(rows: list[Row], found: list[str | None], label: str | None) -> str:
    """Where the first row with this label stands."""
    number = found.index(label)
    return place(rows[number], number + 1)
