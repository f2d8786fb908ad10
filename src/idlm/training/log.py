"""What a run tells: lines and a bar on the terminal, JSON, TensorBoard, and a plot at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LOG_FILE = "train_log.jsonl"
BOARD_FOLDER = "tensorboard"
PLOT_FILE = "training.png"


class RunLog:
    """The log of one run.

    Args:
        out: folder of the files; None: lines only.
        main: whether this process speaks; the others are silent.
    """

    def __init__(self, out: Path | None, main: bool) -> None:
        self._main = main
        self._out = out if main else None
        self._board: Any = None
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def say(self, line: str) -> None:
        """One line for people."""
        if not self._main:
            return
        if self._bar is not None:
            self._console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    @contextmanager
    def bar(self) -> Iterator[None]:
        """A progress bar meanwhile, if there is a terminal."""
        if not (self._main and self._console.is_terminal):
            yield
            return
        columns = (TextColumn("training"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._bar.add_task("", total=1.0)
            try:
                yield
            finally:
                self._bar = None

    def advance(self, fraction: float) -> None:
        """Move the bar to ``fraction`` of the run."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=fraction)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Add JSON-compatible values to the log and their numbers to TensorBoard, if installed."""
        if self._out is None:
            return
        self._out.mkdir(parents=True, exist_ok=True)
        with (self._out / LOG_FILE).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is None and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self._out / BOARD_FOLDER)
        if self._board is not None:
            for name, number in _numbers("", values):
                self._board.add_scalar(name, number, step)
            self._board.flush()

    def close(self) -> None:
        """Draw the plot and close the files."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._out is None or not (self._out / LOG_FILE).exists():
            return
        if find_spec("matplotlib") is None:
            self.say(f"no {PLOT_FILE}: matplotlib is missing (pip install 'idlm[train]')")
            return
        from idlm.training.plot import plot_run

        plot_run(self._out / LOG_FILE, self._out / PLOT_FILE)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in nested JSON values with their paths, such as ``agree/1``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}".lstrip("/"), item)
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value, start=1):
            yield from _numbers(f"{name}/{place}", item)
    elif isinstance(value, (int, float)):
        yield name, float(value)
