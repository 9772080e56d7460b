"""Make the sums and differences of `builtin:arithmetic`: `python -m lorabench.data.builtin.arithmetic`.

Nothing is read: the seed alone decides, so that each run writes the same bytes.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from lorabench.data.builtin.collect import write_made

SEED = 0
SIZES = {"train": 4000, "validation": 200, "test": 400}
NUMBERS = range(10, 100)
"""Both numbers of a problem have two digits."""


class Problem(NamedTuple):
    """`a + b`, or `a - b` with a result of 0 or more."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b


class Exercise(NamedTuple):
    """One line of the files: what the model is given, what it is to write, and the number at the end of that."""

    prompt: str
    response: str
    answer: str


def problems() -> Iterator[Problem]:
    """All there are, each sum once (a + b and b + a are one problem).

    Those with two zeros in a row (a result of 100) are left out: `00` is one token of `builtin:tiny-llama`, where
    every other digit is a token of its own.
    """
    found = (Problem(a, sign, b) for a in NUMBERS for b in NUMBERS if b <= a for sign in "+-")
    return (problem for problem in found if "00" not in str(problem.result))


def columns(problem: Problem) -> Iterator[str]:
    """The units, then the tens: the two digits and what is carried in, then what is carried out and the digit.

    `7+8+0=1:5` is 7 + 8 + 0 = 15: 5, carry 1. `2-7-0=1:5` is 2 - 7 - 0 = 5 - 10: 5, borrow 1.
    """
    sign, carry = problem.sign, 0
    for upper, lower in zip(reversed(str(problem.a)), reversed(str(problem.b)), strict=True):
        given = f"{upper}{sign}{lower}{sign}{carry}"
        change = int(lower) + carry
        value = int(upper) + (change if sign == "+" else -change)
        carry = abs(value // 10)
        yield f"{given}={carry}:{value % 10}\n"


def exercise(problem: Problem) -> Exercise:
    """The problem as text, worked column by column; the result stands behind the last equals sign."""
    prompt = f"{problem.a}{problem.sign}{problem.b}\n"
    return Exercise(prompt, "".join(columns(problem)) + f"={problem.result}", str(problem.result))


def make(seed: int = SEED) -> dict[str, list[Exercise]]:
    """The exercises of each split, drawn without replacement from all problems; half the sums with a and b swapped."""
    draw = random.Random(seed)
    drawn = iter(draw.sample(list(problems()), sum(SIZES.values())))
    return {split: [exercise(_either_way(next(drawn), draw)) for _ in range(size)] for split, size in SIZES.items()}


def _either_way(problem: Problem, draw: random.Random) -> Problem:
    a, sign, b = problem
    return Problem(b, sign, a) if sign == "+" and draw.random() < 0.5 else problem


if __name__ == "__main__":
    write_made("arithmetic", make(), __doc__.splitlines()[0])
