"""What a run says while it goes on; the CLI renders it, a script may read it, nobody has to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Progressed(NamedTuple):
    """A stage with a known amount of work begins or has come to `done` of `total`; `unit` names what is counted."""

    name: str
    done: int
    total: int
    unit: str


class Started(NamedTuple):
    """Everything is in place and step 1 comes next; `facts` are label and value, for people."""

    facts: dict[str, str]
    total_steps: int
    first_step: int


class Stepped(NamedTuple):
    """An optimizer step was taken; `metrics` stand under TRL's names."""

    step: int
    total_steps: int
    metrics: dict[str, float]


class Evaluated(NamedTuple):
    """The held-out rows were scored; `best` says whether this is the best evaluation so far."""

    step: int
    metrics: dict[str, float]
    best: bool


class Sample(NamedTuple):
    """A prompt (its own words, without the chat template) with the answers of the base model and of the tuned one."""

    prompt: str
    base: str
    tuned: str


class Sampled(NamedTuple):
    """The model answered a few prompts; `last` says that no more will come, `held_out` whether it trains on them."""

    step: int
    samples: tuple[Sample, ...]
    held_out: bool
    last: bool


class Saved(NamedTuple):
    """A checkpoint or the final adapter was written."""

    step: int
    path: Path


class Warned(NamedTuple):
    """Something that the user should look at, with what to do."""

    text: str


Event = Progressed | Started | Stepped | Evaluated | Sampled | Saved | Warned
OnEvent = Callable[[Event], Any]


def ignore(event: Event) -> None:
    """The listener of who does not listen."""
