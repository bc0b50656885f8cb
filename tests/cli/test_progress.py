"""What a training run says of the time left: on a terminal beside its bar, elsewhere in the lines that it prints."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from mlx_dpo.cli.progress import RENDER, SAMPLE_WIDTH, Screen, about, make_bars, time_left
from mlx_dpo.events import Evaluated, Event, Sample, Sampled, Started, Stepped


def screen(*, terminal: bool, clock: list[float] | None = None) -> Screen:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False)
    bars = make_bars(console, disable=not terminal, clock=(lambda: clock[0]) if clock else None)
    return Screen(console, bars, rows_per_step=4)


def show(on: Screen, *events: Event) -> str:
    before = len(on.console.file.getvalue())  # type: ignore[attr-defined]
    for event in events:
        RENDER[type(event)](on, event)
    return on.console.file.getvalue()[before:]  # type: ignore[attr-defined]


def step(number: int, seconds: float | None, total: int = 100) -> Stepped:
    return Stepped(number, total, {"loss": 0.5} | ({"seconds": seconds} if seconds is not None else {}))


def test_the_time_left_is_told_from_the_second_report_on() -> None:
    on = screen(terminal=False)
    show(on, Started({}, 100, 0))
    assert "left" not in show(on, step(1, 30.0)), "one report has no pace"
    # the first step took 30 s, the nine after it 72 s: 8 s a step, and 90 are to come
    assert show(on, step(10, 102.0)).rstrip().endswith(", about 12 min left")
    assert "left" not in show(on, step(100, 822.0)), "at the end nothing is left"


def test_between_reports_the_time_left_is_told_at_the_pace_of_the_last_one() -> None:
    on = screen(terminal=False)
    show(on, Started({}, 1000, 0), step(10, 20.0, 1000), step(20, 30.0, 1000))
    assert "about 15 min left" in show(on, step(100, None, 1000)), "900 steps of 1 s"


def test_a_resumed_run_does_not_count_what_went_before() -> None:
    on = screen(terminal=False)
    show(on, Started({}, 100, 50))
    assert "left" not in show(on, step(55, 1000.0))
    assert "about 40 s left" in show(on, step(60, 1005.0)), "1 s a step since it goes on, and 40 to come"


def test_the_arithmetic_of_the_time_left() -> None:
    assert time_left([], 1, 10) is None
    assert time_left([(1, 5.0)], 1, 10) is None
    assert time_left([(1, 5.0), (3, 9.0)], 3, 10) == pytest.approx(14.0)
    assert time_left([(1, 5.0), (3, 9.0)], 5, 10) == pytest.approx(10.0), "two steps after the last report"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(44.6, "45 s"), (119, "119 s"), (120, "2 min"), (730, "12 min"), (7199, "120 min"), (9000, "2.5 h")],
)
def test_a_duration_is_told_in_the_unit_that_people_would_take(seconds: float, said: str) -> None:
    assert about(seconds) == said


@pytest.mark.parametrize("pace", [0.5, 100.0])
def test_on_a_terminal_the_bar_tells_the_time_left_however_long_a_step_takes(pace: float) -> None:
    clock = [1000.0]
    on = screen(terminal=True, clock=clock)
    show(on, Started({}, 50, 0))
    task = on.bars.tasks[0]
    clock[0] += 500  # the reference and a first evaluation: not what a step takes
    show(on, Evaluated(0, {"loss": 0.69}, best=False), step(1, 1.0, 50))
    assert task.time_remaining is None
    for number in (2, 3, 4):
        clock[0] += pace
        show(on, step(number, None, 50))
    assert task.time_remaining == pytest.approx(46 * pace, abs=1)
    with on.console.capture() as captured:
        on.console.print(on.bars.get_renderable())
    assert re.search(r"0:00:23" if pace == 0.5 else r"1:16:40", captured.get())


ANSWERS = (
    Sample("Who wrote Emma?", "Emma was\n\nwritten [by] Jane Austen.", "Jane Austen."),
    Sample("Say " + "very " * 60 + "much.", "", "Much."),
)


def test_while_a_run_goes_on_one_prompt_is_shown_with_both_answers_and_at_its_end_all() -> None:
    on = screen(terminal=False)
    assert show(on, Sampled(50, ANSWERS, held_out=True, last=False)).splitlines() == [
        "asked after step 50: Who wrote Emma?",
        "  base   Emma was written [by] Jane Austen.",
        "  tuned  Jane Austen.",
    ]
    lines = show(on, Sampled(60, ANSWERS, held_out=False, last=True)).splitlines()
    assert len(lines) == 6
    assert lines[0] == "asked a training prompt after step 60: Who wrote Emma?"
    assert lines[3].endswith("…") and len(lines[3]) == SAMPLE_WIDTH
    assert lines[4:] == ["  base   (nothing)", "  tuned  Much."]


def test_on_a_terminal_an_answer_is_cut_to_its_width() -> None:
    on = screen(terminal=True)
    on.console.width = 40
    lines = show(on, Sampled(60, ANSWERS, held_out=True, last=True)).splitlines()
    assert len(lines) == 6
