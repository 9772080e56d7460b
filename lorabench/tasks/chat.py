"""Chat: conversations through the model's chat template, with the loss on the assistant's turns only."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lorabench.config.decode import InputError, later
from lorabench.config.quote import clip, show, show_path
from lorabench.data.columns import are_messages, called, columns
from lorabench.data.rows_file import Row, place
from lorabench.data.tokens import opening
from lorabench.data.values import check_column, find, shown
from lorabench.models.base_model import builtin_models
from lorabench.spec.task import IGNORE, Example, LanguageModeling

Message = dict[str, Any]
Tokens = tuple[list[int], list[int]]
"""Those of a conversation, and of each whether it is learned, 1 or 0."""
MARKED = r"\{\%-?\s*generation\s*-?\%\}"
"""What marks the assistant's turns in a template, as transformers looks for it."""
ANSWER = "assistant"


@dataclass(frozen=True, kw_only=True)
class Chat(LanguageModeling):
    """A conversation is what the template makes of it: no other special tokens are put in.

    Where the template marks the assistant's turns (`{% generation %}`), what it marks is learned, as transformers has
    it (`return_assistant_tokens_mask`). Else a turn is what its messages add to the prompt for it, with the token that
    ends it and without the spaces behind that: all that is rendered before must not change by it.

    A conversation of more than seq_len tokens is cut from the left, behind what the tokenizer puts before a text; if
    its last turn to be learned is too long by itself, that is cut from the right.
    """

    data: str
    messages: str = "messages"
    """Column that holds a list of objects, with a `role` and a `content` each, or the assistant's `tool_calls`."""
    train_on: Literal["assistant", "last"] = "assistant"
    """All of the assistant's turns, or the last of them."""
    tools: str | None = later(None)
    """Column with a list of the tools (JSON schemas of functions), or its JSON text, for the template to tell of."""
    template: str | None = None
    """A chat template (Jinja) to take in place of the tokenizer's."""
    retain: str | dict[str, Any] | None = None
    """Running text (column `text`) on which forgetting is measured, its loss before and after; or several sets: name ->
    running text, or a table with the fields of another task."""

    @classmethod
    def guess(cls, rows: list[Row], model: str) -> dict[str, Any]:
        names = columns(rows, are_messages)
        template = {"template": EXAMPLE.template} if model in builtin_models() else {}  # which have none of their own
        tools = {"tools": "tools"} if any(row.get("tools") for row in rows) else {}
        return {"messages": called(names, "messages conversation") or names[0]} | tools | template if names else {}

    def usable(self, split: str, rows: list[Row], options: dict[str, Any]) -> list[Row]:
        check_column(rows, "task.messages", self.messages)
        if self.tools is not None:
            check_column(rows, "task.tools", self.tools)
        for count, row in enumerate(rows, 1):
            problem = _problem(find(row, self.messages))
            if problem:
                raise self._wrong(row, count, problem)
            self._tools(row, count)
        return rows

    def examples(self, rows: list[Row], tokenizer: Any, seq_len: int, options: dict[str, Any]) -> Iterator[Example]:
        template, start = self._template(tokenizer), opening(tokenizer)
        if seq_len <= max(1, len(start)):
            raise InputError(f"seq_len = {seq_len}: leaves no room behind the tokens that the tokenizer puts in front")
        for count, row in enumerate(rows, 1):
            try:
                ids, learned = self._tokens(tokenizer, template, find(row, self.messages), self._tools(row, count))
            except InputError as error:
                raise self._wrong(row, count, str(error)) from None
            ids, learned = _cut(ids, learned, seq_len, start)
            if not any(learned[1:]):
                raise self._wrong(row, count, "leaves nothing to predict")
            labels = [token if is_learned else IGNORE for token, is_learned in zip(ids, learned, strict=True)]
            yield {"input_ids": ids, "labels": labels}

    def _template(self, tokenizer: Any) -> str:
        """InputError where there is none, or the tokenizer cannot say which token is of which text."""
        model = f'model = "{show_path(tokenizer.name_or_path)}"'
        if not tokenizer.is_fast:
            raise InputError(f"{model}: its tokenizer is none of the fast ones, which tell where in a text a token is")
        if self.template is None and not tokenizer.chat_template:
            raise InputError(f"{model}: its tokenizer has no chat template; task.template gives one")
        return self.template or tokenizer.get_chat_template(tools=None if self.tools is None else [])

    def _tools(self, row: Row, count: int) -> list[Any] | None:
        """Those that a row names; None where it names none."""
        value = found = None if self.tools is None else find(row, self.tools)
        if isinstance(value, str):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
            where = f"task.tools = {show(self.tools)}: {place(row, count)}"
            raise InputError(f"{where} is no list of tools, each an object: {shown(found)}")
        return value or None

    def _tokens(self, tokenizer: Any, template: str, messages: list[Message], tools: list[Any] | None) -> Tokens:
        find_turns = _marked if re.search(MARKED, template) else _by_prefixes
        ids, learned = find_turns(tokenizer, template, [*map(_without_empty_calls, messages)], tools)
        if self.train_on == "last":
            first, end = _last_turn(learned)
            learned = [int(first <= position < end) for position in range(len(ids))]
        return ids, learned

    def _wrong(self, row: Row, count: int, problem: str) -> InputError:
        return InputError(f"task.messages = {show(self.messages)}: {place(row, count)} {problem}")


def _problem(messages: Any) -> str:
    """What is wrong of a row's messages, nothing where they are well."""
    if messages is None:
        return "has no value"
    if not isinstance(messages, list):
        return f"is a {type(messages).__name__}, and no list of messages: {shown(messages)}"
    for number, message in enumerate(messages, 1):
        calls = isinstance(message, dict) and message.get("role") == ANSWER and message.get("tool_calls")
        if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            return f"has tool_calls that are no list of objects in message {number}: {shown(message)}"
        for key in ("role", "content"):
            if calls and message.get(key) is None:  # what is called says it all
                continue
            value = message.get(key) if isinstance(message, dict) else None
            if not isinstance(value, str):
                return f"has no text as the {key} of message {number}: {shown(message)}"
            if any("\ud800" <= character <= "\udfff" for character in value):
                return f"is no valid Unicode in message {number}: {shown(value)}"
    if not any(message["role"] == ANSWER for message in messages):
        return f'has no message of the role "{ANSWER}"'
    return ""


def _without_empty_calls(message: Message) -> Message:
    """As it is but for `tool_calls` of null, which tables put where other rows have some."""
    if message.get("tool_calls", ()) is not None:
        return message
    return {key: value for key, value in message.items() if key != "tool_calls"}


def _rendered(tokenizer: Any, template: str, messages: list[Message], **options: Any) -> Any:
    """InputError with what the template says of messages that it does not take."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"is refused by the chat template: {clip(error) or type(error).__name__}") from None


def _marked(tokenizer: Any, template: str, messages: list[Message], tools: list[Any] | None) -> Tokens:
    options = {"return_dict": True, "return_assistant_tokens_mask": True, "tools": tools}
    found = _rendered(tokenizer, template, messages, tokenize=True, **options)
    return found["input_ids"], found["assistant_masks"]


def _by_prefixes(tokenizer: Any, template: str, messages: list[Message], tools: list[Any] | None) -> Tokens:
    """Of each turn, what it adds to the prompt for it. InputError where what is before it changes by what follows."""
    render = partial(_rendered, tokenizer, template, tokenize=False, tools=tools)
    whole = render(messages)
    if not whole.isascii() and any("\ud800" <= character <= "\udfff" for character in whole):  # of a call's arguments
        raise InputError("is no valid Unicode")
    ends = tuple(token for token in tokenizer.get_added_vocab() if not token.isspace())
    turns = []
    for number, message in enumerate(messages):
        if message["role"] != ANSWER:
            continue
        if number == 0:
            raise InputError("begins with the assistant's turn, to which the chat template has no prompt")
        before, turn = render(messages[:number], add_generation_prompt=True), render(messages[: number + 1])
        if not (turn.startswith(before) and whole.startswith(turn)):
            why = "is rendered otherwise by the chat template when other messages follow, or when it is asked for"
            raise InputError(
                f"has a message {number + 1} that {why}; {{% generation %}} in task.template can mark turns"
            )
        turns.append((len(before), len(turn.rstrip() if turn.rstrip().endswith(ends) else turn)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    places = encoded["offset_mapping"]
    return encoded["input_ids"], [int(any(a < end and first < b for first, end in turns)) for a, b in places]


def _last_turn(learned: list[int]) -> tuple[int, int]:
    """Where the last unbroken run of learned tokens begins and ends."""
    end = max((place for place, is_learned in enumerate(learned, 1) if is_learned), default=0)
    first = max((place for place in range(1, end) if not learned[place - 1]), default=0)
    return first, end


def _cut(ids: list[int], learned: list[int], seq_len: int, start: list[int]) -> Tokens:
    """At most seq_len tokens, with `start` in front where it was there: the last learned ones, and what is before."""
    if len(ids) <= seq_len:
        return ids, learned
    kept = len(start) if ids[: len(start)] == start else 0
    first, end = _last_turn(learned)
    end = min(end, first + seq_len - max(1, kept))
    taken = [*range(kept), *range(max(kept, end - seq_len + kept), end)]
    return [ids[place] for place in taken], [learned[place] for place in taken]


EXAMPLE = Chat(
    data="builtin:questions",
    template="{% for message in messages %}{{ message['role'] + '\\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}",
    max_train=8,
    max_eval=4,
)
