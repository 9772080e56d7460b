import gzip
import json
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from lorabench.data.builtin import arithmetic
from lorabench.data.builtin.arithmetic import Exercise, Problem
from lorabench.data.builtin.collect import HERE, SPLITS, jsonl_gz
from lorabench.data.dataset import read_data


@pytest.fixture(scope="module")
def every_split() -> dict[str, list[Exercise]]:
    splits = read_data("builtin:arithmetic").splits
    return {split: [Exercise(**row) for row in rows] for split, rows in splits.items()}


@pytest.fixture(scope="module")
def exercises(every_split) -> list[Exercise]:
    return [exercise for part in every_split.values() for exercise in part]


def sorted_problem(exercise: Exercise) -> tuple[int, str, int]:
    """What it asks, read off the prompt; of a sum the larger number first."""
    a, sign, b = re.fullmatch(r"(\d\d)([+-])(\d\d)\n", exercise.prompt).groups()
    return (int(a), sign, int(b)) if sign == "-" else (max(int(a), int(b)), sign, min(int(a), int(b)))


def test_made_again_it_has_the_same_bytes():
    for split, made in arithmetic.make().items():
        file = HERE / "arithmetic" / f"{split}.jsonl.gz"
        assert jsonl_gz(made) == file.read_bytes()
        assert [Exercise(**json.loads(line)) for line in gzip.decompress(file.read_bytes()).splitlines()] == made


def test_another_seed_makes_other_exercises():
    assert arithmetic.make(seed=1) != arithmetic.make()


def test_files_are_small_and_splits_have_their_sizes(every_split):
    assert sum(file.stat().st_size for file in (HERE / "arithmetic").iterdir()) < 300_000
    assert {split: len(part) for split, part in every_split.items()} == arithmetic.SIZES
    assert tuple(arithmetic.SIZES) == SPLITS


def test_no_problem_stands_twice(exercises):
    found = [sorted_problem(exercise) for exercise in exercises]
    assert len(set(found)) == len(found)


def test_every_column_and_every_result_is_right(exercises):
    """By the places' values: a column's digit and ten times its carry make up what the column adds or takes away."""
    for prompt, response, answer in exercises:
        result = eval(prompt)
        *lines, last = response.split("\n")
        sign = 1 if "+" in prompt else -1
        carry, total = 0, 0
        for place, line in enumerate(lines):
            upper, lower, carried, out, digit = map(int, re.split(r"[-+=:]", line))
            assert carried == carry
            assert upper + sign * (lower + carried) == digit + sign * 10 * out
            assert 0 <= digit <= 9
            carry, total = out, total + digit * 10**place
        numbers = [(line[0], line[2]) for line in lines]
        assert prompt.strip() == "+-"[sign < 0].join("".join(digits) for digits in zip(*reversed(numbers), strict=True))
        assert result == total + 100 * carry >= 0
        assert last == f"={result}" and answer == str(result)


def test_the_answer_is_the_last_number_behind_an_equals_sign(exercises):
    assert all(re.findall(r"=(-?\d+)", exercise.response)[-1] == exercise.answer for exercise in exercises)


def test_each_character_is_a_token(exercises):
    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
    texts = [exercise.prompt + exercise.response for exercise in exercises]
    assert all(len(ids) == len(text) for ids, text in zip(tokenizer(texts)["input_ids"], texts, strict=True))
    assert max(map(len, texts)) < 64


def test_sums_and_differences_with_and_without_a_carry(every_split):
    for part in every_split.values():
        kinds = Counter(("+" in exercise.prompt, "=1:" in exercise.response) for exercise in part)
        assert len(kinds) == 4
        assert min(kinds.values()) > 0.05 * len(part)


@pytest.mark.parametrize(
    ("problem", "response"),
    [
        (Problem(47, "+", 38), "7+8+0=1:5\n4+3+1=0:8\n=85"),
        (Problem(82, "-", 47), "2-7-0=1:5\n8-4-1=0:3\n=35"),
        (Problem(96, "+", 50), "6+0+0=0:6\n9+5+0=1:4\n=146"),
        (Problem(20, "-", 20), "0-0-0=0:0\n2-2-0=0:0\n=0"),
    ],
)
def test_exercise(problem, response):
    assert arithmetic.exercise(problem).response == response


def test_problems_are_all_there_are_but_one_hundred():
    found = list(arithmetic.problems())
    assert len(set(found)) == len(found) == 2 * 90 * 91 // 2 - 41
    assert not any(problem.result == 100 for problem in found)
