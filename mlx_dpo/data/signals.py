"""Signals to preferences: what is known about each answer becomes a score, scores become pairs, kinds become others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from mlx_dpo.data.records import Context, Demonstration, PreferencePair, Ranking, Record, Text, Unpaired
from mlx_dpo.errors import DataError, UsageError

Signal = Callable[[Any], float]
"""What is known about one answer (its score, its rank, its text, …) to a score, higher is better."""

_WORDS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "no", "bad"), False),
}


def as_truth(value: Any) -> bool | None:
    """A verdict as data sets spell it: true, 1, 1.0, "yes", "good" or false, 0, -1, "no", "bad"; None for all else."""
    return _WORDS.get(str(value).strip().lower())


def truth(value: Any) -> bool:
    """The same where it must be a verdict: anything else is a DataError."""
    verdict = as_truth(value)
    if verdict is None:
        raise DataError(f"{value!r} is neither true nor false")
    return verdict


def number(value: Any) -> float:
    """A finite number, also one that is written as a string; DataError for anything else, NaN and infinity included."""
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise DataError(f"{value!r} is not a finite number")
    return result


def is_json(text: str) -> float:
    """1 where the answer is JSON as it stands (whitespace around it aside), else 0."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return 0.0
    return 1.0


def matches(pattern: str) -> Signal:
    """The signal that is 1 where the whole answer, whitespace around it aside, matches a regular expression, else 0."""
    try:
        expression = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UsageError(f"the regular expression {pattern!r} cannot be read: {error}") from None
    return lambda text: float(expression.fullmatch(text.strip()) is not None)


SIGNALS: dict[str, Signal] = {
    "score": number,
    "rank": lambda value: -number(value),
    "error": lambda value: -number(value),
    "passed": lambda value: float(truth(value)),
    "json": is_json,
}


def signal(name: str) -> Signal:
    """A signal of `SIGNALS` by name, or `regex:PATTERN`; a UsageError where there is none of this name."""
    if name.startswith("regex:"):
        return matches(name.removeprefix("regex:"))
    if name not in SIGNALS:
        raise UsageError(f'there is no signal "{name}"', f"One of {', '.join(SIGNALS)}, regex:PATTERN.")
    return SIGNALS[name]


def pairs(
    context: Context, answers: Sequence[Text], scores: Sequence[float], *, margin: float = 0.0
) -> list[PreferencePair]:
    """Of answers to one prompt the best over the worst by their scores (higher is better), as no pair or one.

    Ties give none, nor do scores that differ by less than `margin`; of several that score the same the first counts.
    """
    order = _best_first(scores)
    gap = scores[order[0]] - min(scores) if order else 0.0
    if gap <= 0 or gap < margin:
        return []
    best, worst = answers[order[0]], answers[scores.index(min(scores))]
    return [PreferencePair(**about_prompt(context), chosen=best, rejected=worst)]


def ranking(context: Context, answers: Sequence[Text], scores: Sequence[float]) -> Ranking:
    """The answers best first, ranked 1, 2, … by their scores (higher is better); equal scores share a rank."""
    order = _best_first(scores)
    ranks = tuple(1.0 + sum(other > scores[i] for other in scores) for i in order)
    return Ranking(**about_prompt(context), responses=tuple(answers[i] for i in order), ranks=ranks)


def _best_first(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def about_prompt(context: Context, **changes: Any) -> dict[str, Any]:
    """The fields that every record has, those of `Context` without the answers; `changes` replace some of them."""
    return {part.name: getattr(context, part.name) for part in fields(Context)} | changes


def ranking_to_pairs(record: Ranking) -> list[PreferencePair]:
    """The best answer over the worst; nothing where all tie."""
    return pairs(record, record.responses, [-rank for rank in record.ranks])


def pair_to_unpaired(record: PreferencePair) -> list[Unpaired]:
    """A pair as two judged answers: chosen good, rejected bad."""
    return [
        Unpaired(**about_prompt(record, id=f"{record.id}/chosen"), completion=record.chosen, label=True),
        Unpaired(**about_prompt(record, id=f"{record.id}/rejected"), completion=record.rejected, label=False),
    ]


def to_demonstration(record: PreferencePair | Ranking | Unpaired) -> list[Demonstration]:
    """The preferred answer, or the one that is judged good, as one to imitate; a bad one gives nothing."""
    bad = isinstance(record, Unpaired) and not record.label
    return [] if bad else [Demonstration(**about_prompt(record), completion=record.completions[0])]


CONVERSIONS: dict[tuple[str, str], Callable[[Any], Sequence[Record]]] = {
    ("ranking", "pair"): ranking_to_pairs,
    ("pair", "ranking"): lambda pair: [ranking(pair, pair.completions, (1.0, 0.0))],
    ("pair", "unpaired"): pair_to_unpaired,
    ("pair", "demonstration"): to_demonstration,
    ("ranking", "demonstration"): to_demonstration,
    ("unpaired", "demonstration"): to_demonstration,
}
"""(kind of the data, kind that is asked for) → the records that one record gives."""
