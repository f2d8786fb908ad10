"""How far the writing of tokens is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_PER_LINE = 10.0


class TokenProgress:
    """Tokens written, and how many a second. A context; every use ends with a line.

    Args:
        done, total: tokens that are there at the start, and that shall be there at the end.
        console: where to write; None: nowhere.
    """

    def __init__(self, done: int, total: int, console: Console | None) -> None:
        self._at_start = self._done = done
        self._total, self._console = total, console
        self._start = self._last = time.monotonic()
        self._context = ExitStack()
        self._bar: Progress | None = None

    def __enter__(self) -> TokenProgress:
        if self._console is not None and self._console.is_terminal:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
            bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar = self._context.enter_context(bar)
            self._bar.add_task(self._line(), total=self._total, completed=self._done)
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()
        self._say(self._line())

    def update(self, done: int) -> None:
        """There are ``done`` tokens now."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=self._line())
        elif time.monotonic() - self._last >= SECONDS_PER_LINE:
            self._last = time.monotonic()
            self._say(self._line())

    def _line(self) -> str:
        rate = (self._done - self._at_start) / max(time.monotonic() - self._start, 1e-9)
        return (
            f"{_short(self._done)} of {_short(self._total)} tokens "
            f"({100 * self._done / self._total:.0f}%), {_short(rate)} tokens/s"
        )

    def _say(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _short(number: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}"


def report_counts(counts: Mapping[str, int], console: Console | None) -> None:
    """Write one line per count, in the order of their names."""
    for name, count in sorted(counts.items()):
        if console is not None:
            console.print(f"  {name}: {count}", markup=False, highlight=False, soft_wrap=True)
