"""What people should know about their data before they train on it: counts and suspicions, from the texts alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from mlx_dpo.data.load import prompt_key
from mlx_dpo.data.records import Message, PreferencePair, Record, Text, first_few, kind_of
from mlx_dpo.data.texts import REASONING_KEYS

LENGTH_BIAS = 0.15  # how far from a half the share of longer chosen answers may be before it is worth a word

_CONTROL = re.compile(r"<\|[a-z_]+\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>")

AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Facts about a data set. Rows are named by their ids, in the order of the data; lengths are in characters."""

    rows: int
    kinds: dict[str, int]
    shapes: dict[str, int]  # rows by the shape they were written in (data/formats.py)
    prompts: int  # different ones
    mean_prompt: float
    mean_first: float  # first answers: the chosen, the best of a ranking, the only one
    mean_last: float  # last answers: the rejected, the worst of a ranking, the only one
    longer_chosen: float | None  # share of pairs whose chosen answer is the longer one, of those that differ in length
    duplicates: tuple[str, ...]  # say the same as an earlier row
    contradictions: tuple[tuple[str, str], ...]  # the second prefers what the first rejects, of two answers
    identical: tuple[str, ...]  # chosen equals rejected: nothing to learn
    nearly_identical: tuple[str, ...]  # chosen and rejected differ in whitespace only
    empty: tuple[str, ...]  # an answer says nothing
    parted_early: tuple[str, ...]  # chosen and rejected differ before their last answer
    repeats_prompt: tuple[str, ...]  # every answer, a string, begins with the whole prompt
    control_tokens: tuple[str, ...]  # a chat template's control tokens are typed into the text
    shared_prompts: tuple[str, ...]  # have a prompt that is among the validation rows too

    def warnings(self) -> list[str]:
        """Sentences on what deserves a look; empty where nothing does."""
        suspicions = (
            (self.duplicates, "rows say the same as an earlier one"),
            ([id for _, id in self.contradictions], "rows prefer what an earlier one rejects, of the same two answers"),
            (self.identical, "pairs have the same text chosen and rejected: nothing to learn"),
            (self.nearly_identical, "pairs differ in whitespace only"),
            (self.empty, "rows have an empty answer"),
            (self.parted_early, "pairs differ before their last answer: earlier turns are scored too"),
            (self.repeats_prompt, "rows repeat their prompt in every answer: it would be read twice"),
            (self.control_tokens, "rows have control tokens of a chat template typed into their text"),
            (self.shared_prompts, "rows have a prompt that is among the validation rows too"),
        )
        said = [f"{len(ids)} of {self.rows} {what} ({first_few(ids)})" for ids, what in suspicions if ids]
        if self.longer_chosen is not None and abs(self.longer_chosen - 0.5) > LENGTH_BIAS:
            way = "longer" if self.longer_chosen > 0.5 else "shorter"
            share = max(self.longer_chosen, 1 - self.longer_chosen)
            said.append(f"the chosen answer is the {way} one in {share:.0%} of the pairs: length alone may be learned")
        return said


def examine(records: Sequence[Record], valid: Sequence[Record] = ()) -> Report:
    """Counts and suspicions about the records; with `valid`, the prompts that these share with them."""
    pairs = [record for record in records if isinstance(record, PreferencePair)]
    differences = [length(pair.chosen) - length(pair.rejected) for pair in pairs]
    longer = [difference > 0 for difference in differences if difference]
    held_out = {prompt_key(record) for record in valid}
    return Report(
        rows=len(records),
        kinds=dict(Counter(map(kind_of, records))),
        shapes=dict(Counter(record.shape for record in records)),
        prompts=len(set(map(prompt_key, records))),
        mean_prompt=_mean([length(record.prompt) for record in records]),
        mean_first=_mean([length(record.completions[0]) for record in records]),
        mean_last=_mean([length(record.completions[-1]) for record in records]),
        longer_chosen=fmean(longer) if longer else None,
        duplicates=_duplicates(records),
        contradictions=_contradictions(pairs),
        identical=_named(pairs, lambda pair: pair.chosen == pair.rejected),
        nearly_identical=_named(pairs, _differs_in_whitespace),
        empty=_named(records, lambda record: not all(flat(answer).strip() for answer in record.completions)),
        parted_early=_named(pairs, lambda pair: not all(map(_is_one_answer, pair.completions))),
        repeats_prompt=_named(records, _repeats_prompt),
        control_tokens=_named(records, _has_control_tokens),
        shared_prompts=_named(records, lambda record: prompt_key(record) in held_out),
    )


def flat(text: Text) -> str:
    """A text as one string: what is reasoned and said in its messages, tool calls as JSON."""
    return text if isinstance(text, str) else "\n".join(map(_flat_message, text))


def _flat_message(message: Message) -> str:
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
    calls = json.dumps(message["tool_calls"], sort_keys=True) if message.get("tool_calls") else ""
    return reasoning + message["content"] + calls


def length(text: Text) -> int:
    """The characters of a text; in messages without the line breaks that `flat` puts between them."""
    return len(flat(text)) if isinstance(text, str) else sum(len(flat((message,))) for message in text)


def _mean(values: Sequence[int]) -> float:
    return fmean(values) if values else 0.0


def _named(records: Sequence[AnyRecord], suspicious: Callable[[AnyRecord], bool]) -> tuple[str, ...]:
    return tuple(record.id for record in records if suspicious(record))


def _differs_in_whitespace(pair: PreferencePair) -> bool:
    chosen, rejected = flat(pair.chosen), flat(pair.rejected)
    return chosen != rejected and "".join(chosen.split()) == "".join(rejected.split())


def _is_one_answer(text: Text) -> bool:
    return isinstance(text, str) or (len(text) == 1 and text[0]["role"] == "assistant")


def _repeats_prompt(record: Record) -> bool:
    prompt = record.prompt
    if not isinstance(prompt, str) or not prompt:
        return False
    return all(isinstance(answer, str) and answer.startswith(prompt) for answer in record.completions)


def _has_control_tokens(record: Record) -> bool:
    return any(_CONTROL.search(flat(text)) for text in (record.prompt, *record.completions))


def _duplicates(records: Sequence[Record]) -> tuple[str, ...]:
    seen: set[tuple[str, ...]] = set()
    repeated = []
    for record in records:
        said = (kind_of(record), prompt_key(record), *map(flat, record.completions), str(getattr(record, "label", "")))
        if said in seen:
            repeated.append(record.id)
        seen.add(said)
    return tuple(repeated)


def _contradictions(pairs: Sequence[PreferencePair]) -> tuple[tuple[str, str], ...]:
    """Pairs of rows of which one prefers what the other rejects; each later row is named with the first against it."""
    seen: dict[tuple[str, str, str], str] = {}  # what was preferred to what, and the first row that said so
    against = []
    for pair in pairs:
        prompt, chosen, rejected = prompt_key(pair), flat(pair.chosen), flat(pair.rejected)
        if chosen != rejected and (prompt, rejected, chosen) in seen:
            against.append((seen[prompt, rejected, chosen], pair.id))
        seen.setdefault((prompt, chosen, rejected), pair.id)
    return tuple(against)
