"""A finished table as Markdown, LaTeX and HTML-ready rows. Cells are plain text; each format escapes them."""

from __future__ import annotations

import itertools
import re
import unicodedata
from dataclasses import dataclass, field

import pandas as pd

from lorabench.terminal.text import one_line

TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "`": r"\textasciigrave{}",
    "[": "{[}", "*": "{*}", "–": "--", "—": "---", "…": r"\dots{}",
}  # fmt: skip
"""`[` and `*` would be arguments of the line break before them."""
MATH = {
    "<": "<", ">": ">", "±": r"\pm", "−": "-", "×": r"\times", "Δ": r"\Delta", "σ": r"\sigma", "↑": r"\uparrow",
    "↓": r"\downarrow", "·": r"\cdot", "≥": r"\geq", "≤": r"\leq", "‖": r"\|", "Σ": r"\Sigma", "²": "{}^2",
    "φ": r"\varphi", "α": r"\alpha", "ε": r"\varepsilon", "λ": r"\lambda", "ρ": r"\rho",
}  # fmt: skip
LETTERS = "ßæœøåłıÆŒØÅŁ"
ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"
"""Grave, acute, circumflex, tilde, macron, breve, dot, diaeresis, ring, double acute, caron, cedilla."""


@dataclass(frozen=True, kw_only=True)
class Column:
    label: str
    unit: str = ""
    span: str = ""
    """Neighbouring columns with one span stand under it."""
    flat: str = ""
    """The label where a format has no spans."""
    numeric: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Sheet:
    """A table ready to be written: `rows` has one text a column; `tidy` has the numbers, one row a cell."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    tidy: pd.DataFrame

    @property
    def spans(self) -> list[tuple[str, int]]:
        """Runs of neighbouring columns with the same span, and their lengths; empty where no column has one."""
        runs: list[tuple[str, int]] = []
        for column in self.columns:
            if runs and runs[-1][0] == column.span:
                runs[-1] = column.span, runs[-1][1] + 1
            else:
                runs.append((column.span, 1))
        return runs if any(span for span, _ in runs) else []


def csv(frame: pd.DataFrame) -> str:
    """Floats at full precision, so that the file gives back the same numbers."""
    return frame.to_csv(index=False, lineterminator="\n")


def markdown(sheet: Sheet) -> str:
    """A GitHub table with its caption above and its notes below."""
    heads = [_head(column) for column in sheet.columns]
    rule = ["---:" if column.numeric else ":---" for column in sheet.columns]
    lines = [_pipe(heads), _pipe(rule), *(_pipe(row) for row in sheet.rows)]
    notes = [f"\n{escape_markdown(note)}" for note in sheet.notes]
    return "\n".join([f"**{escape_markdown(sheet.caption)}**\n", *lines, *notes]) + "\n"


def latex(sheet: Sheet) -> str:
    """A `table` float for the preamble's `booktabs` and `graphicx`; shrunk only where it is wider than the line."""
    align = "".join("r" if column.numeric else "l" for column in sheet.columns)
    body = [_tex_row([escape_tex(text) for text in row]) for row in sheet.rows]
    notes = escape_tex(" ".join(sheet.notes))
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_tex(sheet.caption)}}}",
        r"\smallskip",
        rf"\label{{tab:{_label(sheet.name)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{@{{}}{align}@{{}}}}",
        r"\toprule",
        *_tex_heads(sheet),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        rf"\par\smallskip\parbox{{\linewidth}}{{\footnotesize {notes}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape_tex(text: str) -> str:
    """As one paragraph that pdfTeX takes, whatever it holds: a blank line would end a caption."""
    kinds = itertools.groupby(one_line(text), MATH.__contains__)
    return "".join(
        f"${''.join(MATH[c] + ' ' * MATH[c][-1].isalpha() for c in run).strip()}$" if is_math
        else "".join(TEX.get(c) or (c if _is_latin(c) else _elsewhere(c)) for c in run)
        for is_math, run in kinds
    )  # fmt: skip


def _is_latin(character: str) -> bool:
    """Whether LaTeX has the letter without another font or package."""
    base, *marks = list(unicodedata.normalize("NFD", character))
    known = character.isascii() or character in LETTERS
    return known or (base.isascii() and base.isalpha() and len(marks) == 1 and marks[0] in ACCENTS)


def _elsewhere(character: str) -> str:
    """A character that LuaTeX and XeTeX have where the font has it; its number where pdfTeX would stop at it."""
    return rf"{{\ifdefined\Umathchar {character}\else {{[}}U+{ord(character):04X}{{]}}\fi}}"


def escape_markdown(text: str) -> str:
    """In one line, and nothing of it is taken for a cell's end, emphasis, code, a tag or a formula."""
    return re.sub(r"([\\|*_<>$`])", r"\\\1", one_line(text))


def _label(name: str) -> str:
    """A table's name as a label of plain letters."""
    return re.sub(r"[^\w .,+-]", lambda match: f"u{ord(match[0]):x}", name.replace("_", "-"), flags=re.ASCII)


def _head(column: Column) -> str:
    label = column.flat or column.label
    return f"{label} ({column.unit})" if column.unit else label


def _pipe(texts: list[str]) -> str:
    return "| " + " | ".join(escape_markdown(text) for text in texts) + " |"


def _tex_row(texts: list[str]) -> str:
    return " & ".join(texts) + r" \\"


def _tex_heads(sheet: Sheet) -> list[str]:
    """Spans with their rules, then labels, then a line of units if there are any."""
    lines = []
    if sheet.spans:
        start, cells, rules = 1, [], []
        for span, width in sheet.spans:
            cells.append(rf"\multicolumn{{{width}}}{{c}}{{{escape_tex(span)}}}" if span else " &" * (width - 1))
            if span:
                rules.append(rf"\cmidrule(lr){{{start}-{start + width - 1}}}")
            start += width
        lines += [_tex_row(cells), " ".join(rules)]
    lines.append(_tex_row([escape_tex(column.label) for column in sheet.columns]))
    if any(column.unit for column in sheet.columns):
        lines.append(_tex_row([escape_tex(f"({c.unit})") if c.unit else "" for c in sheet.columns]))
    return lines
