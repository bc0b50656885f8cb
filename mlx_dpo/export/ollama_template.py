"""A model's chat template in Ollama's language, learnt from how the model's own one renders a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_dpo.data.template import arguments, check_arguments, unwrap

SYSTEM, TURNS = "@Ruled@", tuple(f"@Said{n}@" for n in range(5))
"""Stand-ins for what is said; user and assistant take turns, and the user has the last word."""


class ChatShape(NamedTuple):
    """The constant texts of a chat template, between what system, user and assistant say."""

    begin: str  # before the first user message, where there is no system message
    before_system: str
    after_system: str  # up to the first user message
    to_assistant: str  # from a user message to the assistant's
    to_user: str  # from an assistant's message to the user's
    generation: str  # after the last user message, where the answer begins


def learn_shape(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> ChatShape | None:
    """The shape of the tokenizer's chat template, given these arguments.

    None without a template, or where it is not made of constant texts. The beginning-of-sequence token is left to the
    runtime where the tokenizer adds it by itself. A template that refuses system messages gets them before the first
    user message, with an empty line between, as Gemma's do.
    """
    tokenizer = unwrap(tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        return None
    check_arguments(tokenizer, chat_template_kwargs)
    given = arguments(tokenizer, chat_template_kwargs)
    plain, instructed = _render(tokenizer, TURNS, None, given), _render(tokenizer, TURNS, SYSTEM, given)
    if plain is None:
        return None
    begin, *between, generation = plain
    before, after = begin, "\n\n"
    if instructed is not None:
        before, after, *rest = instructed
        if rest != [*between, generation]:
            return None
    if len({between[0], between[2]}) > 1 or len({between[1], between[3]}) > 1:
        return None
    bos = tokenizer.bos_token or ""
    if bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        begin, before = begin.removeprefix(bos), before.removeprefix(bos)
    return ChatShape(begin, before, after, between[0], between[1], generation)


def _render(tokenizer: Any, turns: Sequence[str], system: str | None, given: Mapping[str, Any]) -> list[str] | None:
    """The texts around and between what is said; None where the template refuses it, drops it or says it twice."""
    from jinja2.exceptions import TemplateError

    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)
    except TemplateError:
        return None
    said = [message["content"] for message in messages]
    parts = re.split(f"({'|'.join(map(re.escape, said))})", whole)
    return parts[::2] if parts[1::2] == said else None


def go_template(shape: ChatShape) -> str:
    """The same template for Ollama, in the language of Go's text/template; texts are literals, so no space is lost."""

    def text(value: str) -> str:
        return f"{{{{ {json.dumps(value, ensure_ascii=False)} }}}}" if value else ""

    system = f"{text(shape.before_system)}{{{{ .System }}}}{text(shape.after_system)}"
    return (
        '{{- $last := "" -}}\n'
        f"{{{{- if .System }}}}{system}{{{{ else }}}}{text(shape.begin)}{{{{ end -}}}}\n"
        "{{- range .Messages -}}\n"
        f'{{{{- if and (eq .Role "user") (eq $last "assistant") }}}}{text(shape.to_user)}{{{{ end -}}}}\n'
        f'{{{{- if eq .Role "assistant" }}}}{text(shape.to_assistant)}{{{{ end -}}}}\n'
        '{{- if ne .Role "system" }}{{ .Content }}{{ $last = .Role }}{{ end -}}\n'
        "{{- end -}}\n"
        f'{{{{- if ne $last "assistant" }}}}{text(shape.generation)}{{{{ end -}}}}'
    )
