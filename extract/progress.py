"""Progress on stderr: a bar with rate and time left on a terminal, else a plain line now and then.

Long work calls ``progress(stage, done, total)``; who renders it is the command line's choice.
"""

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


class Progress:
    """A context manager that is called with (stage, done, total) and draws it.

    Off a terminal a stage that ends within ten seconds prints nothing, and one that waits for
    another (texts come after images) or is through prints nothing more.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        # Python has no stderr at all where the caller has closed it.
        self._stream: TextIO | None = stream or sys.stderr
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, tuple[float, int]] = {}
        """When each stage was seen last before it moved, and how far it was."""
        self._printed: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> "Progress":
        if self._stream is not None and self._stream.isatty():
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            self._bars.update(self._tasks[stage], completed=done, total=total)
            return
        if self._stream is None:
            return
        now = time.monotonic()
        start, before = self._started.setdefault(stage, (now, done))
        if done == before:
            self._started[stage] = self._printed[stage] = now, done
            return
        printed, shown = self._printed[stage]
        if now - printed < SECONDS_BETWEEN_LINES or done == shown:
            return
        self._printed[stage] = now, done
        rate = (done - before) / (now - start)
        left = f", {(total - done) / rate:,.0f} s left" if rate else ""
        print(f"{stage}: {done:,}/{total:,}, {rate:,.1f}/s{left}", file=self._stream, flush=True)
