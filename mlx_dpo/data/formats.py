"""Row shapes to records: each shape in which people have preference data is one line in a table and one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mlx_dpo.data import columns, texts
from mlx_dpo.data.columns import PROMPTS, Row, first, has
from mlx_dpo.data.records import Context, Demonstration, Message, PreferencePair, Record, Text, Unpaired
from mlx_dpo.data.signals import SIGNALS, about_prompt, as_truth, ranking
from mlx_dpo.errors import DataError

SIDES = ("chosen", "rejected")

CONVERSATIONS = ("messages", "conversations")
"""Columns that hold a whole conversation, or a pair's prompt."""

ANSWERS = ("completion", "response", "output", "answer", "continuation", "reference", "references")
"""Columns that hold the one answer of an unpaired row or of a demonstration."""

RESPONSES = ("responses", "completions", "generations", "answers")
"""Columns that hold the several answers of a ranking."""

VERDICTS = {
    "ranks": "rank",
    "rank": "rank",
    "scores": "score",
    "score": "score",
    "ratings": "score",
    "rating": "score",
    "overall_score": "score",
    "errors": "error",
    "error": "error",
    "passed": "passed",
}
"""Columns, or keys of an answer's object, that judge answers → the signal that reads them; the first present counts."""

LABELS = ("label", "kto_tag")


class Format(NamedTuple):
    """One row shape: how it is written, how it is told from the others, and how it becomes a record."""

    written: str
    recognised: Callable[[Row], bool]
    converted: Callable[[Row, Context], Record]


def parse_row(row: Mapping[str, Any], id: str) -> Record:
    """The record that a row of a data set says, whatever its shape; `id` names it where it has no `id` column.

    Raises DataError where no shape fits, or a value is missing or of the wrong type; the message names the key.
    """
    row = columns.plain(row)
    # Before the shapes are asked: half a pair with a "completion" beside it would pass for a demonstration.
    for key, other in (SIDES, SIDES[::-1]):
        if has(row, key) and not has(row, other):
            what = "is null" if other in row else "is missing"
            raise DataError(f'"{other}" {what}, but there is a "{key}" (keys: {columns.listed_keys(row)})')
    for name, shape in FORMATS.items():
        if shape.recognised(row):
            return shape.converted(row, columns.read_context(row, id, name))
    raise DataError(_why_unknown(row))


def parse_prompt(row: Mapping[str, Any], id: str) -> Context:
    """A row's prompt alone, for sampling: of a pair, of a conversation that ends in an answer, or of any row that has a
    prompt column; a DataError where it holds none."""
    row = columns.plain(row)
    if _is_pair(row):
        return Context(**about_prompt(parse_row(row, id)))
    prompt = columns.read_prompt(row)
    if first(row, PROMPTS) in CONVERSATIONS and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return replace(columns.read_context(row, id, "prompt"), prompt=prompt)


def accepted_shapes() -> str:
    """Every row shape on a line of its own, for an error's remedy."""
    return "\n  ".join(["A row is an object of one of these shapes:", *(shape.written for shape in FORMATS.values())])


def _why_unknown(row: Row) -> str:
    """What is missing in a row that no shape recognises."""
    keys = [key for key in (*SIDES, *CONVERSATIONS, *ANSWERS, *RESPONSES, "text") if key in row]
    if keys:
        why = "; ".join(f'"{key}" is {texts.found(row[key])}' for key in keys)
    elif first(row, PROMPTS):
        why = 'there is a prompt but no answer: no "chosen" and "rejected", no "completion"'
    else:
        why = "no known shape"
    return f"{why} (keys: {columns.listed_keys(row)})"


# Pairs.


def _is_pair(row: Row) -> bool:
    return has(row, *SIDES)


def _pair(context: Context, prompt: Text, chosen: Text, rejected: Text) -> PreferencePair:
    return PreferencePair(**about_prompt(context, prompt=prompt), chosen=chosen, rejected=rejected)


def _from_dialogues(row: Row, context: Context) -> Record:
    chosen, rejected = (texts.dialogue_messages(str(texts.read_text(row[key], key))) for key in SIDES)
    return _split(row, context, chosen, rejected)


def _are_conversations(row: Row) -> bool:
    if not _is_pair(row) or not all(isinstance(row[key], list | tuple) for key in SIDES):
        return False
    if not any(key in row for key in PROMPTS):
        return True
    return all(texts.is_conversation(texts.read_text(row[key], key)) for key in SIDES)


def _from_conversations(row: Row, context: Context) -> Record:
    """Whole conversations. A string prompt beside them repeats what they hold and is left out, as in TRL."""
    chosen, rejected = texts.read_messages(row["chosen"], "chosen"), texts.read_messages(row["rejected"], "rejected")
    key = first(row, ("prompt", "conversations"))
    given = texts.read_text(row[key], key) if key else ""
    if not isinstance(given, str) and given:
        chosen, rejected = _opened(given, chosen, "chosen"), _opened(given, rejected, "rejected")
    return _split(row, context, chosen, rejected)


def _opened(given: tuple[Message, ...], conversation: tuple[Message, ...], key: str) -> tuple[Message, ...]:
    """A conversation that has the given messages in front, if it lacks them."""
    spoken = tuple(message for message in conversation if message["role"] != "system")
    if texts.starts_with(conversation, given) or texts.starts_with(spoken, given):
        return conversation
    if given[-1]["role"] == "user":
        raise DataError(f'"{key}" is a whole conversation that does not open with the messages of the prompt')
    return (*given, *conversation)


def _split(row: Row, context: Context, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Record:
    """The messages that both conversations share are the prompt."""
    shared = texts.common_prefix(chosen, rejected)
    if not shared and "assistant" not in (chosen[0]["role"], rejected[0]["role"]):
        raise DataError('"chosen" and "rejected" open with different messages, so they share no prompt')
    return _pair(context, columns.with_system(row, chosen[:shared]), chosen[shared:], rejected[shared:])


def _has_common_start(row: Row) -> bool:
    strings = all(isinstance(row.get(key), str) for key in SIDES)
    return strings and not any(key in row for key in PROMPTS)


def _from_common_start(row: Row, context: Context) -> Record:
    chosen, rejected = (texts.read_text(row[key], key) for key in SIDES)
    shared = texts.common_prefix(chosen, rejected)
    return _pair(context, chosen[:shared], chosen[shared:], rejected[shared:])


def _from_pair(row: Row, context: Context) -> Record:
    prompt, (chosen, rejected) = columns.fit_answers(row, {key: row[key] for key in SIDES})
    return _pair(context, prompt, chosen, rejected)


# Rankings.


def _from_ranking(row: Row, context: Context) -> Record:
    key = str(first(row, RESPONSES))
    if len(row[key]) < 2:
        raise DataError(f'"{key}" holds {len(row[key])} answers, where a ranking needs 2 or more')
    column, verdicts = _verdicts(row, key)
    if len(verdicts) != len(row[key]):
        raise DataError(f'"{key}" holds {len(row[key])} answers and "{column}" {len(verdicts)} values')
    scores = []
    for k, verdict in enumerate(verdicts):
        try:
            scores.append(SIGNALS[VERDICTS[column]](verdict))
        except DataError as error:
            raise DataError(f'"{column}[{k}]": {error.message}') from None
    prompt, answers = columns.fit_answers(row, {f"{key}[{k}]": answer for k, answer in enumerate(row[key])})
    return ranking(replace(context, prompt=prompt), answers, scores)


def _verdicts(row: Row, key: str) -> tuple[str, list[Any]]:
    """The name and the values of what judges the answers: a column beside them, or a key in each."""
    column = next((name for name in VERDICTS if isinstance(row.get(name), list | tuple)), None)
    if column:
        return column, list(row[column])
    if all(isinstance(answer, Mapping) for answer in row[key]):
        inside = next((name for name in VERDICTS if all(name in answer for answer in row[key])), None)
        if inside:
            return inside, [answer[inside] for answer in row[key]]
    raise DataError(f'"{key}" has neither "ranks" nor "scores" beside it, nor a rank or score in each answer')


# Single answers, judged or to imitate.


def _answer_key(row: Row) -> str | None:
    """The column of the one answer; a conversation, which holds its prompt too, or an answer beside a prompt."""
    if not has(row, "completion") and (conversation := first(row, CONVERSATIONS)):
        return conversation
    return first(row, ANSWERS) if any(key in row for key in PROMPTS) else None


def _is_judged(row: Row) -> bool:
    """A label beside an answer; in columns of other names than KTO's only a label that says true or false."""
    label, answer = _label_key(row), _answer_key(row)
    if label is None or answer is None:
        return False
    return answer in ("completion", *CONVERSATIONS) or as_truth(row[label]) is not None


def _label_key(row: Row) -> str | None:
    return next((key for key in LABELS if key in row), None)


def _from_judged(row: Row, context: Context) -> Record:
    key = str(_label_key(row))
    label = as_truth(row[key])
    if label is None:
        raise texts.mistyped(key, row[key], "true or false (rename the column if it does not judge the answer)")
    prompt, completion = _answered(row)
    return Unpaired(**about_prompt(context, prompt=prompt), completion=completion, label=label)


def _from_demonstration(row: Row, context: Context) -> Record:
    prompt, completion = _answered(row)
    return Demonstration(**about_prompt(context, prompt=prompt), completion=completion)


def _answered(row: Row) -> tuple[Text, Text]:
    """Prompt and answer of a row with one answer; of a conversation the last message is the answer."""
    key = str(_answer_key(row))
    if key in CONVERSATIONS:
        messages = texts.read_messages(row[key], key)
        if messages[-1]["role"] != "assistant":
            raise DataError(f'"{key}" ends with a message of the role "{messages[-1]["role"]}", not with an answer')
        return columns.with_system(row, messages[:-1]), messages[-1:]
    prompt, (completion,) = columns.fit_answers(row, {key: row[key]})
    return prompt, completion


def _from_text(row: Row, context: Context) -> Record:
    if not isinstance(row["text"], str):
        raise texts.mistyped("text", row["text"], "a string")
    return Demonstration(**about_prompt(context), completion=texts.read_text(row["text"], "text"))


FORMATS: dict[str, Format] = {
    "dialogues": Format(
        r'{"chosen": "\n\nHuman: …\n\nAssistant: …", "rejected": the same with another last answer}',
        lambda row: _is_pair(row) and all(texts.is_dialogue(row[side]) for side in SIDES),
        _from_dialogues,
    ),
    "conversations": Format(
        '{"chosen": [{"role": "user", "content": …}, {"role": "assistant", …}], "rejected": the same with another end}',
        _are_conversations,
        _from_conversations,
    ),
    "common start": Format(
        '{"chosen": "What is 1 + 1? Two.", "rejected": "What is 1 + 1? Three."}',
        _has_common_start,
        _from_common_start,
    ),
    "pair": Format(
        '{"prompt": …, "chosen": …, "rejected": …}, each a string or a list of messages; also "question", '
        '"instruction" (+ "input") or ShareGPT\'s "conversations" for the prompt, and "system"',
        _is_pair,
        _from_pair,
    ),
    "ranking": Format(
        '{"prompt": …, "responses": [… 2 or more …], "ranks": [1, …]}; also "scores", or answers as '
        '{"text": …, "score": …}',
        lambda row: isinstance(row.get(first(row, RESPONSES) or ""), list | tuple),
        _from_ranking,
    ),
    "judged": Format(
        '{"prompt": …, "completion": …, "label": true}; also "messages" for both',
        _is_judged,
        _from_judged,
    ),
    "demonstration": Format(
        '{"prompt": …, "completion": …}, or {"messages": […, {"role": "assistant", …}]}',
        lambda row: _answer_key(row) is not None,
        _from_demonstration,
    ),
    "text": Format('{"text": "…"}', lambda row: has(row, "text") and not first(row, RESPONSES), _from_text),
}
"""Row shapes by name; the first that recognises a row converts it, so the narrow ones stand before the wide: every
dialogue is a pair too, and every judged answer a demonstration with a label to ignore."""
