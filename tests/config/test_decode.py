"""The boundary: every problem of a table at once, each with its key, its value and what is wrong."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given
from hypothesis import strategies as st

from lorabench.config.decode import InputError, Pattern, decode, encode, later
from lorabench.spec.method import Method


@dataclass(frozen=True, kw_only=True)
class Sample:
    count: Annotated[int, Ge(1), Le(9)]
    share: Annotated[float, Gt(0), Lt(1)] = 0.5
    kind: Literal["alpha", "beta"] = "alpha"
    flag: bool = False
    name: Annotated[str, Pattern("[a-z]+", "lower-case letters")] = "a"
    limit: Annotated[float, Gt(0)] | Literal["none"] = "none"
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.flag and self.count == 9:
            raise ValueError("flag = true: not with count = 9\ncount = 9: not with flag = true")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"count": 0}, "x.count = 0: must be at least 1"),
        ({"count": 10}, "x.count = 10: must be at most 9"),
        ({"count": 1.5}, "x.count = 1.5: must be a valid integer"),
        ({"count": True}, "x.count = true: must be a valid integer"),
        ({"count": "1"}, 'x.count = "1": must be a valid integer'),
        ({"share": 0}, "x.share = 0: must be greater than 0"),
        ({"share": 1.0}, "x.share = 1.0: must be less than 1"),
        ({"share": "1e-4"}, 'x.share = "1e-4": must be a valid number'),
        ({"share": math.inf}, "x.share = inf: must be finite"),
        ({"share": math.nan}, "x.share = nan: must be finite"),
        ({"kind": "alpa"}, "x.kind = \"alpa\": unknown value 'alpa'. Did you mean 'alpha'? Choices: alpha, beta"),
        ({"flag": 1}, "x.flag = 1: must be a valid boolean"),
        ({"name": "a1"}, 'x.name = "a1": must be lower-case letters'),
        ({"names": [1]}, "x.names = [1]: must be a valid string"),
        ({"names": "a"}, 'x.names = "a": must be a list'),
        ({"cuont": 1}, "x.cuont = 1: unknown key 'cuont'. Did you mean 'count'?"),
        ({"flag": True, "count": 9}, "x.flag = true: not with count = 9"),
    ],
)
def test_a_problem_names_the_key_the_value_and_the_choices(table: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        decode(Sample, {"count": 1} | table, "x.")
    assert str(error.value).startswith(message)


def test_all_problems_at_once_and_one_line_each() -> None:
    with pytest.raises(InputError) as error:
        decode(Sample, {"share": 2, "kind": 3, "zap": 1})
    assert [line.split(" ")[0] for line in error.value.problems] == ["zap", "count:", "share", "kind"]
    with pytest.raises(InputError) as error:
        decode(Sample, {"flag": True, "count": 9})
    assert len(error.value.problems) == 2


def test_a_union_accepts_either_and_names_both() -> None:
    assert decode(Sample, {"count": 1, "limit": 2}).limit == 2.0
    assert decode(Sample, {"count": 1, "limit": "none"}).limit == "none"
    with pytest.raises(InputError, match=r"limit = -1: must be greater than 0 or .*none"):
        decode(Sample, {"count": 1, "limit": -1})


def test_what_is_no_table_is_said_so() -> None:
    with pytest.raises(InputError, match="must be a table"):
        decode(Sample, [1], "x.")


@pytest.mark.parametrize("table", ["lora", {}, {"name": 3}])
def test_a_plugin_needs_its_name(table: object) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Holder:
        method: "Method"

    Holder.__annotations__["method"] = Method
    with pytest.raises(InputError, match=r"method\.name: is missing\. Choices: adalora, adapter, bitfit"):
        decode(Holder, {"method": table})


@given(
    count=st.integers(1, 9),
    share=st.floats(0, 1, exclude_min=True, exclude_max=True),
    kind=st.sampled_from(["alpha", "beta"]),
    name=st.from_regex("[a-z]{1,5}", fullmatch=True),
    limit=st.one_of(st.just("none"), st.floats(1e-9, 1e9)),
    names=st.lists(st.text(max_size=4), max_size=3),
)
def test_encode_is_the_inverse_of_decode(**table: object) -> None:
    sample = decode(Sample, table)
    assert decode(Sample, encode(sample)) == sample


def test_a_later_field_is_written_only_where_it_is_set():
    @dataclass(frozen=True, kw_only=True)
    class Thing:
        old: int = 1
        new: int | None = later(None)

    assert encode(Thing()) == {"old": 1}
    assert encode(Thing(new=3)) == {"old": 1, "new": 3}
