"""What a chat template makes of messages: the arguments that it reads, and where an answer's own text begins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from mlx_dpo.data.records import Context, Message, Record, Text
from mlx_dpo.data.texts import REASONING_KEYS
from mlx_dpo.errors import UsageError

THINK_BLOCKS = (
    ("<think>", "</think>"),
    ("<|channel>", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""What opens and closes reasoning, by family: Qwen3, DeepSeek-R1, SmolLM3 and most; Gemma 4; gpt-oss; Magistral; …"""

SWITCHES = ("enable_thinking", "thinking")
"""The arguments that turn thinking on and off; DeepSeek-V3.1, Granite and Kimi read the second."""

OWN, REASONING = "\ue000own\ue000", "\ue000reasoning\ue000"
"""Stand-ins for what an answer says, in characters that no template trims or looks for."""


def unwrap(tokenizer: Any) -> Any:
    """The Hugging Face tokenizer inside mlx-lm's wrapper, whose template call adds arguments of its own."""
    inner = getattr(tokenizer, "_tokenizer", None)  # a bare fast tokenizer has one too, of another kind
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def source(tokenizer: Any) -> str:
    """The text of the tokenizer's chat template; empty where it has none, or one that is no Jinja."""
    template = getattr(unwrap(tokenizer), "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else ""


@cache
def names_read(template: str) -> frozenset[str]:
    """The arguments that a Jinja template asks for: everything that it reads and does not set itself."""
    from jinja2 import TemplateError, meta, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' `{% generation %}`, of which only the body matters here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    try:
        tree = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols]).parse(template)
        return frozenset(meta.find_undeclared_variables(tree))
    except TemplateError:
        return frozenset()


@cache
def think_blocks(template: str) -> tuple[tuple[str, str], ...]:
    """Those of `THINK_BLOCKS` that a template writes or looks for."""
    # "<|end|>" alone ends every turn of Phi-3
    return tuple(pair for pair in THINK_BLOCKS if pair[0] in template or (pair[1] in template and pair[1] != "<|end|>"))


def switch(template: str) -> str | None:
    """The argument that turns a template's thinking on and off; None without one."""
    return next((name for name in SWITCHES if name in names_read(template)), None)


def arguments(tokenizer: Any, given: Mapping[str, Any] | None, row: Context | None = None) -> dict[str, Any]:
    """What the template gets beside the messages: `given` for all rows, over it what a row says for itself.

    `enable_thinking` goes under the name by which the template reads it, as mlx-lm's wrapper passes it on.
    """
    alias = switch(source(tokenizer)) or "enable_thinking"
    merged: dict[str, Any] = {}
    for said in (given, row.chat_template_kwargs if row else None):
        for name, value in (said or {}).items():
            if value is not None:
                merged[alias if name == "enable_thinking" else name] = value
    tools = {"tools": [dict(tool) for tool in row.tools]} if row and row.tools else {}
    return {**tools, **merged}


def check_arguments(tokenizer: Any, given: Mapping[str, Any] | None) -> None:
    """Refuses arguments for all rows that the model's template does not read: nothing would come of them.

    Raises:
        UsageError: names what is not read, and what the template has instead.
    """
    template = source(tokenizer)
    given = {name: value for name, value in (given or {}).items() if value is not None}
    if not given or (not template and getattr(unwrap(tokenizer), "chat_template", None)):
        return
    if not template:
        raise UsageError(f"the model has no chat template, which would read {', '.join(given)}", "leave that out")
    reads = names_read(template)
    if not reads:  # no Jinja that can be read: the template's own error will come with the first row
        return
    unread = [n for n in given if n not in reads and not (n == "enable_thinking" and switch(template))]
    if not unread:
        return
    if unread == ["enable_thinking"]:
        said = "thinking cannot be switched on or off: the model's chat template reads no enable_thinking"
    else:
        said = f"the model's chat template reads no {' and no '.join(unread)}"
    if "reasoning_effort" in reads:
        raise UsageError(said, 'it reads how much: --chat-template-kwargs \'{"reasoning_effort": "low"}\'')
    there = sorted(reads & {*SWITCHES, "preserve_thinking", "custom_instructions", "model_identity"})
    raise UsageError(said, f"it reads {', '.join(there)}" if there else "leave that out")


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates want them: reasoning under every key by which one of them may look for it.

    transformers does the same, but not in all the versions that mlx-lm goes with.
    """
    spelled = []
    for message in messages:
        said = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
        spelled.append({**dict.fromkeys(REASONING_KEYS, said), **message} if said else dict(message))
    return spelled


def render(tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool = False, **template: Any) -> str:
    """Messages through the chat template, as text."""
    return unwrap(tokenizer).apply_chat_template(
        template_messages(messages), tokenize=False, add_generation_prompt=generation_prompt, **template
    )


class Rendered(NamedTuple):
    """A record through the chat template.

    `generation` is what a runtime reads before the model answers, `wholes` prompt and answer, one for each answer;
    all of them begin with the same `shared` characters. `own` is where the answers' own text begins in each of the
    wholes, None where it is not said: an answer that brings reasoning lets the template begin otherwise. `prompt` is
    what is to be read before it: up to `own`, and behind that an empty think block which the generation prompt has and
    the template takes off answers, as off earlier turns; None to leave it to the tokens. `thinks` says whether a
    runtime lets the model think, so that its answer is not the first thing that it writes.
    """

    generation: str
    wholes: tuple[str, ...]
    shared: int
    own: int | None
    prompt: str | None
    thinks: bool

    def read(self) -> list[str]:
        """Prompt and answer as they are to be read, one text for each answer."""
        if self.prompt is None:
            return list(self.wholes)
        return [self.prompt + whole[self.own :] for whole in self.wholes]

    def answer(self, k: int) -> str:
        """What the template makes of answer `k`: what stands behind the prompt."""
        return self.wholes[k][min(self.shared, self.own or self.shared) :]


def render_record(record: Record, tokenizer: Any, **template: Any) -> Rendered:
    """What the chat template makes of a record of messages, and which part of it is prompt.

    Raises whatever the template does.
    """
    prompt = _messages(record.prompt)
    generation = render(tokenizer, prompt, generation_prompt=True, **template)
    wholes = tuple(render(tokenizer, (*prompt, *_messages(answer)), **template) for answer in record.completions)
    shared = shared_prefix(generation, *wholes)
    # A template without a word of thinking puts nothing there that is not the runtime's, too.
    if not think_blocks(source(tokenizer)):
        return Rendered(generation, wholes, shared, None, None, False)
    thinks = _thinks(prompt, generation, tokenizer, template)
    before = _before_own_text(record, tokenizer, template)
    if before is None or not all(whole.startswith(before) for whole in wholes):
        return Rendered(generation, wholes, shared, None, None, thinks)
    more = generation[len(before) :] if generation.startswith(before) else ""
    if more and closes_thinking(more, tokenizer) and _takes_off(record, tokenizer, before, more, template):
        return Rendered(generation, wholes, shared, len(before), before + more, thinks)
    if generation.startswith(before):
        return Rendered(generation, wholes, shared, len(before), None, thinks)
    skips = closes_thinking(before, tokenizer) or _gives_way(record, tokenizer, before, template)
    return Rendered(generation, wholes, shared, len(before), before if skips else None, thinks or skips)


def _thinks(prompt: Sequence[Message], generation: str, tokenizer: Any, template: Mapping[str, Any]) -> bool:
    """Whether the generation prompt opens a think block, or would end with a closed one were thinking off."""
    name = switch(source(tokenizer))
    if opens_thinking(generation, tokenizer) or closes_thinking(generation, tokenizer) or name is None:
        return opens_thinking(generation, tokenizer)
    return closes_thinking(render(tokenizer, prompt, generation_prompt=True, **{**template, name: False}), tokenizer)


def closes_thinking(text: str, tokenizer: Any) -> bool:
    """Whether a text ends with a think block that is closed."""
    return any(text.rstrip().endswith(closes) for _, closes in think_blocks(source(tokenizer)))


def opens_thinking(text: str, tokenizer: Any) -> bool:
    """Whether a text ends where a think block opens."""
    return any(text.rstrip().endswith(opens) for opens, _ in think_blocks(source(tokenizer)))


def keeps_reasoning(tokenizer: Any, **template: Any) -> bool:
    """Whether a template writes the reasoning that an answer's message holds under a key of its own."""
    messages = [{"role": "user", "content": "?"}, _stand_in({"role": "assistant"}, REASONING)]
    text = _try_render(tokenizer, messages, template)
    return text is not None and REASONING in text


def _stand_in(message: Message, reasoning: str = "", block: str = "") -> Message:
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    return {**kept, "content": block + OWN} | (dict.fromkeys(REASONING_KEYS, reasoning) if reasoning else {})


def _before_own_text(record: Record, tokenizer: Any, template: Mapping[str, Any], **more: str) -> str | None:
    """The text up to what an answer says that brings no reasoning, or `more`; None where the template hides it."""
    prompt, answer = _messages(record.prompt), _messages(record.completions[0])
    if not answer or answer[0]["role"] != "assistant":
        return None
    text = _try_render(tokenizer, (*prompt, _stand_in(answer[0], **more), *answer[1:]), template)
    return text.partition(OWN)[0] if text is not None and OWN in text else None


def _messages(text: Text) -> tuple[Message, ...]:
    assert not isinstance(text, str)  # strings go through no template
    return text


def _takes_off(record: Record, tokenizer: Any, before: str, block: str, template: Mapping[str, Any]) -> bool:
    """Whether the template removes an empty think block from an answer that brings it."""
    return _before_own_text(record, tokenizer, template, block=block) == before


def _gives_way(record: Record, tokenizer: Any, before: str, template: Mapping[str, Any]) -> bool:
    """Whether what stands before an answer without reasoning stands there in reasoning's place."""
    other = _before_own_text(record, tokenizer, template, reasoning=REASONING)
    return other is not None and REASONING in other and not other.startswith(before)


def _try_render(tokenizer: Any, messages: Sequence[Message], template: Mapping[str, Any]) -> str | None:
    from jinja2.exceptions import TemplateError

    try:
        return render(tokenizer, messages, **template)
    except (TemplateError, ValueError, TypeError, KeyError):
        return None


def shared_prefix(*sequences: Any) -> int:
    """How many items, characters or tokens, all sequences begin with alike."""
    first, last = min(sequences), max(sequences)  # what these two share all between them share
    return next((i for i, item in enumerate(first) if item != last[i]), len(first))


def squashed(text: str) -> str:
    """A text without whitespace, of which templates add and take some."""
    return re.sub(r"\s+", "", text)
