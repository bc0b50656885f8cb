"""The columns that all row shapes have in common: prompt, system message, history, tools; and answers made to fit.

What is missing or mistyped is a DataError that names the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_dpo.data import texts
from mlx_dpo.data.records import Context, Message, Text
from mlx_dpo.errors import DataError

Row = Mapping[str, Any]

PROMPTS = ("prompt", "instruction", "question", "query", "input", "conversations", "messages")
"""Columns that hold a prompt, the first of them that a row has. All but `prompt` speak to a chat model: their strings
become the user's message."""

ADDITIONS = ("input", "context")
"""What belongs to an instruction or a question in a column of its own."""

SYSTEMS = ("system", "system_prompt")


def plain(row: Row) -> dict[str, Any]:
    """The row with numpy's arrays and scalars as Python's, and NaN, pandas' word for missing, as null."""
    values = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}
    return {key: None if isinstance(value, float) and value != value else value for key, value in values.items()}


def has(row: Row, *keys: str) -> bool:
    """Whether the row has all these columns, and none of them null."""
    return all(row.get(key) is not None for key in keys)


def first(row: Row, keys: Sequence[str]) -> str | None:
    """The first of these columns that the row has and that is not null."""
    return next((key for key in keys if has(row, key)), None)


def listed_keys(row: Row) -> str:
    """The row's columns, for an error."""
    return ", ".join(map(str, row)) or "none"


def read_context(row: Row, id: str, shape: str) -> Context:
    """What every record has, its prompt still empty: name, tools, arguments of the chat template."""
    given = row.get("id")
    settings = texts.read_json(row.get("chat_template_kwargs") or None, "chat_template_kwargs")
    if settings is not None and not isinstance(settings, Mapping):
        raise texts.mistyped("chat_template_kwargs", settings, "an object")
    return Context(
        id=str(given) if isinstance(given, str | int) and given != "" else id,
        prompt="",
        tools=texts.read_objects(row.get("tools"), "tools"),
        chat_template_kwargs={k: v for k, v in settings.items() if v is not None} if settings else None,
        shape=shape,
    )


def read_prompt(row: Row) -> Text:
    """The prompt of the first column of `PROMPTS` that the row has, with its additions, history and system message."""
    key = first(row, PROMPTS)
    if key is None or ("prompt" in row and row["prompt"] is None and key in ("conversations", "messages")):
        raise DataError(f'"prompt" is {"null" if "prompt" in row else "missing"} (keys: {listed_keys(row)})')
    prompt = texts.read_text(row[key], key)
    if isinstance(prompt, str) and texts.is_dialogue(prompt):
        prompt = texts.dialogue_prompt(prompt)
    elif isinstance(prompt, str) and (key != "prompt" or any(name in row for name in SYSTEMS)):
        additions = [row[name] for name in ADDITIONS if name != key and isinstance(row.get(name), str) and row[name]]
        prompt = (*_history(row), {"role": "user", "content": "\n\n".join([prompt, *additions])})
    return with_system(row, prompt)


def _history(row: Row) -> list[Message]:
    """Earlier turns in a `history` column of [question, answer] lists."""
    history = row.get("history") or []
    turns = [turn for turn in history if isinstance(turn, list | tuple) and len(turn) == 2]
    if not isinstance(history, list) or len(turns) < len(history):
        raise texts.mistyped("history", history, "a list of [question, answer] lists")
    said = [texts.read_text(text, f"history[{i}]") for i, turn in enumerate(turns) for text in turn]
    roles = ("user", "assistant") * len(turns)
    return [message for text, role in zip(said, roles, strict=True) for message in texts.as_messages(text, role)]


def with_system(row: Row, prompt: Text) -> Text:
    """Messages with the row's system column in front, unless they have a system message."""
    key = first(row, SYSTEMS)
    if key is None or row[key] == "" or isinstance(prompt, str) or any(m["role"] == "system" for m in prompt):
        return prompt
    if not isinstance(row[key], str):
        raise texts.mistyped(key, row[key], "a string")
    return ({"role": "system", "content": row[key]}, *prompt)


def fit_answers(row: Row, columns: Mapping[str, Any]) -> tuple[Text, tuple[Text, ...]]:
    """The row's prompt and its answers, by the names of where they stand: as strings all, or as messages all.

    A string among messages becomes a user's prompt or an assistant's answer. An answer that repeats the prompt's
    messages sheds them: kept, they would be scored as if the model had to write them. After a prompt that is an HH
    dialogue an answer is stripped, as its turns are.
    """
    answers = {key: texts.read_text(value, key) for key, value in columns.items()}
    prompt = read_prompt(row)
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers.values()):
        return prompt, tuple(answers.values())
    stripped = texts.is_dialogue(row.get("prompt"))
    opening = () if prompt == "" else texts.as_messages(prompt, "user")
    fitted = []
    for key, answer in answers.items():
        turns = texts.as_messages(answer.strip() if stripped and isinstance(answer, str) else answer, "assistant")
        if opening and texts.starts_with(turns, opening):
            turns = turns[len(opening) :]
        if not turns:
            raise texts.mistyped(key, columns[key], "an answer of at least one message")
        if turns[0]["role"] in texts.OPENING_ROLES:
            raise DataError(f'"{key}" opens with a message of the role "{turns[0]["role"]}" that is not the prompt\'s')
        fitted.append(turns)
    return opening, tuple(fitted)
