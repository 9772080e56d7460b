"""Make `builtin:questions`, what four tasks ask about a sum: `python -m lorabench.data.builtin.questions`.

The problems are those of `builtin:arithmetic`, split by split. Nothing is read: the seed alone decides, so that each
run writes the same bytes.
"""

import random
import re
from typing import NamedTuple

from lorabench.data.builtin import arithmetic
from lorabench.data.builtin.arithmetic import Exercise, Problem, columns
from lorabench.data.builtin.collect import write_made

SEED = 0
SIZES = {"train": 2000, "validation": 200, "test": 400}
CARRIED = {(False, False): "none", (True, False): "units", (False, True): "tens", (True, True): "both"}
"""Whether units and tens carry, or borrow -> the label."""
BEST = 5.0
"""The score of two equal numbers, as of two sentences of one meaning in STS-B."""
FARTHEST = 89
"""Between two numbers of two digits."""


class Question(NamedTuple):
    """One line of the files."""

    question: str
    """`82-47`."""
    label: str
    """Which of the columns carries, for `classification`."""
    score: float
    """How near the two numbers are, from 0 to 5, for `regression`."""
    choices: list[str]
    """Four worked answers, for `multiple_choice`: units and tens are each right or wrong."""
    answer: int
    """The index of the one in which both are right."""
    messages: list[dict[str, str]]
    """A user asks and an assistant works it out, for `chat`; in half of them the user asks once more."""


def problem(exercise: Exercise) -> Problem:
    a, sign, b = re.split(r"([+-])", exercise.prompt.strip())
    return Problem(int(a), sign, int(b))


def label(lines: list[str]) -> str:
    """Of the worked columns, `7+8+0=1:5`."""
    units, tens = ("=1:" in line for line in lines)
    return CARRIED[units, tens]


def score(problem: Problem) -> float:
    return round(BEST * (1 - abs(problem.a - problem.b) / FARTHEST), 2)


def choices(lines: list[str], alike: list[list[str]], draw: random.Random) -> list[str]:
    """The right answer first, then one with the units wrong, the tens, and both: what is carried is right in all.

    Of each column there are two digits, and each stands in two of the answers. Wrong ones are another problem's of the
    same sign (`alike`), so that they are large or small as often as right ones. None has two zeros in a row, one token
    of `builtin:tiny-llama`.
    """
    while True:
        wrong = [line[:-2] + other[-2:] for line, other in zip(lines, draw.choice(alike), strict=True)]
        found = [_answer(units, tens) for tens in (lines[1], wrong[1]) for units in (lines[0], wrong[0])]
        if len(set(found)) == len(found) and not any("00" in answer for answer in found):
            return found


def _answer(units: str, tens: str) -> str:
    """Both columns, and the number that they make up with what the tens carry."""
    return f"{units}{tens}={int(tens[-4] + tens[-2] + units[-2])}"


def talk(exercise: Exercise, lines: list[str], asks_again: bool) -> list[dict[str, str]]:
    turns = [("user", exercise.prompt.strip()), ("assistant", exercise.response)]
    if asks_again:
        turns += [("user", "carries?"), ("assistant", label(lines))]
    return [{"role": role, "content": content} for role, content in turns]


def question(exercise: Exercise, alike: dict[str, list[list[str]]], draw: random.Random) -> Question:
    """`alike`: the worked columns of all problems, by their sign."""
    asked = problem(exercise)
    lines = list(columns(asked))
    answers = choices(lines, alike[asked.sign], draw)
    draw.shuffle(answers)
    return Question(
        question=exercise.prompt.strip(),
        label=label(lines),
        score=score(asked),
        choices=answers,
        answer=answers.index(exercise.response),
        messages=talk(exercise, lines, draw.random() < 0.5),
    )


def make(seed: int = SEED) -> dict[str, list[Question]]:
    """The questions of each split, on the first problems of that split of `builtin:arithmetic`."""
    draw = random.Random(seed)
    exercises = arithmetic.make()
    alike: dict[str, list[list[str]]] = {"+": [], "-": []}
    for each in arithmetic.problems():
        alike[each.sign].append(list(columns(each)))
    return {split: [question(each, alike, draw) for each in exercises[split][:size]] for split, size in SIZES.items()}


if __name__ == "__main__":
    write_made("questions", make(), __doc__.splitlines()[0])
