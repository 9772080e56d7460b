"""Multiple choice: which of the texts that may follow a question the model finds most likely."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from lorabench.config.decode import InputError, later
from lorabench.config.quote import clip, show
from lorabench.data.columns import are_plain, are_text_lists, are_texts, called, columns, numbered, plain
from lorabench.data.rows_file import Row, place
from lorabench.data.tokens import context_and_continuation, opening
from lorabench.data.values import Template, as_class, check_column, has_column, labels, lists, shown, texts
from lorabench.spec.task import IGNORE, Example, LanguageModeling, Told

if TYPE_CHECKING:
    from torch import Tensor

FIRST = {"index": 0, "number": 1}
"""What the first choice is called."""


class Question(NamedTuple):
    """A row: its text, what may follow, and the index of what does."""

    text: str
    choices: list[str]
    right: int


class Scored(NamedTuple):
    """A choice: its place in its question, from 0, its log-likelihood in nats, summed over its tokens, its lengths."""

    number: int
    is_right: bool
    log_likelihood: float
    tokens: int
    characters: int
    bytes: int


LENGTHS: dict[str, Callable[[Scored], int]] = {
    "accuracy": lambda choice: 1,
    "accuracy_norm": lambda choice: choice.characters,
    "accuracy_byte": lambda choice: choice.bytes,
    "accuracy_token": lambda choice: choice.tokens,
}
"""Metric -> what the log-likelihoods are divided by before the largest is taken."""


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(LanguageModeling):
    """Training is on the right choice behind its question: its tokens alone are predicted, no end of sequence after it.

    For validation and test each choice is scored by its log-likelihood behind the question. How the two are cut into
    tokens, and the accuracies, are those of EleutherAI's lm-evaluation-harness 0.4.13 (`_encode_pair` in
    `lm_eval/api/model.py`, `process_results` in `lm_eval/api/task.py`): `accuracy` is its acc, `accuracy_norm`
    (by the characters of the choice, without `before`) its acc_norm, `accuracy_byte` its acc_bytes. Of equal ones the
    first choice is taken. A question that leaves too little room is cut from the left, behind what the tokenizer puts
    before a text.
    """

    reports: ClassVar[tuple[str, ...]] = ("loss", *LENGTHS)

    data: str
    question: str = "{question}"
    """A template, with column names in braces."""
    choices: str = "choices"
    """The column that holds a list of texts, or several columns of one text each, separated by commas."""
    answer: str = "answer"
    """Column that says which choice is right."""
    answer_is: Literal["index", "number", "letter", "text"] = "index"
    """How it says so: from 0, from 1, from A, or as the choice's own text."""
    labels: str | None = None
    """Column with a list of what the answer calls the choices; `answer_is` does not count then."""
    choice_is: Literal["text", "letter"] = later("text")
    """What of a choice is scored: its text, or its letter, from A, with the texts in the question, as MMLU has it."""
    before: str = " "
    """What stands between question and choice."""
    columns: str | None = None
    """Column names of a csv or tsv without a header line, separated by commas."""
    retain: str | dict[str, Any] | None = None
    """Running text (column `text`) on which forgetting is measured, its loss before and after; or several sets: name ->
    running text, or a table with the fields of another task."""

    @classmethod
    def guess(cls, rows: list[Row], model: str) -> dict[str, Any]:
        texts = plain(columns(rows, are_texts))
        lists = columns(rows, are_text_lists)
        choices = called(lists, "choices options endings answers") or ", ".join(numbered(texts))
        answer = called(columns(rows, are_plain), "answer answerkey label correct gold target")
        question = called([name for name in texts if name != answer], "question ctx query prompt premise sentence")
        if not choices or answer is None or question is None:
            return {}
        fields = {"question": f"{{{question}}}", "choices": choices, "answer": answer}
        named = called([name for name in lists if name != choices], "labels label")
        return fields | ({"labels": named} if named else {"answer_is": _answer_is(rows, fields)})

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        if split == "test" and set(labels(rows, "task.answer", self.answer)) <= {None, "-1"}:
            return []
        self._questions(rows)
        return rows

    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> Iterator[Example]:
        """Right choices alone."""
        for choices in self._each(rows, tokenizer, seq_len, only_right=True):
            yield from ({key: example[key] for key in ("input_ids", "labels")} for example in choices)

    def scored(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> Iterator[list[Example]]:
        """The choices of each question. `start` is where a choice's tokens begin; the wrong ones' are no labels."""
        return self._each(rows, tokenizer, seq_len)

    def asked(self, batch: dict[str, Tensor]) -> Tensor:
        """Of wrong choices too, which have no labels."""
        from torch import arange, ones_like
        from torch.nn.functional import pad

        ids = batch["input_ids"]
        is_token = batch.get("attention_mask", ones_like(ids)).bool()
        is_choice = is_token & (arange(ids.shape[1], device=ids.device) >= batch["start"][:, None])
        return pad(ids.masked_fill(~is_choice, IGNORE), (0, 1), value=IGNORE)[:, 1:]

    def score_tokens(self, told: Told, batch: dict[str, Tensor]) -> list[Scored]:
        is_right, num_tokens = (batch["labels"] != IGNORE).any(1), (told.targets != IGNORE).sum(1)
        columns = (batch["number"], is_right, -told.nats.sum(1), num_tokens, batch["characters"], batch["bytes"])
        return [Scored(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]

    def metrics(self, loss: float, scores: list[list[Scored]]) -> dict[str, float | None]:  # type: ignore[override]
        """`loss` is that of the right choices' tokens."""
        questions: list[list[Scored]] = []
        for choice in (choice for batch in scores for choice in batch):
            if choice.number == 0:
                questions.append([])
            questions[-1].append(choice)
        found: dict[str, float | None] = {"loss": loss}
        for name, length in LENGTHS.items():
            chosen = [max(choices, key=lambda choice: choice.log_likelihood / length(choice)) for choices in questions]
            found[name] = sum(choice.is_right for choice in chosen) / len(questions)
        return found

    def _each(self, rows: list[Row], tokenizer: Any, seq_len: int, only_right: bool = False) -> Iterator[list[Example]]:
        start = opening(tokenizer)
        if seq_len <= len(start):
            raise InputError(f"seq_len = {seq_len}: leaves no room behind the tokens that the tokenizer puts in front")
        for count, (row, question) in enumerate(zip(rows, self._questions(rows), strict=True), 1):
            taken = [question.right] if only_right else range(len(question.choices))
            try:
                yield [self._example(question, index, tokenizer, seq_len, start) for index in taken]
            except InputError as error:
                raise InputError(f"task.choices = {show(self.choices)}: {place(row, count)}: {error}") from None

    def _example(self, question: Question, index: int, tokenizer: Any, seq_len: int, start: list[int]) -> Example:
        choice = question.choices[index]
        context, tokens = context_and_continuation(tokenizer, question.text, self.before + choice)
        if start and context[: len(start)] == start:  # a rendered chat template has it
            context = context[len(start) :]
        if not start and not context:
            raise InputError("the question is empty, and the tokenizer has no token that begins or ends a sequence")
        if not tokens:
            raise InputError(f"no token of {shown(choice)} is apart from the question's")
        room = seq_len - len(start) - len(tokens)
        if room < (not start):
            raise InputError(f"{shown(choice)} has {len(tokens)} tokens, for which seq_len = {seq_len} has no room")
        context = [*start, *context[max(0, len(context) - room) :]]
        is_right = index == question.right
        return {
            "input_ids": context + tokens,
            "labels": [IGNORE] * len(context) + (tokens if is_right else [IGNORE] * len(tokens)),
            "number": index,
            "start": len(context),
            "characters": len(choice),
            "bytes": len(choice.encode()),
        }

    def _questions(self, rows: list[Row]) -> list[Question]:
        """InputError with what is wrong of questions and choices, and then of answers."""
        found: list[list[Any]] = []
        problems = []
        for read in (Template("task.question", self.question).fill, self._choices):
            try:
                found.append(read(rows))
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)
        asked, choices = found
        right = self._right(rows, choices)
        if self.choice_is == "letter":
            choices = [list(string.ascii_uppercase[: len(each)]) for each in choices]
        return [Question(*each) for each in zip(asked, choices, right, strict=True)]

    def _choices(self, rows: list[Row]) -> list[list[str]]:
        names = [name.strip() for name in self.choices.split(",")]
        if len(names) == 1 or has_column(rows, self.choices):
            found = lists(rows, "task.choices", self.choices)
        else:
            found = [list(row) for row in zip(*(texts(rows, "task.choices", name) for name in names), strict=True)]
        for count, (row, choices) in enumerate(zip(rows, found, strict=True), 1):
            if len(choices) < 2 or "" in choices:
                problem = "needs two choices or more" if len(choices) < 2 else "has a choice that is empty"
                raise InputError(f"task.choices = {show(self.choices)}: {place(row, count)} {problem}")
            if self.choice_is == "letter" and len(choices) > len(string.ascii_uppercase):
                where = f"{place(row, count)} has {len(choices)} choices, more than there are letters"
                raise InputError(f'task.choice_is = "letter": {where}')
        return found

    def _right(self, rows: list[Row], choices: list[list[str]]) -> list[int]:
        """Indices of the right choices."""
        check_column(rows, "task.answer", self.answer)
        answers = labels(rows, "task.answer", self.answer)
        called = lists(rows, "task.labels", self.labels) if self.labels else map(self._called, choices)
        right = []
        for count, (row, answer, each, names) in enumerate(zip(rows, answers, choices, called, strict=True), 1):
            where = f"task.answer = {show(self.answer)}: {place(row, count)}"
            if answer is None:
                raise InputError(f"{where} has no answer")
            if len(names) != len(each):
                where = f"task.labels = {show(self.labels)}: {place(row, count)}"
                raise InputError(f"{where} has {len(names)} labels, and {len(each)} choices")
            written = self._written(answer)
            if written not in names:
                hint = "" if self.labels else f" (task.answer_is = {show(self.answer_is)})"
                raise InputError(
                    f"{where} is none of its choices{hint}: {shown(answer)}; choices: {clip(', '.join(names))}"
                )
            right.append(names.index(written))
        return right

    def _called(self, choices: list[str]) -> list[str]:
        """What the answer calls the choices."""
        match self.answer_is:
            case "text":
                return [choice.strip() for choice in choices]
            case "letter":
                return list(string.ascii_uppercase[: len(choices)])
        first = FIRST[self.answer_is]
        return [str(number) for number in range(first, first + len(choices))]

    def _written(self, answer: str) -> str:
        if self.labels or self.answer_is == "text":
            return answer
        return answer.upper() if self.answer_is == "letter" else as_class(answer)


def _answer_is(rows: list[Row], fields: dict[str, str]) -> str:
    """The first way of calling the right choice by which all of these rows can be read."""
    for way in ("index", "number", "letter", "text"):
        with contextlib.suppress(InputError):
            MultipleChoice(data="", answer_is=way, **fields)._questions(rows)  # type: ignore[arg-type]
            return way
    return "index"


EXAMPLE = MultipleChoice(data="builtin:questions", before="\n", max_train=8, max_eval=4)
