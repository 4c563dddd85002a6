from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tinysam.distill.curves import curves_page
from tinysam.distill.history import COLUMNS, Follower, History, Line, TimeLeft, describe_line, read_history, throughput


def line(step: int, *, total: int = 100, time: float = 0.0, **values: float) -> Line:
    return {"time": time, "step": step, "total_steps": total, "epoch": 0, "loss": 2.0, "images_per_second": 8.0} | {
        "waiting_share": 0.25,
        **values,
    }


def without_time(lines: list[Line]) -> list[Line]:
    return [{name: value for name, value in entry.items() if name != "time"} for entry in lines]


class Clock:
    """Each look at it takes ``pace`` seconds."""

    def __init__(self, pace: float) -> None:
        self.now, self.pace = 0.0, pace

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


def test_lines_are_read_back_and_an_earlier_run_is_kept(tmp_path: Path) -> None:
    url = str(tmp_path / "history.csv")
    assert read_history(url) == []
    written = [{"step": 1.0, "loss": 0.5}, {"step": 2.0, "val_box": 0.25}]
    for entry in written:
        History(url).append(entry)  # each a run that goes on from the one before
    assert without_time(read_history(url)) == written
    assert Path(url).read_text().splitlines()[0] == ",".join(COLUMNS)


def test_a_column_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="surprise"):
        History(str(tmp_path / "h.csv")).append({"surprise": 1.0})


def test_slow_storage_is_written_to_so_rarely_that_it_takes_a_hundredth_of_the_time(tmp_path: Path) -> None:
    url, clock = str(tmp_path / "history.csv"), Clock(pace=0.0)
    history = History(url, clock)
    sizes = []
    for step in range(1000):
        clock.pace = 0.5  # a write takes half a second or more
        history.append({"step": float(step)})
        clock.pace = 0.0
        clock.now += 10.0
        sizes.append(len(read_history(url)))
    writes = len(set(sizes))
    assert 50 < writes < 260
    history.flush()
    assert len(read_history(url)) == 1000


def test_the_driver_shows_what_others_write_but_no_earlier_run(tmp_path: Path) -> None:
    url = str(tmp_path / "history.csv")
    History(url).append(line(1))
    shown: list[str] = []
    arrived = threading.Event()

    def show(text: str) -> None:
        shown.append(text)
        arrived.set()

    with Follower(url, show, every_s=0.01):
        history = History(url)
        history.append(line(2))
        assert arrived.wait(30)
        history.append({"step": 2, "epoch": 0, "val_box": 0.5})
        history.flush()
    assert len(shown) == 2
    assert shown[0].startswith("distill: step 2/100, epoch 1, loss 2")
    assert "25% waiting" in shown[0]
    assert shown[1] == "distill: step 2, validation IoU: box 0.5000"


def test_a_history_that_cannot_be_read_is_said_and_does_not_stop_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "history.csv"
    shown: list[str] = []
    with Follower(str(folder), shown.append, every_s=100):
        folder.mkdir()
    assert len(shown) == 1
    assert "no progress to show" in shown[0]


def test_time_left_follows_the_pace_of_this_life_of_a_run() -> None:
    estimate = TimeLeft()
    assert estimate.after(line(10, time=1000)) is None
    assert estimate.after(line(20, time=1050)) == pytest.approx(80 * 5)
    assert estimate.after(line(15, time=2000)) is None  # back at a checkpoint, after a pause
    assert estimate.after(line(25, time=2010)) == pytest.approx(75)
    assert estimate.after(line(30, time=2020, total=60)) is None  # more workers, fewer steps


@pytest.mark.parametrize(("left", "text"), [(None, "unknown"), (59.6, "1:00 left"), (3725, "1:02:05 left")])
def test_a_line_says_how_long_it_will_take(left: float | None, text: str) -> None:
    assert describe_line(line(1, dice=0.5), left).endswith(text)
    assert "dice 0.5" in describe_line(line(1, dice=0.5), left)


def test_throughput_is_the_mean_over_lines_of_training() -> None:
    lines = [line(1), {"step": 1, "val_box": 0.1}, line(2, images_per_second=4.0, waiting_share=0.75)]
    assert throughput(lines) == (6.0, 0.5)
    assert throughput([]) == (0.0, 0.0)


def test_curves_show_what_was_logged_and_nothing_else() -> None:
    page = curves_page("a <run>", [line(1), line(2, loss=1.0), {"step": 2, "val_box": 0.5}])
    assert "a &lt;run&gt;" in page
    assert page.count("<polyline") == 4  # loss, box, images a second, waiting
    assert "val_box" in page
    assert "val_click" not in page
    assert "<script" not in page


def test_steps_that_a_run_made_twice_are_drawn_once() -> None:
    twice = curves_page("a", [line(1), line(2), line(3, loss=9.0), line(2), line(3)])
    assert twice == curves_page("a", [line(1), line(2), line(3)])
