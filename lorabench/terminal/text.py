"""What the command line shows: aligned text tables on stdout, and a sweep's progress on stderr."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lorabench.terminal.notebook import NotebookBars, in_notebook

UNITS = ("tokens", "images")
"""What runs are trained on so many of a second."""

if TYPE_CHECKING:
    from lorabench.store.store import RunState

Item = TypeVar("Item")


CONTROLS = re.compile(r"(?!\x1b\[[01]m)[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Of terminals, of the direction of writing, and halves of characters; not tabs, ends of lines, and bold letters."""


def visible(text: str) -> str:
    """Text for a terminal: what would control it, such as `ESC`, is written out as JSON does, `\\u001b`.

    So JSON stays what it was.
    """
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_line(text: str) -> str:
    """`visible` in one line, for tables, labels and captions."""
    return visible(" ".join(text.split()))


def tell(text: object, end: str = "\n") -> None:
    """Print data on stdout, whatever it holds."""
    print(visible(str(text)), end=end, flush=True)


def talk(text: str) -> None:
    """Say something to the person; stdout is for data."""
    print(f"lorabench: {visible(text)}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """Rows by their heads, under a title; a terminal and a page show the same."""

    title: str
    heads: list[str]
    rows: Sequence[dict[str, Any]]

    @property
    def text(self) -> str:
        """For a terminal; a title only where there is one."""
        return "\n".join([*filter(None, [self.title]), text_table(self.rows, self.heads)])

    @property
    def cells(self) -> list[list[str]]:
        """A text a head of each row; an en dash where there is none."""
        return [["–" if row.get(head) in (None, "") else str(row[head]) for head in self.heads] for row in self.rows]


def text_table(rows: Iterable[dict[str, Any]], columns: list[str]) -> str:
    """An aligned table, one line a row, so that `grep` and `sort` work on it; numbers are right-aligned."""
    table = [[_cell(row.get(column)) for column in columns] for row in rows]
    right = [bool(table) and all(_is_number(line[i]) for line in table) for i in range(len(columns))]
    widths = [max(len(line[i]) for line in [columns, *table]) for i in range(len(columns))]
    lines = []
    for line in [columns, *table]:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else one_line(str(value))


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.strip("~%").replace(".", "", 1).replace(",", "").replace("e-", "").isdigit()


def tracked(items: Iterable[Item], total: int, text: str) -> Iterator[Item]:
    """The items, with a bar while they are taken where there is a terminal or a notebook."""
    with progress_bar(text, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def progress_bar(text: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, or in a notebook, where either can show one; gives what is told how much more is done."""
    if in_notebook():
        bars: Any = NotebookBars()
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        bars = Progress(console=Console(stderr=True), transient=True)
    else:
        yield lambda amount: None
        return
    with bars:
        task = bars.add_task(text, total=total)
        yield lambda amount: bars.advance(task, amount)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """`12 MiB`, `1.50 GiB`."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def count_statuses(states: Iterable[RunState]) -> str:
    """`3 done, 1 oom`."""
    counts = Counter(str(state.status) for state in states)
    return ", ".join(f"{number} {status}" for status, number in counts.items()) or "no runs"


class Display:
    """A sweep's progress on stderr: bars on a terminal or in a notebook, else a plain line for each run that ends.

    Use as a context manager. `labels` maps a run's id to what sets it apart (`method.rank=4 seed=1`).
    """

    def __init__(self, name: str, labels: dict[str, str], *, stream: Any = None):
        self._labels = {run_id: visible(text) for run_id, text in labels.items()}
        self._stream = stream or sys.stderr
        self._ended = 0
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._name = name

    def __enter__(self) -> Display:
        if self._stream.isatty() or (self._stream is sys.stderr and in_notebook()):
            self._bars = _bars(self._stream) if self._stream.isatty() else NotebookBars()
            self._bars.start()
            self._sweep = self._bars.add_task(self._name, total=len(self._labels), text="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def say(self, text: str) -> None:
        text = visible(text)
        if self._bars:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def running(self, progress: dict[str, dict[str, Any]]) -> None:
        """Show these runs, with what their claims say of them, and no others."""
        if not self._bars:
            return
        for run_id in [run_id for run_id in self._tasks if run_id not in progress]:
            self._bars.remove_task(self._tasks.pop(run_id))
        for run_id, state in progress.items():
            if run_id not in self._tasks:
                self._tasks[run_id] = self._bars.add_task(self._labels[run_id] or run_id, total=None, text="")
            total, step = state.get("steps"), state.get("step") or 0
            self._bars.update(self._tasks[run_id], total=total, completed=step, text=progress_text(state))

    def ended(self, state: RunState, note: str = "") -> None:
        """A run is settled. Those that were done before get no line of their own (`note`)."""
        self._ended += 1
        if self._bars:
            self._bars.update(self._sweep, completed=self._ended)
        if note == "already":
            return
        numbers = state.record.measures if state.record and state.status == "done" else {}
        shown = [f"{key} {numbers[key]:.4g}" for key in _HEADLINES if key in numbers]
        if "total_seconds" in numbers:
            shown.append(duration(numbers["total_seconds"]))
        head = [f"[{self._ended}/{len(self._labels)}]", f"{state.status:<9}", state.run_id]
        self.say("  ".join(filter(None, [*head, self._labels[state.run_id], *shown, state.error])))


_HEADLINES = ("valid_accuracy", "valid_loss")


PHASES = {
    "load": "reading data and model",
    "evaluate base": "evaluating the base",
    "train": "training",
    "evaluate": "evaluating",
    "generate": "writing answers",
    "save": "saving",
    "serve": "serving",
}


def doing(progress: dict[str, Any]) -> str:
    """`writing answers 3/20`: what a claim's progress says that a run is doing."""
    phase = str(progress.get("phase") or "start")
    far = f" {progress['done']}/{progress['of']}" if phase == "generate" and {"done", "of"} <= progress.keys() else ""
    return one_line(PHASES.get(phase, phase)) + far


def progress_text(progress: dict[str, Any]) -> str:
    """`training  loss 2.31  5200 tokens/s` of what a claim's progress holds."""
    parts = [doing(progress)]
    if progress.get("loss") is not None:
        parts.append(f"loss {progress['loss']:.4g}")
    parts += [f"{rate:.0f} {unit}/s" for unit in UNITS if (rate := progress.get(f"{unit}_per_second"))]
    return "  ".join(parts)


def _bars(stream: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(file=stream),
        transient=True,
        refresh_per_second=4,
    )
