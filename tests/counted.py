"""How much work a call is, as a number that the machine's load does not change."""

import sys
from collections.abc import Callable


def calls(function: Callable[[], object]) -> int:
    """How many functions are called meanwhile, Python's and C's."""
    found = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found
