"""Progress of a job: a bar on a terminal, one line every ten seconds in a log."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tinysam.lake import schema

LINE_EVERY_SECONDS = 10.0
SHOWN_STATUSES = 4
"""Kinds of errors named while a job runs, the most frequent ones."""


class JobProgress:
    """Counts images and errors and shows them; use as a context manager."""

    def __init__(self, name: str, total: int, console: Console, line_every: float = LINE_EVERY_SECONDS) -> None:
        self._name, self._total, self._console, self._line_every = name, total, console, line_every
        self._done = 0
        self._errors: Counter[str] = Counter()
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
            TextColumn("{task.fields[rate]:.2f} images/s, {task.fields[errors]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(self._name, total=self._total, rate=0.0, errors=self._shown_errors())
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

    def advance(self, images: int, statuses: Mapping[str, int] | None = None) -> None:
        """More images are done, with these statuses."""
        self._done += images
        self._errors.update({status: count for status, count in (statuses or {}).items() if status != schema.OK})
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate(), errors=self._shown_errors())

    def _shown_errors(self) -> str:
        """``3 errors (2 truncated, 1 empty)``."""
        kinds = ", ".join(f"{count} {status}" for status, count in self._errors.most_common(SHOWN_STATUSES))
        more = ", …" if len(self._errors) > SHOWN_STATUSES else ""
        return f"{self._errors.total()} errors" + (f" ({kinds}{more})" if kinds else "")

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
                f"{self._name}: {self._done}/{self._total} images, {rate:.2f} images/s, {self._shown_errors()}, {left}",
                highlight=False,
            )
