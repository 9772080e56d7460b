"""Self-contained HTML pages: a template filled in, with its style, its script, its figures and their data inside."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2
from markupsafe import Markup

from lorabench.config.quote import blame
from lorabench.report.typeset import Column
from lorabench.terminal.text import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
Made = TypeVar("Made")
DISPLAY_SCALE = 1.45
"""Inches on the screen per inch in print."""
MOST_BYTES = 300_000
"""Of a drawing with so many lines and points that it is larger, the page has the pixels."""
MOST_ROWS = 200
"""Rows of a table that stand in the HTML; further ones are data, of which the page's script makes rows when asked."""
MOST_LETTERS = 28
"""Letters of a text that stands in one line of its cell; a longer one wraps."""
CONTENTS = "<!--contents-->"
"""Where the list of a page's sections goes; no text has it, for `<` is escaped."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure as it stands in a page: a vector drawing, and the values that are told under the pointer."""

    name: str
    caption: str
    source: str
    """A `data:` URL."""
    inches: float
    values: list[dict[str, Any]]
    """What `hover.values` gives."""
    files: list[Path] = field(default_factory=list)

    @property
    def has_colors(self) -> bool:
        """Whether its colours are values, and stay as they are on a dark page."""
        return any("cells" in panel for panel in self.values)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some tables and figures under a heading: what a command has found, or has kept for a sweep's report."""

    title: str
    text: str = ""
    tables: list[TextTable] = field(default_factory=list)
    figures: list[Drawn] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Broken:
    """What stands in the place of a table or figure that raised."""

    name: str
    error: str


class Attempts:
    """Makes one thing after another: what raises is noted in `errors`, by its name, and the rest is made."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}

    def __call__(self, name: str, make: Callable[[], Made]) -> Made | Broken:
        try:
            return make()
        except Exception as error:  # told on the page, on stderr, and by the exit code
            self.errors[name] = blame(error)
            return Broken(name=name, error=self.errors[name])


def drawn(name: str, caption: str, figure: Figure, files: Sequence[Path] = ()) -> Drawn:
    """A figure for a page, of the same bytes whenever it is the same; it is closed. `files` hold it already."""
    from lorabench.report import drawing, hover

    with drawing.style():
        if files:
            figure.set_layout_engine("none")  # as it was laid out when it was saved: that takes time
        else:
            drawing.wrap_titles(figure)
        source = _saved(figure, "svg", {"Date": None, "Creator": "lorabench"})
        if len(source) > MOST_BYTES:
            source = _saved(figure, "png", {"Software": None})
    drawing.plt.close(figure)
    inches = float(figure.get_figwidth()) * DISPLAY_SCALE
    return Drawn(
        name=name, caption=caption, source=source, inches=inches, values=hover.values(figure), files=[*files]
    )  # fmt: skip


def _saved(figure: Figure, kind: str, metadata: dict[str, Any]) -> str:
    content = io.BytesIO()
    figure.savefig(content, format=kind, metadata=metadata)
    media = "image/svg+xml" if kind == "svg" else f"image/{kind}"
    return f"data:{media};base64,{base64.b64encode(content.getvalue()).decode()}"


def fill(template: str, **values: Any) -> str:
    """The text of a template with its values, which are escaped; the contents list its sections."""
    text = _environment().get_template(template).render(**values)
    sections = re.findall(r'<section id="([\w-]+)">\s*<h2>(.*?)</h2>', text)
    entries = "\n".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in sections)
    return text.replace(CONTENTS, f"<ul>\n{entries}\n</ul>" if entries else "", 1)


def parts_page(title: str, header: Sequence[tuple[str, str]], parts: Sequence[Part]) -> str:
    """A page of these sections; `header` are names and words that stand at its top."""
    return fill("parts.html.j2", title=title, header=header, parts=parts)


def compact(value: Any) -> Markup:
    """JSON that may stand in a `<script>`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Column]:
    """Of cells that are numbers, which stand right, or words."""
    cells = zip(*rows, strict=True) if rows else [()] * len(heads)
    are_numbers = [all(re.match(r"[−+–\d]|$", text) for text in column) for column in cells]
    return [Column(label=head, numeric=numeric) for head, numeric in zip(heads, are_numbers, strict=True)]


@cache
def _environment() -> jinja2.Environment:
    """Which keeps the templates that it has compiled."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    made = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.globals |= {"most_rows": MOST_ROWS, "most_letters": MOST_LETTERS}
    made.filters |= {"compact": compact, "columns": _columns}
    return made
