"""``history.csv``: how a training run went, one line for each log, and what follows from it."""

from __future__ import annotations

import csv
import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from tinysam.distill.losses import TERMS
from tinysam.distill.validation import SCORES
from tinysam.lake.filesystem import LakeError, exists, read_bytes, write_once

HISTORY_FILE = "history.csv"
COLUMNS = (
    *("time", "step", "total_steps", "epoch", "loss", *TERMS),
    *("learning_rate", "images_per_second", "waiting_share", *(f"val_{name}" for name in SCORES)),
)
WRITING_SHARE = 0.01
"""The file is written whole, as object storage knows no appending, so a long run writes a long file: it does so only as
often as takes this share of the time."""

Line = dict[str, float]


class History:
    """Collects lines and keeps ``history.csv`` up to date, on any storage.

    Args:
        url: of the file; what an earlier part of the run wrote stays.
        clock: seconds, for the time that writing takes.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._clock = url, clock
        self._text = read_bytes(url).decode() if exists(url) else ",".join(COLUMNS) + "\r\n"
        self._next_write = clock()

    def append(self, line: Mapping[str, float]) -> None:
        """Adds a line, and writes the file unless it was written a moment ago."""
        out = io.StringIO()
        rounded = {name: float(f"{value:.6g}") for name, value in line.items()}
        csv.DictWriter(out, COLUMNS).writerow({"time": round(time.time(), 1), **rounded})
        self._text += out.getvalue()
        if self._clock() >= self._next_write:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet."""
        start = self._clock()
        write_once(self._url, self._text.encode())
        self._next_write = self._clock() + (self._clock() - start) / WRITING_SHARE


def read_history(url: str) -> list[Line]:
    """The file's lines, with the columns that each of them fills; none where there is no file yet."""
    if not exists(url):
        return []
    rows = csv.DictReader(io.StringIO(read_bytes(url).decode()))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def describe_line(line: Line, left: float | None) -> str:
    """A line for people.

    Args:
        line: of training or of validation.
        left: seconds to the end, where they are known.
    """
    scores = {name.removeprefix("val_"): value for name, value in line.items() if name.startswith("val_")}
    if scores:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        return f"distill: step {line['step']:.0f}, validation IoU: {shown}"
    terms = [name for name in TERMS if name in line]
    parts = [
        f"distill: step {line['step']:.0f}/{line['total_steps']:.0f}",
        f"epoch {line['epoch'] + 1:.0f}",
        f"loss {line['loss']:.4g} ({' '.join(f'{name} {line[name]:.3g}' for name in terms)})",
        f"{line['images_per_second']:.3g} images/s",
        f"{line['waiting_share']:.0%} waiting for data",
        "time left unknown" if left is None else f"{_clock_time(left)} left",
    ]
    return ", ".join(parts)


def _clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass
class TimeLeft:
    """Estimates the time to the end from the lines of this run; pauses of resumed runs do not count."""

    first: Line | None = field(default=None, init=False)
    last: Line | None = field(default=None, init=False)

    def after(self, line: Line) -> float | None:
        """Seconds from ``line`` to the end, or None while there is nothing to go by.

        A run that went back to a checkpoint, or lost or gained workers, is estimated anew.
        """
        if self.last is not None and (
            line["step"] < self.last["step"] or line["total_steps"] != self.last["total_steps"]
        ):
            self.first = None
        self.first, self.last = self.first or line, line
        steps = line["step"] - self.first["step"]
        if steps <= 0:
            return None
        return (line["time"] - self.first["time"]) / steps * (line["total_steps"] - line["step"])


def throughput(lines: Sequence[Line]) -> tuple[float, float]:
    """Images a second, and the share of time that training waited for data, over all lines of training."""
    spans = [(line["images_per_second"], line["waiting_share"]) for line in lines if "images_per_second" in line]
    if not spans:
        return 0.0, 0.0
    # Lines are made at about equal intervals, so their plain mean is the mean over time.
    return sum(speed for speed, _ in spans) / len(spans), sum(share for _, share in spans) / len(spans)


class Follower:
    """Shows the lines of a history while other threads, processes or machines write them; a context manager.

    Args:
        url: of the history; what is there already belongs to an earlier run and is not shown.
        show: takes the lines to print.
        every_s: seconds between looks.
    """

    def __init__(self, url: str, show: Callable[[str], None], every_s: float) -> None:
        self._url, self._show, self._every_s = url, show, every_s
        self._shown, self._time_left = len(read_history(url)), TimeLeft()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="history", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._show_new()

    def _follow(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._show_new()

    def _show_new(self) -> None:
        try:
            lines = read_history(self._url)
        except LakeError as error:  # training goes on, and so does the next look
            self._show(f"distill: no progress to show: {error}")
            return
        for line in lines[self._shown :]:
            left = self._time_left.after(line) if "total_steps" in line else None
            self._show(describe_line(line, left))
        self._shown = max(self._shown, len(lines))
