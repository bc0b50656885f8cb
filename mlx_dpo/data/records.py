"""Text records: what one row of a data set says, before any tokenizer has seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]
"""One chat message: `role`, `content` and whatever else the chat template reads (`tool_calls`, `name`, …)."""

Text = str | tuple[Message, ...]
"""A plain string, or the messages of a conversation."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every record has: where it came from, its prompt, what the chat template gets beside the messages."""

    id: str
    prompt: Text
    tools: tuple[Mapping[str, Any], ...] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    shape: str = field(default="", compare=False)  # the row shape it was read from, a name in data/formats.py

    @property
    def completions(self) -> tuple[Text, ...]:
        """Every answer of the record, in the order in which losses expect them."""
        raise TypeError(f"{type(self).__name__} holds no answer")


@dataclass(frozen=True, kw_only=True)
class PreferencePair(Context):
    """Of two answers to one prompt, `chosen` is preferred."""

    chosen: Text
    rejected: Text

    @property
    def completions(self) -> tuple[Text, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True, kw_only=True)
class Ranking(Context):
    """K answers to one prompt, best first. `ranks` ascend from the best; equal ranks are ties."""

    responses: tuple[Text, ...]
    ranks: tuple[float, ...]

    @property
    def completions(self) -> tuple[Text, ...]:
        return self.responses


@dataclass(frozen=True, kw_only=True)
class _OneAnswer(Context):
    completion: Text

    @property
    def completions(self) -> tuple[Text, ...]:
        return (self.completion,)


@dataclass(frozen=True, kw_only=True)
class Unpaired(_OneAnswer):
    """One answer, judged good (`label` true) or bad (KTO's data)."""

    label: bool


@dataclass(frozen=True, kw_only=True)
class Demonstration(_OneAnswer):
    """One answer to imitate (data of supervised fine-tuning)."""


Record = PreferencePair | Ranking | Unpaired | Demonstration

KINDS: dict[str, type] = {
    "pair": PreferencePair,
    "ranking": Ranking,
    "unpaired": Unpaired,
    "demonstration": Demonstration,
}
"""The kinds of records by the names that the command line and the losses use."""


def kind_of(record: Record) -> str:
    """The name of a record's kind in `KINDS`."""
    return next(name for name, kind in KINDS.items() if isinstance(record, kind))


def first_few(names: Sequence[str], count: int = 3) -> str:
    """`1, 2, 3, …`: some of the rows that a message is about, by name."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
