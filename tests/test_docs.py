"""The documentation says what the code does: its tables are made from it, its links lead somewhere.

Run as a script, this writes the tables that are made: `python -m tests.test_docs`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

from lorabench.config import plugins
from lorabench.spec.measures import MEASURES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def table(*heads: str, rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def measures() -> Iterator[str]:
    for group, names in groupby(MEASURES, key=lambda name: MEASURES[name].group):
        rows = [(f"`{name}`", MEASURES[name].unit, MEASURES[name].text) for name in names]
        yield f"### {group.capitalize()}\n\n" + table("measure", "unit", "what it is", rows=rows)


def metrics() -> Iterator[str]:
    for name in plugins.names("analyses"):
        known = plugins.plugin_class("analyses", name).metrics
        if known:
            yield f"### `{name}`\n\n" + table("metric", "what it is", rows=[(f"`{k}`", v) for k, v in known.items()])


MADE: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "measures": ("measures.md", measures),
    "metrics": ("analyses.md", metrics),
}
"""Mark in a page -> the page, and what stands between the mark and `<!-- end -->`."""


def filled(mark: str) -> tuple[Path, str, str]:
    """The page, its text, and what it would be if made now."""
    name, make = MADE[mark]
    page = ROOT / "docs" / name
    text = page.read_text()
    head, rest = text.split(f"<!-- {mark} -->\n")
    tail = rest.partition("<!-- end -->")[2]
    return page, text, head + f"<!-- {mark} -->\n\n" + "\n\n".join(make()) + "\n\n<!-- end -->" + tail


@pytest.mark.parametrize("mark", MADE)
def test_tables_are_what_the_code_says(mark: str) -> None:
    _, text, wanted = filled(mark)
    assert text == wanted, "write it anew: python -m tests.test_docs"


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub has them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    for link in [link for link in links if not link.startswith("http")]:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_each_page_is_in_the_list_of_pages() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} == set(
        re.findall(r"\[(\w+\.md)\]\(\1\)", index)
    )


if __name__ == "__main__":
    for mark in MADE:
        page, _, wanted = filled(mark)
        page.write_text(wanted)
