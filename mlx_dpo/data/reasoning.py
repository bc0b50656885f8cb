"""What a chat template did to answers and their reasoning: what it removed, doubled or made equal, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mlx_dpo.data.records import Message, Record, Text, first_few
from mlx_dpo.data.template import (
    THINK_BLOCKS,
    Rendered,
    closes_thinking,
    keeps_reasoning,
    opens_thinking,
    shared_prefix,
    source,
    squashed,
    switch,
    think_blocks,
)
from mlx_dpo.data.texts import REASONING_KEYS

SHOWN = 60  # characters of a removed text that are shown


class Finding(NamedTuple):
    """One thing that the template did to an answer of `row`: `kind` is a key of `KINDS`, `text` what it is about."""

    kind: str
    row: str
    text: str = ""


KINDS = {
    # how a sentence goes on after "3 of 200 rows"; {} is the text of the first of them
    "equal": "have answers that the chat template makes equal: nothing to learn",
    "reasoning": "lose the reasoning of an answer in the chat template ({})",
    "block": "lose reasoning that stands in an answer's text: the chat template removes it ({})",
    "text": "lose text of an answer, which the chat template removes or changes ({})",
    "second": "bring a think block of their own after the chat template's ({})",
    "foreign": "bring a think block as another family writes it, which is read as text ({})",
    "against": "have reasoning, but thinking is off: the prompt ends with an empty think block",
    "mixed": "have reasoning in some answers only; where there is none, what stands in its place is scored",
    "unthought": "are answered without reasoning where a runtime lets the model think first ({})",
    "unlike": "have another prompt than a runtime gives ({})",
}
"""What can be found, the worst first."""


def examine_answers(record: Record, rendered: Rendered, tokenizer: Any) -> list[Finding]:
    """What the chat template did to the answers of a record of messages; at most one finding of a kind."""
    found: dict[str, str] = {}
    answers = record.completions
    blocks = think_blocks(source(tokenizer))
    for k, answer in enumerate(answers):
        there = squashed(rendered.answer(k))
        for kind, text in _pieces(answer, blocks):
            if squashed(text) not in there:
                found.setdefault(kind, _shown(text))
        if _has_second_block(record, rendered, k, tokenizer):
            found.setdefault("second", _shown("".join(map(_content, _said(answer)))))
        if blocks and (other := next((m for m in _said(answer) if _foreign(m, blocks)), None)):
            found.setdefault("foreign", _shown(_content(other)))
        if any(rendered.wholes[k] == rendered.wholes[j] and answer != answers[j] for j in range(k)):
            found["equal"] = ""
    reasoned = [any(kind != "text" for kind, _ in _pieces(answer, blocks)) for answer in answers]
    if not any(reasoned):
        if all(answers) and "foreign" not in found:
            found |= _unlike_generation(rendered, tokenizer)
    elif closes_thinking(rendered.generation, tokenizer) and "second" not in found:
        found["against"] = ""
    elif not all(reasoned) and rendered.own is None and blocks:
        found["mixed"] = ""
    return [Finding(kind, record.id, found[kind]) for kind in KINDS if kind in found]


def remedies(tokenizer: Any, **template: Any) -> dict[str, str]:
    """What to do about each kind of finding, with this model's template."""
    keeps = keeps_reasoning(tokenizer, **template)
    as_strings = "write prompt and answers as plain strings, as the model reads them"
    as_text = f"{as_strings}, or leave the reasoning out"
    under_key = 'give it under the key "reasoning_content" of the message' if keeps else as_text
    with_reasoning = "give the answers their reasoning" if keeps else as_strings
    off = "--thinking off, which the run folder remembers for later verbs" if switch(source(tokenizer)) else ""
    return {
        "equal": "see what was removed, and make the difference one that stays",
        "reasoning": "this template has no place for it there: " + as_text,
        "block": under_key,
        "text": "write it in a way that the template keeps, or leave it out",
        "foreign": under_key.replace("give it", "give the reasoning"),
        "second": under_key.replace("give it", "give the reasoning"),
        "against": "--thinking on, or leave the reasoning out",
        "mixed": "give reasoning to all answers of a row, or to none",
        "unthought": off or f"this template has no switch for it: {with_reasoning}",
        "unlike": "that is the template's own way; --preview shows what is read",
    }


def sentences(findings: Sequence[Finding], remedies: Mapping[str, str], rows: int, *, names: int) -> list[str]:
    """One sentence for each kind of finding, the worst first, with the first `names` rows and what to do."""
    said = []
    for kind, what in KINDS.items():
        some = [finding for finding in findings if finding.kind == kind]
        if some:
            which = first_few([finding.row for finding in some], names)
            said.append(f"{len(some)} of {rows} rows {what.format(some[0].text)} (rows {which}); {remedies[kind]}")
    return said


def _said(answer: Text) -> list[Message]:
    return [message for message in answer if isinstance(message, Mapping) and message["role"] == "assistant"]


def _foreign(message: Message, blocks: Sequence[tuple[str, str]]) -> bool:
    """Whether a message closes a think block as another family's templates do."""
    known = {closes for _, closes in blocks}
    return any(closes in _content(message) for _, closes in THINK_BLOCKS if closes not in known)


def _content(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _pieces(answer: Text, blocks: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """What an answer says, piece by piece: `reasoning` under a key, in a `block` of its content, or `text`.

    What stands before a closing tag is reasoning, whether it was opened or not: behind a generation prompt that opens
    it, a model writes the closing tag alone.
    """
    tags = "|".join(re.escape(tag) for pair in blocks for tag in pair)
    for message in _said(answer):
        reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), "")
        pieces = [("reasoning", reasoning)]
        content = _content(message)
        parts = re.split(f"({tags})", content) if tags else [content]
        for text, tag in zip(parts[::2], [*parts[1::2], ""], strict=True):
            pieces.append(("block" if any(tag == closes for _, closes in blocks) else "text", text))
        yield from (piece for piece in pieces if piece[1].strip())


def _has_second_block(record: Record, rendered: Rendered, k: int, tokenizer: Any) -> bool:
    """Whether answer `k` has more think blocks than messages, counting the one that the template puts before it."""
    opening = [opens for opens, _ in think_blocks(source(tokenizer))]
    at_generation = closes_thinking(rendered.generation, tokenizer) or opens_thinking(rendered.generation, tokenizer)
    before = sum(map(rendered.generation.count, opening)) - at_generation
    return sum(map(rendered.wholes[k].count, opening)) - before > len(_said(record.completions[k]))


def _unlike_generation(rendered: Rendered, tokenizer: Any) -> dict[str, str]:
    """Where the prompt of answers without reasoning differs from what a runtime gives, and how."""
    prompt, generation = rendered.prompt, rendered.generation
    if prompt is None:
        prompt = generation[: rendered.shared]
    if prompt == generation:
        return {"unthought": "no think block before the answer"} if rendered.thinks else {}
    begin = shared_prefix(prompt, generation)
    if opens_thinking(generation[:begin], tokenizer):
        begin = max(generation.rfind(opens, 0, begin) for opens, _ in think_blocks(source(tokenizer)))
    kind = "unthought" if rendered.thinks else "unlike"
    return {kind: f"{prompt[begin:]!r} before the answer, {generation[begin:]!r} at generation"}


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")
