"""Progress of a job: a bar on a terminal, one line every ten seconds in a log."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 10.0


class JobProgress:
    """Counts images and errors and shows them; use as a context manager."""

    def __init__(self, name: str, total: int, console: Console, line_every: float = LINE_EVERY_SECONDS) -> None:
        self._name, self._total, self._console, self._line_every = name, total, console, line_every
        self._done = self._errors = 0
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._stopped = threading.Event()
        self._lines = threading.Thread(target=self._print_lines, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if not self._console.is_terminal:
            self._lines.start()
            return self
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.2f} images/s, {task.fields[errors]} errors"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(self._name, total=self._total, rate=0.0, errors=0)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._lines.join()

    def advance(self, images: int, errors: int) -> None:
        """More images are done, ``errors`` of them with a status other than ok."""
        self._done += images
        self._errors += errors
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate(), errors=self._errors)

    def _rate(self) -> float:
        return self._done / max(time.monotonic() - self._start, 1e-9)

    def _print_lines(self) -> None:
        while not self._stopped.wait(self._line_every):
            rate = self._rate()
            left = "time left unknown"
            if rate > 0:
                minutes, seconds = divmod(round((self._total - self._done) / rate), 60)
                left = f"{minutes}:{seconds:02d} left"
            self._console.print(
                f"{self._name}: {self._done}/{self._total} images, {rate:.2f} images/s, {self._errors} errors, {left}",
                highlight=False,
            )
