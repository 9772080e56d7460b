"""Chat: which tokens are learned, beside transformers' own masks, and what of its data is refused."""

from __future__ import annotations

import copy
import json
import random
import re

import pytest
from tokenizers import processors

from lorabench.config.decode import InputError
from lorabench.models.base_model import load_tokenizer
from lorabench.spec.task import IGNORE
from lorabench.store.record import Status
from lorabench.store.store import Store
from lorabench.tasks.chat import Chat
from lorabench.training.execute import Options, execute
from tests.conftest import make_spec

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "It is two."},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Three"},
    {"role": "user", "content": "Thanks."},
]
HEAD = "{{ '<|im_start|>' + message['role'] + '\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = f"{{% for message in messages %}}{HEAD}{{{{ message['content'] + '<|im_end|>' + '\n' }}}}{{% endfor %}}{ASK}"
MARKED = (
    f"{{% for message in messages %}}{HEAD}{{% if message['role'] == 'assistant' %}}{{% generation %}}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    f"{{% endif %}}{{{{ '\n' }}}}{{% endfor %}}{ASK}"
)
"""The same, with the turns marked."""
LAST_ALONE = "{% for message in messages %}{{ message['content'] if loop.last else '-' }}{% endfor %}"
ALTERNATING = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must begin with the user') }}{% endif %}"


def task(**changes) -> Chat:
    return Chat(**({"data": "", "template": MARKED} | changes))


@pytest.fixture(scope="module")
def tokenizer():
    """The built-in one, with the tokens of ChatML."""
    found = copy.deepcopy(load_tokenizer("builtin:tiny-llama"))
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return found


def example_of(tokenizer, messages=TALK, seq_len=512, **fields):
    (example,) = task(**fields).examples([{"messages": messages}], tokenizer, seq_len, {})
    return example


def learned(tokenizer, example) -> list[str]:
    """The texts of the unbroken runs of tokens that are learned."""
    runs, before = [], False
    for token in example["labels"]:
        if token != IGNORE:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = token != IGNORE
    return [tokenizer.decode(run) for run in runs]


def talks(seed: int) -> list[dict[str, str]]:
    """A conversation of some turns, whose texts begin and end in any way."""
    draw = random.Random(seed)
    words = ["yes", " no", "naïve", "中文", "\n", "a b", "", "def f(x):", "<|im_end", "é"]
    text = lambda: "".join(draw.choices(words, k=draw.randint(1, 4)))  # noqa: E731
    turns = [{"role": role, "content": text()} for _ in range(draw.randint(1, 4)) for role in ("user", "assistant")]
    return [{"role": "system", "content": text()}, *turns] if draw.random() < 0.5 else turns


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_those_of_transformers_marked_or_not(seed, tokenizer):
    messages = talks(seed)
    wanted = tokenizer.apply_chat_template(
        messages, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = [
        token if mask else IGNORE
        for token, mask in zip(wanted["input_ids"], wanted["assistant_masks"], strict=True)
    ]  # fmt: skip
    for template in (MARKED, CHATML):
        example = example_of(tokenizer, messages, template=template)
        assert example == {"input_ids": wanted["input_ids"], "labels": labels}, template


WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Wien"}}}
CALLS = [
    {"role": "user", "content": "How is Wien?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains.", "tool_calls": None},
]
TELL = "{% if tools %}{{ 'tools ' + tools | tojson + '\n' }}{% endif %}"
SAID = (
    "{{ message.content or '' }}{% if 'tool_calls' in message %}{% for call in message['tool_calls'] %}"
    "{{ call.function | tojson }}{% endfor %}{% endif %}{{ '<|im_end|>' }}"
)
CALLING = f"{TELL}{{% for message in messages %}}{HEAD}{SAID}{{{{ '\n' }}}}{{% endfor %}}{ASK}"
CALLING_MARKED = (
    f"{TELL}{{% for message in messages %}}{HEAD}{{% if message['role'] == 'assistant' %}}{{% generation %}}{SAID}"
    f"{{% endgeneration %}}{{% else %}}{SAID}{{% endif %}}{{{{ '\n' }}}}{{% endfor %}}{ASK}"
)


@pytest.mark.parametrize("template", [CALLING, CALLING_MARKED])
@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER]), None])
def test_calls_of_tools_are_learned_as_transformers_masks_them(template, tools, tokenizer):
    row = {"messages": CALLS, "tools": tools}
    chat = task(template=template, tools="tools")
    (example,) = chat.examples(chat.usable("train", [row, {"tools": []} | row], {})[:1], tokenizer, 512, {})
    plain = [{key: value for key, value in message.items() if value is not None} for message in CALLS]
    wanted = tokenizer.apply_chat_template(
        plain, chat_template=CALLING_MARKED, tools=[WEATHER] if tools else None, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    assert example["input_ids"] == wanted["input_ids"]
    assert [label != IGNORE for label in example["labels"]] == [mask == 1 for mask in wanted["assistant_masks"]]
    first, second = learned(tokenizer, example)
    assert json.loads(first.removesuffix("<|im_end|>")) == CALL["function"] and second == "It rains.<|im_end|>"
    assert ("tools [" in tokenizer.decode(example["input_ids"])) == bool(tools)


def test_tools_that_are_none_are_told(tokenizer):
    for tools in ("{", {"name": "weather"}, ["weather"], 3):
        with pytest.raises(InputError, match=r'task\.tools = "tools": row 1 is no list of tools, each an object: '):
            task(tools="tools").usable("train", [{"messages": CALLS, "tools": tools}], {})
    with pytest.raises(InputError, match=r'task\.tools = "tool": no such column'):
        task(tools="tool").usable("train", [{"messages": CALLS, "tools": []}], {})
    call = {"function": CALL["function"] | {"arguments": {"city": "\ud800"}}}
    for template in (CALLING, CALLING_MARKED):
        with pytest.raises(InputError, match="row 1 is"):
            example_of(tokenizer, [CALLS[0], {"role": "assistant", "tool_calls": [call]}], template=template)
    wrong = [CALLS[0], {"role": "assistant", "tool_calls": "weather"}]
    with pytest.raises(InputError, match="has tool_calls that are no list of objects in message 2"):
        task().usable("train", [{"messages": wrong}], {})


@pytest.mark.parametrize("template", [MARKED, CHATML])
def test_the_assistants_turns_are_learned_with_their_end(template, tokenizer):
    example = example_of(tokenizer, template=template)
    assert learned(tokenizer, example) == ["It is two.<|im_end|>", "Three<|im_end|>"]
    assert learned(tokenizer, example_of(tokenizer, template=template, train_on="last")) == ["Three<|im_end|>"]


def test_the_tokenizers_own_template_is_the_usual_one(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = MARKED
    assert example_of(own, template=None) == example_of(tokenizer)
    with pytest.raises(InputError, match=r'model = ".*tiny-llama": its tokenizer has no chat template; task.template'):
        example_of(tokenizer, template=None)


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("seq_len", [2, 3, 4, 7, 12, 25, 40, 55, 90])
def test_a_long_conversation_ends_with_its_last_answer(seq_len, train_on, tokenizer):
    whole, example = example_of(tokenizer), example_of(tokenizer, seq_len=seq_len, train_on=train_on)
    assert len(example["input_ids"]) == len(example["labels"]) == min(seq_len, len(whole["input_ids"]))
    last = learned(tokenizer, example)[-1]
    assert "Three<|im_end|>".startswith(last) and (last == "Three<|im_end|>" or example["labels"][0] == IGNORE)
    text, part = tokenizer.decode(whole["input_ids"]), tokenizer.decode(example["input_ids"])
    assert part in text


@pytest.mark.parametrize("seq_len", [3, 9, 20])
def test_what_begins_a_sequence_stays(seq_len, tokenizer):
    begun = "{{ bos_token }}" + MARKED
    example = example_of(begins(tokenizer), template=begun, seq_len=seq_len)
    assert (
        example["input_ids"].count(tokenizer.bos_token_id) == 1 == (example["input_ids"][0] == tokenizer.bos_token_id)
    )
    assert len(example["input_ids"]) == seq_len


def begins(tokenizer):
    found = copy.deepcopy(tokenizer)
    special = [(found.bos_token, found.bos_token_id)]
    found._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{found.bos_token} $A", special_tokens=special
    )
    return found


@pytest.mark.parametrize(
    ("messages", "fields", "problem"),
    [
        (None, {}, "row 1 has no value"),
        ("hello", {}, 'row 1 is a str, and no list of messages: "hello"'),
        ([TALK[1], "hello"], {}, 'row 1 has no text as the role of message 2: "hello"'),
        ([{"role": "user"}], {}, "row 1 has no text as the content of message 1: {'role': 'user'}"),
        ([{"role": "user", "content": ["a"]}], {}, "row 1 has no text as the content of message 1"),
        (TALK[:2], {}, 'row 1 has no message of the role "assistant"'),
        ([], {}, 'row 1 has no message of the role "assistant"'),
        (TALK, {"template": LAST_ALONE}, "row 1 has a message 3 that is rendered otherwise by the chat template"),
        (TALK, {"template": ALTERNATING}, "row 1 is refused by the chat template: must begin with the user"),
        (TALK, {"template": "{{"}, "row 1 is refused by the chat template: "),
        (TALK[2:], {"template": CHATML}, "row 1 begins with the assistant's turn"),
        ([{"role": "user", "content": "\ud800"}], {}, "row 1 is no valid Unicode in message 1"),
    ],
)
def test_what_is_wrong_of_a_row_is_told(messages, fields, problem, tokenizer):
    rows = [{"messages": messages}, {"messages": TALK}]
    with pytest.raises(InputError, match=re.escape(f'task.messages = "messages": {problem}')):
        list(task(**fields).examples(task(**fields).usable("train", rows, {}), tokenizer, 64, {}))


def test_a_run_learns_from_conversations(tmp_path):
    """Whatever is asked, the answer is one."""
    for split, count in {"train": 32, "validation": 8, "test": 8}.items():
        rows = [{"messages": [{"role": "user", "content": f"{i}?"}, TALK[4]]} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = {"name": "chat", "data": str(tmp_path), "template": CHATML}
    spec, store = make_spec(task=chat, steps=30, lr=1e-2, seq_len=64, batch_size=4), Store(tmp_path / "results")
    assert execute(spec, store, Options(device="cpu", log_to_file=False)) == Status.DONE
    measures = store.read(spec.id).measures
    assert measures["valid_loss"] < 0.5 * measures["base_valid_loss"] and measures["test_token_accuracy"] > 0.8
