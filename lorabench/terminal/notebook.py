"""Progress in a notebook: bars in the cell's output, with the last lines that were said under them."""

from __future__ import annotations

import sys
import time
from html import escape
from typing import Any

LINES = 10
REFRESH_SECONDS = 0.25


def in_notebook() -> bool:
    """Whether output goes to a notebook's cell."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class NotebookBars:
    """What the package uses of rich's `Progress`, without a widget: it stands in a notebook that is read later too."""

    def __init__(self) -> None:
        self.console = self
        self._tasks: dict[int, dict[str, Any]] = {}
        self._count = 0
        self._lines: list[str] = []
        self._handle: Any = None
        self._shown = 0.0

    def start(self) -> None:
        from IPython.display import display

        self._handle = display(self, display_id=True)

    def stop(self) -> None:
        self._refresh(now=True)

    def __enter__(self) -> NotebookBars:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add_task(self, description: str, total: float | None = None, text: str = "") -> int:
        self._count += 1
        self._tasks[self._count] = {"description": description, "total": total, "completed": 0.0, "text": text}
        self._refresh()
        return self._count

    def update(self, task: int, **changes: Any) -> None:
        self._tasks[task] |= changes
        self._refresh()

    def advance(self, task: int, amount: float = 1) -> None:
        self.update(task, completed=self._tasks[task]["completed"] + amount)

    def remove_task(self, task: int) -> None:
        del self._tasks[task]
        self._refresh()

    def print(self, text: str, **_: Any) -> None:
        self._lines.append(text)
        self._refresh(now=True)

    def _refresh(self, now: bool = False) -> None:
        if self._handle is not None and (now or time.monotonic() - self._shown > REFRESH_SECONDS):
            self._shown = time.monotonic()
            self._handle.update(self)

    def __repr__(self) -> str:
        return "\n".join([*(" ".join(self._cells(task)) for task in self._tasks.values()), *self._lines[-LINES:]])

    def _repr_html_(self) -> str:
        rows = []
        for task in self._tasks.values():
            name, counts, text = map(escape, self._cells(task))
            share = f'value="{task["completed"]:g}" max="{task["total"]:g}"' if task["total"] else ""
            rows.append(f"{name} <progress {share}></progress> {counts} {text}".rstrip())
        return f"<pre>{chr(10).join([*rows, *map(escape, self._lines[-LINES:])])}</pre>"

    @staticmethod
    def _cells(task: dict[str, Any]) -> tuple[str, str, str]:
        of = f"/{task['total']:.0f}" if task["total"] else ""
        return task["description"], f"{task['completed']:.0f}{of}", task["text"]
