"""Signals to preferences: what is known about each answer becomes a score, scores become pairs, kinds become others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from mlx_dpo.data.records import Context, Demonstration, PreferencePair, Ranking, Record, Text, Unpaired
from mlx_dpo.errors import DataError, UsageError

Signal = Callable[[Any], float]
"""What is known about one answer (its score, its rank, its text, …) to a score, higher is better."""

_WORDS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "no", "bad"), False),
}


def truth(value: Any) -> bool:
    """A verdict as data sets spell it: true, 1, 1.0, "yes", "good" or false, 0, -1, "no", "bad".

    Raises:
        DataError: anything else.
    """
    verdict = _WORDS.get(str(value).strip().lower())
    if verdict is None:
        raise DataError(f"{value!r} is neither true nor false")
    return verdict


def number(value: Any) -> float:
    """A finite number, also one that is written as a string.

    Raises:
        DataError: anything else, NaN and infinity included.
    """
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
    """The signal that is 1 where the whole answer, whitespace around it aside, has the format of a regular expression.

    Raises:
        UsageError: the pattern is none.
    """
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
    """A signal of `SIGNALS` by name, or `regex:PATTERN`.

    Raises:
        UsageError: there is none of this name.
    """
    if name.startswith("regex:"):
        return matches(name.removeprefix("regex:"))
    if name not in SIGNALS:
        raise UsageError(f'there is no signal "{name}"', f"One of {', '.join(SIGNALS)}, regex:PATTERN.")
    return SIGNALS[name]


Places = list[tuple[int, int]]


def best_worst(scores: Sequence[float]) -> Places:
    """The best answer over the worst; the first of several that share the place."""
    if not scores:
        return []
    return [(max(range(len(scores)), key=scores.__getitem__), min(range(len(scores)), key=scores.__getitem__))]


def all_pairs(scores: Sequence[float]) -> Places:
    """Every answer over every other that scores less: K (K - 1) / 2 pairs where nothing ties."""
    places = range(len(scores))
    return [(i, j) for i in places for j in places if scores[i] > scores[j]]


def adjacent(scores: Sequence[float]) -> Places:
    """Each answer over the next one down: K - 1 pairs where nothing ties."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    return list(pairwise(order))


PAIRINGS: dict[str, Callable[[Sequence[float]], Places]] = {
    "best_worst": best_worst,
    "all_pairs": all_pairs,
    "adjacent": adjacent,
}
"""Scores of the K answers to one prompt → (place of the chosen, place of the rejected)."""


def pairs(
    context: Context,
    answers: Sequence[Text],
    scores: Sequence[float],
    *,
    pairing: str = "best_worst",
    margin: float = 0.0,
    cap: int | None = None,
) -> list[PreferencePair]:
    """Preference pairs from answers to one prompt and their scores (higher is better).

    Ties give no pair, nor do scores that differ by less than `margin`. Above `cap` pairs the clearest are kept; among
    equally clear ones those that spread over different answers.
    """
    gap = {(i, j): scores[i] - scores[j] for i, j in PAIRINGS[pairing](scores)}
    clear = [places for places in gap if gap[places] > 0 and gap[places] >= margin]
    kept = sorted(clear, key=lambda places: (-gap[places], abs(places[0] - places[1]), places))[:cap]
    about = about_prompt(context)
    suffix = (lambda i, j: "") if pairing == "best_worst" else (lambda i, j: f"/{i + 1}-{j + 1}")
    return [
        PreferencePair(**{**about, "id": context.id + suffix(i, j)}, chosen=answers[i], rejected=answers[j])
        for i, j in sorted(kept)
    ]


def ranking(context: Context, answers: Sequence[Text], scores: Sequence[float]) -> Ranking:
    """The answers best first, ranked 1, 2, … by their scores (higher is better); equal scores share a rank."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    ranks = tuple(1.0 + sum(other > scores[place] for other in scores) for place in order)
    return Ranking(**about_prompt(context), responses=tuple(answers[place] for place in order), ranks=ranks)


def about_prompt(context: Context) -> dict[str, Any]:
    """The fields that every record has: those of `Context`, without the answers."""
    return {part.name: getattr(context, part.name) for part in fields(Context)}


def ranking_to_pairs(record: Ranking, *, pairing: str = "best_worst", cap: int | None = None) -> list[PreferencePair]:
    """A ranking as pairs: the best over the worst unless `pairing` says otherwise; none where everything ties."""
    return pairs(record, record.responses, [-rank for rank in record.ranks], pairing=pairing, cap=cap)


def pair_to_ranking(record: PreferencePair) -> list[Ranking]:
    """A pair as the ranking of its two answers."""
    return [ranking(record, record.completions, (1.0, 0.0))]


def pair_to_unpaired(record: PreferencePair) -> list[Unpaired]:
    """A pair as two judged answers: chosen good, rejected bad."""
    about = about_prompt(record)
    return [
        Unpaired(**{**about, "id": f"{record.id}/chosen"}, completion=record.chosen, label=True),
        Unpaired(**{**about, "id": f"{record.id}/rejected"}, completion=record.rejected, label=False),
    ]


def best_to_demonstration(record: PreferencePair | Ranking) -> list[Demonstration]:
    """The preferred answer as one to imitate."""
    return [Demonstration(**about_prompt(record), completion=record.completions[0])]


def good_to_demonstration(record: Unpaired) -> list[Demonstration]:
    """A good answer as one to imitate; a bad one gives nothing."""
    return [Demonstration(**about_prompt(record), completion=record.completion)] if record.label else []


CONVERSIONS: dict[tuple[str, str], Callable[[Any], Sequence[Record]]] = {
    ("ranking", "pair"): ranking_to_pairs,
    ("pair", "ranking"): pair_to_ranking,
    ("pair", "unpaired"): pair_to_unpaired,
    ("pair", "demonstration"): best_to_demonstration,
    ("ranking", "demonstration"): best_to_demonstration,
    ("unpaired", "demonstration"): good_to_demonstration,
}
"""(kind of the data, kind that is asked for) → the records that one record gives."""
