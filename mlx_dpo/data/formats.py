"""Row shapes to records: each shape in which people have preference data is one line in a table and one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mlx_dpo.data.labels import SIGNALS, ranking, truth
from mlx_dpo.data.texts import (
    as_messages,
    common_prefix,
    dialogue_messages,
    dialogue_prompt,
    found,
    is_conversation,
    is_dialogue,
    mistyped,
    read_json,
    read_messages,
    read_objects,
    read_text,
    starts_with,
)
from mlx_dpo.errors import DataError
from mlx_dpo.records import Context, Demonstration, Message, PreferencePair, Record, Text, Unpaired

Row = Mapping[str, Any]

PROMPTS = ("prompt", "instruction", "question", "query", "input", "conversations", "messages")
"""Columns that hold a prompt, the first of them that a row has. All but `prompt` speak to a chat model: their strings
become the user's message."""

ADDITIONS = ("input", "context")
"""What belongs to an instruction or a question in a column of its own."""

SYSTEMS = ("system", "system_prompt")

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
    """The record that a row of a data set says, whatever its shape; `id` is its name where it has no `id` column.

    Raises:
        DataError: no shape fits, or a value is missing or of the wrong type; the message names the key.
    """
    row = _plain(row)
    for key, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if _has(row, key) and not _has(row, other):
            what = "is null" if other in row else "is missing"
            raise DataError(f'"{other}" {what}, but there is a "{key}" (keys: {", ".join(row)})')
    for name, shape in FORMATS.items():
        if shape.recognised(row):
            return shape.converted(row, _context(row, id, name))
    raise DataError(_why_unknown(row))


def parse_prompt(row: Mapping[str, Any], id: str) -> Context:
    """A row's prompt alone, for sampling: any row of `FORMATS`, or one that has a prompt and no answer.

    Raises:
        DataError: the row holds no prompt.
    """
    row = _plain(row)
    if any(shape.recognised(row) for shape in FORMATS.values()):
        record = parse_row(row, id)
        if record.prompt == "":
            raise DataError(f"there is no prompt (keys: {', '.join(row)})")
        return Context(
            id=record.id, prompt=record.prompt, tools=record.tools, chat_template_kwargs=record.chat_template_kwargs
        )
    context = _context(row, id, "prompt")
    prompt = _prompt(row)
    if prompt is None:
        raise DataError(f"there is no prompt (keys: {', '.join(row)})")
    return _with_prompt(context, prompt)


def accepted_shapes() -> str:
    """Every row shape as one line each, for an error's remedy."""
    return "\n".join(
        ["A row is an object of one of these shapes:", *(f"  {shape.written}" for shape in FORMATS.values())]
    )


# Reading the columns that all shapes have in common.


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with numpy's arrays and scalars as Python's, and NaN, pandas' word for missing, as null."""
    plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}
    return {key: None if isinstance(value, float) and value != value else value for key, value in plain.items()}


def _has(row: Row, *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


def _first(row: Row, keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if _has(row, key)), None)


def _context(row: Row, id: str, shape: str) -> Context:
    """What every record has, its prompt still empty."""
    given = row.get("id")
    kwargs = read_json(row.get("chat_template_kwargs") or None, "chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise mistyped("chat_template_kwargs", kwargs, "an object")
    return Context(
        id=str(given) if isinstance(given, str | int) and given != "" else id,
        prompt="",
        tools=read_objects(row.get("tools"), "tools"),
        chat_template_kwargs={key: value for key, value in kwargs.items() if value is not None} if kwargs else None,
        shape=shape,
    )


def _with_prompt(context: Context, prompt: Text) -> Context:
    return Context(**{**_fields(context), "prompt": prompt})


def _fields(context: Context) -> dict[str, Any]:
    return {name: getattr(context, name) for name in ("id", "prompt", "tools", "chat_template_kwargs", "shape")}


def _prompt(row: Row) -> Text | None:
    """The prompt of the first column of `PROMPTS` that the row has, with its additions, history and system message."""
    key = _first(row, PROMPTS)
    if key is None:
        return None
    prompt = read_text(row[key], key)
    if is_dialogue(prompt):
        prompt = dialogue_prompt(str(prompt))
    if isinstance(prompt, str) and (key != "prompt" or any(name in row for name in SYSTEMS)):
        additions = [row[name] for name in ADDITIONS if name != key and isinstance(row.get(name), str) and row[name]]
        prompt = (*_history(row), {"role": "user", "content": "\n\n".join([prompt, *additions])})
    return _with_system(row, prompt)


def _history(row: Row) -> list[Message]:
    """Earlier turns in a `history` column of [question, answer] lists."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise mistyped("history", history, "a list of [question, answer] lists")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text} for turn in history for role, text in zip(roles, map(str, turn), strict=True)
    ]


def _with_system(row: Row, prompt: Text) -> Text:
    """Messages with the row's system column in front, unless they have a system message."""
    key = _first(row, SYSTEMS)
    if key is None or row[key] == "" or isinstance(prompt, str) or any(m["role"] == "system" for m in prompt):
        return prompt
    if not isinstance(row[key], str):
        raise mistyped(key, row[key], "a string")
    return ({"role": "system", "content": row[key]}, *prompt)


def _required_prompt(row: Row) -> Text:
    prompt = _prompt(row)
    if prompt is None:
        raise DataError(f'"prompt" is {"null" if "prompt" in row else "missing"} (keys: {", ".join(row)})')
    return prompt


def _agree(prompt: Text, answers: list[Text], keys: list[str]) -> tuple[Text, tuple[Text, ...]]:
    """Prompt and answers as strings all, or as messages all; an answer that repeats the prompt's messages sheds them.

    Raises:
        DataError: an answer is an empty list of messages.
    """
    for key, answer in zip(keys, answers, strict=True):
        if not isinstance(answer, str) and not answer:
            raise DataError(f'"{key}" is an empty list: an answer has at least one message')
    if all(isinstance(text, str) for text in (prompt, *answers)):
        return prompt, tuple(answers)
    opening = () if prompt == "" else as_messages(prompt, "user")
    turns = [as_messages(answer, "assistant") for answer in answers]
    if opening and all(starts_with(turn, opening) for turn in turns):
        turns = [turn[len(opening) :] for turn in turns]
    return opening, tuple(turns)


# Pairs.


def _is_pair(row: Row) -> bool:
    return _has(row, "chosen", "rejected")


def _dialogues(row: Row) -> bool:
    return _is_pair(row) and is_dialogue(row["chosen"]) and is_dialogue(row["rejected"])


def _from_dialogues(row: Row, context: Context) -> Record:
    return _split(row, context, dialogue_messages(row["chosen"]), dialogue_messages(row["rejected"]))


def _conversations(row: Row) -> bool:
    if not _is_pair(row) or not all(isinstance(row[key], list | tuple) for key in ("chosen", "rejected")):
        return False
    if _first(row, PROMPTS) is None:
        return True
    return all(is_conversation(read_text(row[key], key)) for key in ("chosen", "rejected"))


def _from_conversations(row: Row, context: Context) -> Record:
    """Whole conversations. A prompt given beside them as a string stands inside already; messages that do not are
    their opening."""
    chosen, rejected = read_messages(row["chosen"], "chosen"), read_messages(row["rejected"], "rejected")
    key = _first(row, ("prompt", "conversations"))
    given = read_text(row[key], key) if key else ()
    if not isinstance(given, str) and not (starts_with(chosen, given) and starts_with(rejected, given)):
        chosen, rejected = (*given, *chosen), (*given, *rejected)
    return _split(row, context, chosen, rejected)


def _split(row: Row, context: Context, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Record:
    """The messages that both conversations share are the prompt."""
    shared = common_prefix(chosen, rejected)
    if not shared and "assistant" not in (chosen[0]["role"], rejected[0]["role"]):
        raise DataError('"chosen" and "rejected" open with different messages, so they share no prompt')
    about = {**_fields(context), "prompt": _with_system(row, chosen[:shared])}
    return PreferencePair(**about, chosen=chosen[shared:], rejected=rejected[shared:])


def _implicit(row: Row) -> bool:
    strings = all(isinstance(row.get(key), str) for key in ("chosen", "rejected"))
    return strings and not any(key in row for key in PROMPTS)


def _from_implicit(row: Row, context: Context) -> Record:
    chosen, rejected = (str(read_text(row[key], key)) for key in ("chosen", "rejected"))
    shared = common_prefix(chosen, rejected)
    about = {**_fields(context), "prompt": chosen[:shared]}
    return PreferencePair(**about, chosen=chosen[shared:], rejected=rejected[shared:])


def _from_pair(row: Row, context: Context) -> Record:
    keys = ["chosen", "rejected"]
    prompt, (chosen, rejected) = _agree(_required_prompt(row), [read_text(row[key], key) for key in keys], keys)
    return PreferencePair(**{**_fields(context), "prompt": prompt}, chosen=chosen, rejected=rejected)


# Rankings.


def _is_ranking(row: Row) -> bool:
    key = _first(row, RESPONSES)
    return key is not None and isinstance(row[key], list | tuple)


def _from_ranking(row: Row, context: Context) -> Record:
    key = str(_first(row, RESPONSES))
    answers = [read_text(answer, f"{key}[{place}]") for place, answer in enumerate(row[key])]
    if len(answers) < 2:
        raise DataError(f'"{key}" holds {len(answers)} answers, where a ranking needs 2 or more')
    column, verdicts = _verdicts(row, key)
    if len(verdicts) != len(answers):
        raise DataError(f'"{key}" holds {len(answers)} answers and "{column}" {len(verdicts)} values')
    scores = [_scored(column, place, verdict) for place, verdict in enumerate(verdicts)]
    prompt, agreed = _agree(_required_prompt(row), answers, [f"{key}[{place}]" for place in range(len(answers))])
    return ranking(_with_prompt(context, prompt), agreed, scores)


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


def _scored(column: str, place: int, verdict: Any) -> float:
    try:
        return SIGNALS[VERDICTS[column]](verdict)
    except DataError as error:
        raise DataError(f'"{column}[{place}]": {error.message}') from None


# Single answers, judged or to imitate.


def _answer_key(row: Row) -> str | None:
    if _first(row, ("messages", "conversations")) and not _has(row, "completion"):
        return _first(row, ("messages", "conversations"))
    return _first(row, ANSWERS) if _first(row, PROMPTS) else None


def _is_unpaired(row: Row) -> bool:
    """A label beside an answer; for columns of other names than KTO's only a label that says true or false."""
    label, answer = next((key for key in LABELS if key in row), None), _answer_key(row)
    if label is None or answer is None:
        return False
    return answer in ("completion", "messages", "conversations") or _is_truth(row[label])


def _is_truth(value: Any) -> bool:
    try:
        truth(value)
    except DataError:
        return False
    return True


def _from_unpaired(row: Row, context: Context) -> Record:
    label = next(key for key in LABELS if key in row)
    if not _is_truth(row[label]):
        raise mistyped(label, row[label], "true or false (rename the column if it does not judge the answer)")
    prompt, completion = _answered(row)
    return Unpaired(**{**_fields(context), "prompt": prompt}, completion=completion, label=truth(row[label]))


def _from_demonstration(row: Row, context: Context) -> Record:
    prompt, completion = _answered(row)
    return Demonstration(**{**_fields(context), "prompt": prompt}, completion=completion)


def _answered(row: Row) -> tuple[Text, Text]:
    """Prompt and answer of a row with one answer; of a conversation the last message is the answer."""
    key = str(_answer_key(row))
    if key in ("messages", "conversations"):
        messages = read_messages(row[key], key)
        if messages[-1]["role"] != "assistant":
            raise DataError(f'"{key}" ends with a message of the role {messages[-1]["role"]!r}, not with an answer')
        return _with_system(row, messages[:-1]), messages[-1:]
    prompt, (completion,) = _agree(_required_prompt(row), [read_text(row[key], key)], [key])
    return prompt, completion


def _from_text(row: Row, context: Context) -> Record:
    if not isinstance(row["text"], str):
        raise mistyped("text", row["text"], "a string")
    return Demonstration(**_fields(context), completion=read_text(row["text"], "text"))


FORMATS: dict[str, Format] = {
    "dialogues": Format(
        r'{"chosen": "\n\nHuman: …\n\nAssistant: …", "rejected": the same with another last answer}',
        _dialogues,
        _from_dialogues,
    ),
    "conversations": Format(
        '{"chosen": [{"role": "user", "content": …}, {"role": "assistant", …}], "rejected": the same with another end}',
        _conversations,
        _from_conversations,
    ),
    "common start": Format(
        '{"chosen": "What is 1 + 1? Two.", "rejected": "What is 1 + 1? Three."}',
        _implicit,
        _from_implicit,
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
        _is_ranking,
        _from_ranking,
    ),
    "judged": Format(
        '{"prompt": …, "completion": …, "label": true}; also "messages" for both',
        _is_unpaired,
        _from_unpaired,
    ),
    "demonstration": Format(
        '{"prompt": …, "completion": …}, or {"messages": […, {"role": "assistant", …}]}',
        lambda row: _answer_key(row) is not None,
        _from_demonstration,
    ),
    "text": Format('{"text": "…"}', lambda row: _has(row, "text"), _from_text),
}
"""Row shapes by name; the first that recognises a row converts it."""


def _why_unknown(row: Row) -> str:
    """What is missing in a row that no shape recognises."""
    nulls = [key for key in ("chosen", "rejected", "completion", "messages", "text", *RESPONSES) if key in row]
    if any(row[key] is None for key in nulls):
        return "; ".join(f'"{key}" is null' for key in nulls if row[key] is None)
    if nulls:
        return "; ".join(f'"{key}" is {found(row[key])}' for key in nulls)
    if _first(row, PROMPTS):
        return f'there is a prompt but no answer: no "chosen" and "rejected", no "completion" (keys: {", ".join(row)})'
    return f"no known shape (keys: {', '.join(map(str, row)) or 'none'})"
