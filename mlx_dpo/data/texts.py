"""Column values to texts: strings, messages (OpenAI's or ShareGPT's keys), HH dialogues in one string, tool lists.

Every reader here raises a DataError that names the column by the `key` it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_dpo.data.records import Message, Text
from mlx_dpo.errors import DataError

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
"""ShareGPT's names of roles; others stay as they are, since the chat template knows them."""

TEXT_KEYS = ("text", "response", "answer", "completion", "content", "generated_text")
"""Where an answer given as an object, not a message, keeps its text."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Where a message holds its reasoning: most templates read the first, gpt-oss and LFM2.5 the second; the third is what
servers now call it."""

OPENING_ROLES = ("system", "developer", "user")
"""A list that opens with one of these is a whole conversation, not an answer."""

# A marker counts only after an empty line: "\n\nAssistant: Human: hm" is an answer that begins with the word "Human:".
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def found(value: Any) -> str:
    """What a value is, in words for an error."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"{type(value).__name__} {json.dumps(value)}"
    if isinstance(value, str):
        return f"the string {value[:40]!r}{'…' if len(value) > 40 else ''}"
    if isinstance(value, Mapping):
        return f"an object with the keys {', '.join(map(str, value))}" if value else "an empty object"
    if isinstance(value, list | tuple):
        return f"a list that begins with {found(value[0])}" if value else "an empty list"
    return f"a {type(value).__name__}"


def mistyped(key: str, value: Any, wanted: str) -> DataError:
    """The error that names the key, what was found there and what is accepted."""
    return DataError(f'"{key}" is {found(value)}, where {wanted} is needed')


def read_text(value: Any, key: str) -> Text:
    """A column's value as a string or as messages.

    Accepts a string, a list of messages (`role`/`content` or `from`/`value`), one message, an object with a text, and
    any of these alone in a list.
    """
    while isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple | str):
        value = value[0]
    if isinstance(value, str):
        return _whole_characters(value, key)
    if isinstance(value, Mapping):
        if "role" in value or "from" in value:
            return (_message(value, key),)
        for text_key in TEXT_KEYS:
            if isinstance(value.get(text_key), str):
                return _whole_characters(value[text_key], f"{key}.{text_key}")
    elif isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value):
        return tuple(_message(item, f"{key}[{i}]") for i, item in enumerate(value))
    raise mistyped(key, value, "a string or a list of messages")


def read_messages(value: Any, key: str) -> tuple[Message, ...]:
    """A column's value as at least one message."""
    text = read_text(value, key)
    if isinstance(text, str) or not text:
        raise mistyped(key, value, "a list of messages")
    return text


def _whole_characters(text: str, key: str) -> str:
    """The same string; half a surrogate pair (a cut-off emoji) is refused here, since no tokenizer can encode it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'"{key}" holds half a character at position {error.start} (an unpaired surrogate)') from None
    return text


def _message(value: Mapping[str, Any], key: str) -> Message:
    """One message with `role` and `content`; keys that are null go, since templates ask only whether they are there."""
    spelled = {{"from": "role", "value": "content"}.get(name, name): item for name, item in value.items()}
    message = {name: item for name, item in spelled.items() if item is not None}
    role = message.get("role")
    if not isinstance(role, str):
        raise mistyped(f"{key}.role", role, "the name of a role")
    message["role"] = ROLES.get(role, role)
    for name in REASONING_KEYS:
        # an empty one goes as a null does: to a template it would say that the content holds no reasoning either
        if message.get(name) == "":
            del message[name]
        elif name in message:
            message[name] = _content(message[name], f"{key}.{name}")
    if role == "function_call":
        return _tool_call(message, key)
    if "content" not in message and "tool_calls" in message:
        return {**message, "content": ""}
    message["content"] = _content(message.get("content"), f"{key}.content")
    return message


def _content(value: Any, key: str) -> str:
    """A message's content as one string: multi-part content is joined where all parts are text."""
    if isinstance(value, str):
        return _whole_characters(value, key)
    if isinstance(value, list | tuple):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise DataError(f'"{key}" holds parts that are no text; pictures and sound cannot be used here')
        return _whole_characters("".join(texts), key)
    raise mistyped(key, value, "a string")


def _tool_call(message: Mapping[str, Any], key: str) -> Message:
    """ShareGPT's `function_call` turn, whose value is JSON, as an assistant message with `tool_calls`."""
    calls = read_json(message.get("content"), f"{key}.content")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise mistyped(f"{key}.content", message.get("content"), "a call with a name and arguments")
    tool_calls = [{"type": "function", "function": dict(call)} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


def read_json(value: Any, key: str) -> Any:
    """The value itself, or what its JSON says where it is a string: parquet and CSV have no nested columns."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f'"{key}" is a string that is not JSON: {error.msg} (column {error.colno})') from None


def read_objects(value: Any, key: str) -> tuple[Mapping[str, Any], ...] | None:
    """A `tools` column: a list of objects, or JSON of one, or JSON of each; None where there are none."""
    if value is None or value == "":
        return None
    listed = read_json(value, key)
    items = [read_json(item, key) for item in listed] if isinstance(listed, list | tuple) else [listed]
    if not all(isinstance(item, Mapping) for item in items):
        raise mistyped(key, value, "a list of objects")
    return tuple(items) or None


def is_dialogue(text: Any) -> bool:
    """Whether a string is a dialogue as Anthropic's HH data writes it: `\\n\\nHuman: … \\n\\nAssistant: …`."""
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def dialogue_messages(text: str) -> tuple[Message, ...]:
    """The turns of an HH dialogue, stripped of the whitespace around them.

    Two turns of one role in a row (a lost marker between them) become one, joined by an empty line: chat templates
    want the roles to alternate, and nothing that was written gets lost.
    """
    pieces = _TURN.split(text.strip())[1:]
    turns: list[dict[str, str]] = []
    for marker, content in zip(pieces[::2], pieces[1::2], strict=True):
        role = "user" if marker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content.strip()}".strip()
        else:
            turns.append({"role": role, "content": content.strip()})
    return tuple(turns)


def dialogue_prompt(text: str) -> tuple[Message, ...]:
    """The turns of an HH dialogue that waits for its next answer: an empty last assistant turn is left out."""
    turns = dialogue_messages(text)
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def is_conversation(text: Text) -> bool:
    """Whether a text is a whole conversation: messages that open with somebody else than the assistant."""
    return not isinstance(text, str) and len(text) > 1 and text[0]["role"] in OPENING_ROLES


def common_prefix(first: Text, second: Text) -> int:
    """How many messages, or characters, two conversations share before they part (TRL 1.16's `extract_prompt`).

    Where one is the beginning of the other, or both are the same, the last that they share counts as answer, so that
    none is left empty. In strings a space before the parting belongs to the answers.
    """
    shortest = min(len(first), len(second))
    shared = next((i for i in range(shortest) if first[i] != second[i]), None)
    if shared is None:
        return max(shortest - 1, 0)
    # " Two" and " Three" tokenize with their space; left on the prompt it would be a token of its own.
    return shared - 1 if shared and first[shared - 1] == " " else shared


def as_messages(text: Text, role: str) -> tuple[Message, ...]:
    """Messages as they are; a string as the one message of `role`."""
    return ({"role": role, "content": text},) if isinstance(text, str) else text


def starts_with(conversation: Sequence[Message], opening: Sequence[Message]) -> bool:
    """Whether a conversation opens with these very messages and goes on."""
    return len(conversation) > len(opening) and tuple(conversation[: len(opening)]) == tuple(opening)
