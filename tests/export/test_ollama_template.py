"""A chat template learnt for Ollama renders as the model's own one does, or is not guessed."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_dpo.export.ollama_template import ChatShape, go_template, learn_shape
from support.templates import tokenizer_of

FAMILIES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "chatml with a system message of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "gemma 3": (
        "{{ bos_token }}{% set ns = namespace(first='') %}{% if messages[0].role == 'system' %}"
        "{% set ns.first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ ns.first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "phi 3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}[INST] {{ ns.system }}{{ m.content }}[/INST]{% set ns.system = '' %}"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
}


BOS, EOS = "<s>", "</s>"


def tokenizer(template: str | None, *, adds_bos: bool = True) -> Any:
    """What the learner asks of a tokenizer, with a chat template rendered by jinja alone."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def render(messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        return environment.from_string(str(template)).render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token=BOS, eos_token=EOS
        )

    class Callable(SimpleNamespace):
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 7] if adds_bos else [7]}

    return Callable(chat_template=template, apply_chat_template=render, bos_token=BOS, bos_token_id=1)


def say(shape: ChatShape, messages: list[dict[str, str]]) -> str:
    """A conversation in a learnt shape, by the meaning of its parts."""
    system = [m["content"] for m in messages if m["role"] == "system"]
    text = shape.before_system + system[0] + shape.after_system if system else shape.begin
    last = ""
    for message in messages[len(system) :]:
        text += {"user": shape.to_user if last else "", "assistant": shape.to_assistant}[message["role"]]
        text, last = text + message["content"], message["role"]
    return text + ("" if last == "assistant" else shape.generation)


CONVERSATIONS = [
    [("user", "What is it?")],
    [("system", "Be brief."), ("user", "What is it?")],
    [("user", "What is it?"), ("assistant", 'A "cat" {{ here }}.'), ("user", "And now?")],
    [
        ("system", "Be brief."),
        ("user", "One"),
        ("assistant", "Two"),
        ("user", "Three"),
        ("assistant", "4"),
        ("user", "5"),
    ],
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=len)
def test_a_learnt_template_renders_as_the_models_own(family: str, conversation: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in conversation]
    if family == "gemma" and messages[0]["role"] == "system":  # which refuses it: then it stands before the question
        messages = [{"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]
    own = tokenizer(FAMILIES[family], adds_bos=True)
    shape = learn_shape(own)
    assert shape is not None
    given = [{"role": role, "content": content} for role, content in conversation]
    expected = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert say(shape, given) == expected.removeprefix(BOS)


def test_the_beginning_token_stays_where_nobody_else_adds_it() -> None:
    shape = learn_shape(tokenizer(FAMILIES["llama 3"], adds_bos=False))
    assert shape is not None
    assert shape.begin.startswith(BOS)
    assert shape.before_system.startswith(BOS)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",  # every turn another text
        "{{ messages[-1].content }}",  # only the last turn is shown
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    ],
)
def test_a_template_that_is_not_made_of_constant_texts_is_not_guessed(template: str | None) -> None:
    assert learn_shape(tokenizer(template)) is None


def test_texts_stand_in_the_go_template_as_literals() -> None:
    text = go_template(ChatShape("<a>\n", '"s"\n', "\t", " [b] ", " [c] ", "\\end\n"))
    assert re.findall(r'\{\{ ("(?:[^"\\]|\\.)*") \}\}', text) == [
        json.dumps('"s"\n'), json.dumps("\t"), json.dumps("<a>\n"),
        json.dumps(" [c] "), json.dumps(" [b] "), json.dumps("\\end\n"),
    ]  # fmt: skip
    assert '"""' not in text


def test_a_template_is_learnt_as_it_is_with_thinking_off() -> None:
    qwen = tokenizer_of("qwen3")
    plain, off = learn_shape(qwen), learn_shape(qwen, {"enable_thinking": False})
    assert plain is not None and off is not None
    assert plain.generation.endswith("<|im_start|>assistant\n")
    assert off == plain._replace(generation=plain.generation + "<think>\n\n</think>\n\n")
