"""Self-contained HTML pages: a template filled in, with its style and its figures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2

from lorabench.config.quote import blame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
Made = TypeVar("Made")
DISPLAY_SCALE = 1.45
"""Inches on the screen per inch in print."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure as it stands in a page."""

    name: str
    caption: str
    png: str
    """Base64."""
    inches: float
    files: list[Path] = field(default_factory=list)


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


def picture(name: str, caption: str, png: bytes, inches: float, files: Sequence[Path] = ()) -> Drawn:
    """`inches` wide in print."""
    text = base64.b64encode(png).decode()
    return Drawn(name=name, caption=caption, png=text, inches=inches * DISPLAY_SCALE, files=[*files])


def embedded(name: str, caption: str, figure: Figure) -> Drawn:
    """A figure that goes into the page alone; it is closed."""
    from lorabench.report import drawing

    content = io.BytesIO()
    with drawing.style():
        drawing.wrap_titles(figure)
        figure.savefig(content, format="png", metadata={"Software": None})
    drawing.plt.close(figure)
    return picture(name, caption, content.getvalue(), float(figure.get_figwidth()))


def fill(template: str, **values: Any) -> str:
    """The text of a template with its values, which are escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> jinja2.Environment:
    """Which keeps the templates that it has compiled."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
