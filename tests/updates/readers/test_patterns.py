"""Patterns for modules, against PEFT's own rule; and such as would take without end."""

import random
import time

import pytest
from peft.utils.other import get_pattern_key

from lorabench.config.decode import InputError
from lorabench.updates.readers._patterns import Patterns
from tests.counted import calls

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
MODULES = [f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in PARTS] + ["lm_head", "lm.head", "q_proj"]
PIECES = ["model", "layers", "0", "1", "self_attn", "q_proj", "k_proj", "lm", "head", "_", ".", r"\.", "^", "$", r"\d",
          ".*", "|", "(0|1)", "[01]", "q_pro", "proj", "X?", r"\-", "+"]  # fmt: skip


def test_the_first_that_matches_as_in_peft():
    """Of random patterns made of names, their parts and expressions."""
    generator = random.Random(0)
    tried = 0
    while tried < 400:
        keys = ["".join(generator.choices(PIECES, k=generator.randint(1, 4))) for _ in range(3)]
        keys += [generator.choice(MODULES).replace(".", generator.choice([".", r"\."]))[generator.randint(0, 9) :]]
        generator.shuffle(keys)
        table = dict.fromkeys(keys)
        table.update({key: number for number, key in enumerate(table)})
        try:
            ours = Patterns(table, "x")
            expected = [table.get(get_pattern_key(table, module)) for module in MODULES]
        except Exception:  # no regular expressions
            continue
        tried += 1
        assert [ours.value(module, None) for module in MODULES] == expected, keys


def test_thousands_of_names_are_looked_up():
    """None is refused for its comparisons, and the calls grow with their number, not with its square."""

    def work(layers: int) -> int:
        names = [rf"^model\.layers\.{i}\.mlp\.experts\.{e}\.down_proj" for i in range(layers) for e in range(100)]
        patterns = Patterns({name: number for number, name in enumerate(names)}, "x")
        modules = [name.replace("\\", "").removeprefix("^") for name in names]
        found: list[int] = []
        done = calls(lambda: found.extend(patterns.value(module, None) for module in modules))
        assert found == list(range(len(names)))
        return done

    few, many = work(10), work(50)
    assert many < 5.5 * few


HOSTILE = {
    "(a|a|ab|b)" * 40 + "[xy]": "takes more than",
    "a" * 2000 + "*": "letters, 1000 at most",
    "(a+)+b": "repeated group",
    "q_proj(": "not a regular expression",
}


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_take_without_end(pattern, monkeypatch):
    monkeypatch.setattr("lorabench.updates.readers._patterns.SECONDS", 0.2)
    begin = time.monotonic()
    with pytest.raises(InputError, match=HOSTILE[pattern]) as caught:
        Patterns({pattern: 1}, "x").value("ab" * 100, None)
    assert time.monotonic() - begin < 60 and len(str(caught.value)) < 300


def test_too_many_names(monkeypatch):
    monkeypatch.setattr("lorabench.updates.readers._patterns.COMPARISONS", 1000)
    patterns = Patterns({f"layer.{i:05}": 1 for i in range(600)}, "x")
    with pytest.raises(InputError, match="600 patterns take too long"):
        [patterns.value("model.layer.no_00", None) for _ in range(2)]
