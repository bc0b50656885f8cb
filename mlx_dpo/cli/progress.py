"""What a run says while it goes on, for people: bars on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlx_dpo.cli.console import show_warning, stderr
from mlx_dpo.events import Evaluated, OnEvent, Progressed, Sampled, Saved, Started, Stepped, Warned

LINES = 20
"""Steps that a run reports where no bar can be drawn."""

SAMPLE_WIDTH = 160
"""Characters of a sampled answer that are shown where there is no terminal to say how many fit a line."""

PACE_PERIOD = 3600.0
"""Seconds back to which a bar looks for the pace. Rich's own 30 would leave steps longer than that without one."""


@dataclass
class Screen:
    """Where events are drawn, and what of the past they need."""

    console: Console
    bars: Progress
    rows_per_step: int
    tasks: dict[str, TaskID] = field(default_factory=dict)
    reports: list[tuple[int, float]] = field(default_factory=list)  # step and seconds of training: the first, the last


@contextmanager
def show_progress(*, quiet: bool = False, rows_per_step: int = 1) -> Iterator[OnEvent]:
    """A listener that draws events on standard error; of a `quiet` run only warnings."""
    console = stderr()
    screen = Screen(console, make_bars(console, disable=quiet or not console.is_terminal), rows_per_step)
    with screen.bars:
        yield lambda event: None if quiet and not isinstance(event, Warned) else RENDER[type(event)](screen, event)


def make_bars(console: Console, *, disable: bool = False, clock: Callable[[], float] | None = None) -> Progress:
    """Bars with the time left, from the second step on: what goes before the first one says nothing of the pace."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
        speed_estimate_period=PACE_PERIOD,
        get_time=clock,
    )


def time_left(reports: list[tuple[int, float]], step: int, total_steps: int) -> float | None:
    """Seconds from `step` to the end at the pace between the first and the last report; None before the second one.

    A report is a step and the seconds that training took up to it. The first one is where counting begins, since a
    first step is slower than others, and a run may go on from a checkpoint.
    """
    if len(reports) < 2:
        return None
    (first, began), (last, seconds) = reports
    return (total_steps - step) * (seconds - began) / (last - first)


def about(seconds: float) -> str:
    """A duration for people, in the unit that they would take: `45 s`, `12 min`, `2.5 h`."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 2 * 60 else f"{seconds:.0f} s"


def in_words(metrics: dict[str, float], *, rows_per_second: float | None = None) -> str:
    """Loss, accuracy with its interval, margin, speed and memory, as far as they are known, in one line.

    While the policy is the reference every reward is 0 and ranks nothing, so there is no accuracy to tell.
    """
    ranks = metrics.get("kl/token", 1.0) > 1e-9
    parts = [write(metrics) for name, write in WORDS.items() if name in metrics and (ranks or name == "loss")]
    if rows_per_second:
        parts.append(f"{rows_per_second:.1f} rows/s")
    if "peak_memory_gb" in metrics:
        parts.append(f"{metrics['peak_memory_gb']:.1f} GB")
    return ", ".join(parts)


def _accuracy(metrics: dict[str, float]) -> str:
    unsure = metrics.get("rewards/within_noise", 0.0)
    if unsure > 0.5:
        return f"accuracy unknown ({unsure:.0%} of the margins within rounding)"
    said = f"accuracy {metrics['rewards/accuracies']:.0%}"
    if "accuracy_low" in metrics:
        said += f" (95 %: {metrics['accuracy_low']:.0%} to {metrics['accuracy_high']:.0%})"
    return said


WORDS: dict[str, Callable[[dict[str, float]], str]] = {
    "loss": lambda metrics: f"loss {metrics['loss']:.4f}",
    "rewards/accuracies": _accuracy,
    "rewards/margins": lambda metrics: f"margin {metrics['rewards/margins']:.2f}",
    "kl/token": lambda metrics: f"KL/token {metrics['kl/token']:.3f}",
}


def _phase(screen: Screen, event: Progressed) -> None:
    if not event.total:
        return
    if event.name not in screen.tasks:
        screen.tasks[event.name] = screen.bars.add_task(event.name, total=event.total, state=event.unit)
    screen.bars.update(screen.tasks[event.name], completed=event.done)
    if event.done == event.total:
        screen.bars.remove_task(screen.tasks.pop(event.name))


def _started(screen: Screen, event: Started) -> None:
    table = Table.grid(padding=(0, 2))
    for label, value in event.facts.items():
        table.add_row(Text(label, style="bold"), Text(value))
    screen.console.print(table)
    screen.reports = []
    screen.tasks["training"] = screen.bars.add_task(
        "training", total=event.total_steps, completed=event.first_step, state=""
    )


def _stepped(screen: Screen, event: Stepped) -> None:
    seconds = event.metrics.get("seconds")
    speed = event.step * screen.rows_per_step / seconds if seconds else None
    if seconds:
        screen.reports = [*screen.reports[:1], (event.step, seconds)]
    state = in_words(event.metrics, rows_per_second=speed)
    task: dict[str, Any] = {"state": state} if state else {}
    screen.bars.update(screen.tasks["training"], completed=event.step, **task)
    due = event.step % max(1, event.total_steps // LINES) == 0 or event.step in (1, event.total_steps)
    if state and due and not screen.console.is_terminal:
        left = time_left(screen.reports, event.step, event.total_steps)
        ending = f", about {about(left)} left" if left and left >= 1 else ""
        screen.console.print(f"step {event.step} of {event.total_steps}: {state}{ending}")


def _evaluated(screen: Screen, event: Evaluated) -> None:
    best = ", the best so far" if event.best else ""
    screen.console.print(f"held out, after step {event.step}: {in_words(event.metrics)}{best}")


def _sampled(screen: Screen, event: Sampled) -> None:
    """One prompt, always the same one, while the run goes on, and all of them at its end; an answer a line."""
    for sample in event.samples if event.last else event.samples[:1]:
        asked = f"asked {'' if event.held_out else 'a training prompt '}after step {event.step}:"
        lines = {asked: sample.prompt, "  base  ": sample.base, "  tuned ": sample.tuned}
        for label, text in lines.items():
            line = Text.assemble((label, "dim"), " ", " ".join(text.split()) or "(nothing)")
            line.truncate(screen.console.width if screen.console.is_terminal else SAMPLE_WIDTH, overflow="ellipsis")
            screen.console.print(line)


RENDER: dict[type, Callable[[Screen, Any], None]] = {
    Progressed: _phase,
    Started: _started,
    Stepped: _stepped,
    Evaluated: _evaluated,
    Sampled: _sampled,
    Saved: lambda screen, event: screen.console.print(Text(f"saved {event.path}", style="dim")),
    Warned: lambda screen, event: show_warning(screen.console, event.text),
}
