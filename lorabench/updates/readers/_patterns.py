"""`rank_pattern` and `alpha_pattern`: numbers for modules by regular expressions, from files that may be hostile.

PEFT's rule (`peft.utils.other.get_pattern_key`): the first that matches a module's name, or its end after a dot.
Patterns that are names, which nearly all are, are looked up; the others have SECONDS together.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from lorabench.config.decode import InputError
from lorabench.config.quote import clip
from lorabench.updates.readers._names import older

SECONDS = 5.0
"""For all regular expressions of one file together."""
COMPARISONS = 20_000_000
"""Of names with patterns that are names."""
LONGEST = 1000
"""Letters of a pattern."""
_NAME = re.compile(r"\^?(?:\\[.-]|[\w.-])*\$?")
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")


class Patterns:
    """The patterns of one field. InputError, with `where`, for what is no regular expression, or takes too long."""

    def __init__(self, patterns: dict[str, Any], where: str):
        self._where = where
        self._values = list(patterns.values())
        self._names: defaultdict[tuple[bool, int], list[tuple[int, str, str]]] = defaultdict(list)
        self._expressions: list[tuple[int, str]] = []
        self._left, self._seconds = COMPARISONS, SECONDS
        for order, pattern in enumerate(patterns):
            self._add(order, pattern)

    def value(self, module: str, default: Any) -> Any:
        """That of the first pattern that matches the module's name, as it is now or was when it was trained."""
        if not self._values:
            return default
        before = older(module)
        found = min(self._matches(module), default=len(self._values))
        found = min([found, *(self._matches(before) if before else ())])
        return self._values[found] if found < len(self._values) else default

    def _add(self, order: int, pattern: str) -> None:
        if _NAME.fullmatch(pattern):
            anchored, bare = pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$")
            marked = re.sub(r"\\([.-])|\.", lambda match: match[1] or "\0", bare)  # \0 stands for any letter
            self._names[anchored, len(marked)].append((order, marked, marked.replace("\0", ".")))
            return
        if len(pattern) > LONGEST:
            raise InputError(f"{self._where}: {clip(pattern)}: has {len(pattern)} letters, {LONGEST} at most")
        if _REPEATED_GROUP.search(pattern):
            raise InputError(f"{self._where}: {clip(pattern)}: a repeated group may take without end to match")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(f"{self._where}: not a regular expression: {clip(pattern)}: {error}") from None
        self._expressions.append((order, pattern))

    def _matches(self, module: str) -> Iterator[int]:
        """Numbers of patterns that match; of expressions, the first alone."""
        first = len(self._values)
        for anchored, end in [(True, module), *((False, end) for end in _ends(module))]:
            patterns = self._names.get((anchored, len(end)), ())
            self._left -= len(patterns)
            if self._left < 0:
                raise InputError(f"{self._where}: {len(self._values)} patterns take too long to match")
            for order, marked, plain in patterns:
                if plain == end or ("\0" in marked and _fits(marked, end)):
                    first = min(first, order)
                    yield order
                    break
        for order, pattern in self._expressions:
            if order > first:
                return
            if self._expression(pattern, module):
                yield order
                return

    def _expression(self, pattern: str, module: str) -> bool:
        import regex  # the standard library's has no time limit

        begin = time.monotonic()
        try:
            return bool(regex.match(rf"(.*\.)?({pattern})$", module, timeout=max(self._seconds, 1e-3)))
        except TimeoutError:
            raise InputError(f"{self._where}: {clip(pattern)}: takes more than {SECONDS:g} s to match") from None
        except regex.error as error:
            raise InputError(f"{self._where}: not a regular expression: {clip(pattern)}: {error}") from None
        finally:
            self._seconds -= time.monotonic() - begin


def _ends(module: str) -> Iterator[str]:
    """A name, and what stands behind each of its dots."""
    yield module
    place = module.find(".")
    while place >= 0:
        yield module[place + 1 :]
        place = module.find(".", place + 1)


def _fits(marked: str, name: str) -> bool:
    return all(letter in ("\0", other) for letter, other in zip(marked, name, strict=True))


class _Same:
    """A dictionary by its identity: one file's is asked for each of its modules."""

    def __init__(self, patterns: dict[str, Any]):
        self.patterns = patterns

    def __hash__(self) -> int:
        return id(self.patterns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.patterns is self.patterns


def patterns_of(config: dict[str, Any], key: str, valid: Callable[[Any], bool], file: Any) -> Patterns:
    """The patterns of a configuration's field. InputError where they are not a table of numbers."""
    patterns = config.get(key)
    return _patterns(_Same(patterns or _NONE), key, valid, str(file))


_NONE: dict[str, Any] = {}


@lru_cache(maxsize=8)
def _patterns(same: _Same, key: str, valid: Callable[[Any], bool], file: str) -> Patterns:
    patterns = same.patterns
    if not isinstance(patterns, dict) or not all(map(valid, patterns.values())):
        raise InputError(f"{file}: {key} = {clip(patterns)}: must give a number for each pattern")
    return Patterns(patterns, f"{file}: {key}")
