"""Self-contained HTML pages: a template filled in, with its style and its figures inside."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
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


def picture(name: str, caption: str, png: bytes, inches: float) -> Drawn:
    """`inches` wide in print."""
    return Drawn(name=name, caption=caption, png=base64.b64encode(png).decode(), inches=inches * DISPLAY_SCALE)


def embedded(name: str, caption: str, figure: Figure) -> Drawn:
    """A figure that goes into the page alone; it is closed."""
    from lorabench import drawing

    content = io.BytesIO()
    with drawing.style():
        figure.savefig(content, format="png", metadata={"Software": None})
    drawing.plt.close(figure)
    return picture(name, caption, content.getvalue(), float(figure.get_figwidth()))


def fill(template: str, **values: Any) -> str:
    """The text of a template with its values, which are escaped."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)
