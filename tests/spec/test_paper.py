"""What a sweep's [paper] section may say, and the shipped sweeps that repeat a paper."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from lorabench.config.decode import InputError
from lorabench.data.dataset import builtin_data
from lorabench.models.base_model import builtin_models
from lorabench.spec.sweep import Sweep, parse_sweep, read_sweep
from tests.conftest import BASE

ROOT = Path(__file__).parents[2] / "sweeps" / "paper"
SMALL, FULL = (sorted((ROOT / size).glob("*.toml")) for size in ("small", "full"))
TEXT = (
    BASE
    + """
method.name = "lora"
method.rank = [1, 2]
[[table]]
rows = ["method.rank"]
value = "valid_loss"
[[figure]]
name = "rank_quality"
[[figure]]
name = "rank_quality"
[[claim]]
says = "so it is"
measure = "valid_loss"
at_most = 1
reported = "Table 1"
[paper]
title = "A paper"
source = "Someone 2024"
[[paper.reports]]
item = "Table 1"
says = "Rank helps."
numbers = [["rank", "accuracy"], [1, 70.5], ["two", 71]]
shown_by = ["valid_loss", "rank_quality_2"]
"""
)


def parsed(text: str) -> Sweep:
    return parse_sweep(tomllib.loads(text), text)


def test_a_paper_reports_words_and_numbers_of_what_the_sweep_shows() -> None:
    paper = parsed(TEXT).paper
    assert paper is not None and (paper.title, paper.source) == ("A paper", "Someone 2024")
    (item,) = paper.reports
    assert item.heads == ["rank", "accuracy"] and item.rows == [["1", "70.5"], ["two", "71"]]
    assert paper.beside("rank_quality_2") == [item] and paper.beside("rank_quality") == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"Table 1"\n[paper]', '"Table 2"\n[paper]', "claim 1: reported = \"Table 2\": unknown item of paper.reports"),
        ('"rank_quality_2"', '"rank_quality_3"', 'paper.reports "Table 1": shown_by = "rank_quality_3": unknown table'),
        ('title = "A paper"', 'title = " "', 'title = "": needs some words'),
        ('title = "A paper"\n', "", "title: is missing"),
        ("[1, 70.5]", "[1]", "numbers: must be a row of heads and one or more rows of as many cells"),
        ('says = "Rank helps."', "says = 1", "says = 1: must be a"),
        ('item = "Table 1"', 'items = "Table 1"', "unknown key 'items'"),
        ("[[paper.reports]]", '[[paper.reports]]\nitem = "Table 1"\nsays = "so"\n[[paper.reports]]', "there twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(old: str, new: str, problem: str) -> None:
    assert old in TEXT
    with pytest.raises(InputError) as error:
        parsed(TEXT.replace(old, new))
    assert any(problem in each for each in error.value.problems), error.value.problems


AT = BASE + 'method.name = "lora"\nmethod.rank = [1, 2]\n[[claim]]\nsays = "so"\nat_most = 1\n'


@pytest.mark.parametrize(
    ("claim", "problem"),
    [
        ('measure = "subspace.phi"', "subspace.phi"),
        ('measure = "subspace.ph"\nat = { i = 1 }', "subspace.phi"),
        ('measure = "subspace.phi"\nat = { q = 1 }', 'claim 1: at = "q": unknown key'),
        ('measure = "intruders.count"\nat = { value_a = 1 }', 'claim 1: at = "value_a": unknown key'),
        (
            'measure = "subspace.phi"\nat = { i = 1 }\nminus = { at = { kk = 1 } }',
            'claim 1: minus.at = "kk": unknown key',
        ),
        ('measure = "subspace.phi"\nat = { i = 1 }\nminus = {}', "are the runs that these are held against"),
        ('measure = "peak_gib"\nat = { i = 1 }\ncounted_on = "bert-base"', "not beside counted_on"),
    ],
)
def test_a_place_that_no_analysis_has_is_told(claim: str, problem: str) -> None:
    with pytest.raises(InputError) as error:
        parsed(AT + claim)
    assert any(problem in each for each in error.value.problems), error.value.problems


def test_places_are_read_and_the_other_side_says_what_differs() -> None:
    text = (
        AT
        + 'measure = "subspace.phi"\nat = { i = 1, j = 1 }\nminus = { measure = "subspace.phi:null", at = { j = 2 } }'
    )
    (claim,) = parsed(text).claims
    assert claim.places == {"where": {"i": 1, "j": 1}, "minus": {"i": 1, "j": 2}}
    assert claim.sides == {"where": {}, "minus": {}}


def test_each_small_one_has_a_full_one() -> None:
    assert [file.name for file in SMALL] == [file.name for file in FULL] and SMALL


@pytest.mark.parametrize("file", [*SMALL, *FULL], ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_shipped_one_says_what_the_paper_found_and_puts_it_to_the_test(file: Path) -> None:
    sweep = read_sweep(file)
    assert sweep.name == f"{file.stem}-{file.parent.name}", "else both would stand in one folder"
    assert sweep.paper is not None and "# Source:" in sweep.text and "# Found there:" in sweep.text
    for item in sweep.paper.reports:
        assert item.shown_by and any(claim.reported == item.item for claim in sweep.claims), item.item
    is_built_in = {run.model in builtin_models() and run.task.data in builtin_data() for run in sweep.runs}
    assert is_built_in == {file in SMALL}
    if file in FULL:
        small = read_sweep(ROOT / "small" / file.name)
        assert small.paper == sweep.paper or (small.paper and (small.paper.title == sweep.paper.title))
