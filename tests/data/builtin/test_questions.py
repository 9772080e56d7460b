import re
import tomllib
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare
from transformers import AutoTokenizer

from lorabench.data.builtin import arithmetic, questions
from lorabench.data.builtin.collect import HERE, jsonl_gz
from lorabench.data.builtin.questions import Question
from lorabench.data.dataset import read_data
from lorabench.spec.new_sweep import new_sweep
from lorabench.spec.sweep import parse_sweep
from lorabench.tasks.chat import EXAMPLE


@pytest.fixture(scope="module")
def every_split() -> dict[str, list[Question]]:
    splits = read_data("builtin:questions").splits
    return {split: [Question(**row) for row in rows] for split, rows in splits.items()}


@pytest.fixture(scope="module")
def asked(every_split) -> list[Question]:
    return [question for part in every_split.values() for question in part]


def test_made_again_it_has_the_same_bytes():
    for split, made in questions.make().items():
        assert jsonl_gz(made) == (HERE / "questions" / f"{split}.jsonl.gz").read_bytes()


def test_problems_are_those_of_arithmetic_split_by_split(every_split):
    exercises = arithmetic.make()
    assert {split: len(part) for split, part in every_split.items()} == questions.SIZES
    for split, part in every_split.items():
        assert [each.question + "\n" for each in part] == [each.prompt for each in exercises[split][: len(part)]]


def test_one_choice_is_right_and_the_others_are_wrong_by_a_digit_or_two(asked):
    for question in asked:
        digits = []
        for index, choice in enumerate(question.choices):
            units, tens, result = choice.split("\n")
            shown, carried = int(tens[-1] + units[-1]), int(tens[-3])
            assert result == f"={100 * carried + shown}"  # a difference borrows nothing at its tens
            assert (result == f"={eval(question.question)}") == (index == question.answer)
            digits.append((units, tens))
        assert len(set(digits)) == 4 and [len(set(column)) for column in zip(*digits, strict=True)] == [2, 2]


def test_neither_place_nor_size_tells_which_choice_is_right(asked):
    results = [[int(choice.rpartition("=")[2]) for choice in question.choices] for question in asked]
    ranks = [sorted(each).index(each[q.answer]) for each, q in zip(results, asked, strict=True)]
    for found in (ranks, [question.answer for question in asked]):
        counts = Counter(found)
        assert chisquare([counts[place] for place in range(4)]).pvalue > 0.01


def test_labels_and_scores_are_those_of_the_numbers(asked):
    for question in asked:
        a, sign, b = re.fullmatch(r"(\d\d)([+-])(\d\d)", question.question).groups()
        if sign == "+":
            units = int(a[1]) + int(b[1]) > 9
            tens = int(a) + int(b) > 99
        else:
            units, tens = int(a[1]) < int(b[1]), False
        label = "both" if units and tens else "units" if units else "tens" if tens else "none"
        assert question.label == label
        assert question.score == pytest.approx(5 - 5 * abs(int(a) - int(b)) / 89, abs=0.005)
    assert max(Counter(question.label for question in asked).values()) < 0.5 * len(asked)
    assert np.std([question.score for question in asked]) > 1


def test_the_assistant_works_it_out_and_says_what_carries(every_split):
    for part in every_split.values():
        for question in part:
            (_, asks), (_, answers), *more = (tuple(message.values()) for message in question.messages)
            assert asks == question.question and answers == question.choices[question.answer]
            assert more in ([], [("user", "carries?"), ("assistant", question.label)])
        assert 0.4 < sum(len(question.messages) == 4 for question in part) / len(part) < 0.6


def test_each_character_of_a_sum_is_a_token_and_a_whole_chat_is_short(asked):
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
    texts = [f"{question.question}\n{choice}" for question in asked for choice in question.choices]
    assert all(len(ids) == len(text) for ids, text in zip(tokenizer(texts)["input_ids"], texts, strict=True))
    talks = [question.messages for question in asked]
    rendered = tokenizer.apply_chat_template(talks, chat_template=EXAMPLE.template, tokenize=False)
    assert max(map(len, tokenizer(rendered)["input_ids"])) < 64


@pytest.mark.parametrize("name", ["chat", "classification", "multiple_choice", "regression"])
def test_without_data_a_new_sweep_of_the_task_is_about_them_and_can_use_all(name, every_split):
    task = parse_sweep(tomllib.loads(new_sweep(name, None, None))).runs[0].task
    assert (task.name, task.data) == (name, "builtin:questions")
    for split, rows in read_data(task.data).splits.items():
        assert len(task.usable(split, rows, {})) == len(every_split[split])
