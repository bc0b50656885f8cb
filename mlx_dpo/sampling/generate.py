"""Answers of a model to prompts: one by one as mlx-lm streams them, with and without the adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_dpo.config import ModelConfig
from mlx_dpo.data.records import Message, Text
from mlx_dpo.data.template import arguments, check_arguments, unwrap
from mlx_dpo.data.tokenize import encode_text
from mlx_dpo.errors import DataError, UsageError
from mlx_dpo.models import lora
from mlx_dpo.models.load import LoadedModel, load

Prompt = str | Sequence[Message]
"""What the user says, or the messages of a conversation so far."""

OnToken = Callable[[str], Any]
"""Hears each piece of text as soon as it is there."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote. `finish` is stop (it ended by itself) or length (`max_tokens` were reached)."""

    text: str
    tokens: int
    finish: str
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt: of the base model and of the tuned one."""

    prompt: Prompt
    base: Answer
    tuned: Answer


def load_tuned(model: ModelConfig) -> LoadedModel:
    """A model with its adapter (`model.adapter`, an mlx-lm or PEFT folder) on it, ready to answer.

    Raises:
        MlxDpoError: the model or the adapter cannot be used.
    """
    loaded = load(model)
    if model.adapter:
        lora.load(loaded.model, model.adapter)
    return loaded


def generate(
    loaded: LoadedModel,
    prompts: Iterable[Prompt],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    adapter: bool = True,
    raw: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_token: OnToken | None = None,
) -> Iterator[Answer]:
    """An answer to each prompt, in order; greedy unless `temp` is above 0.

    A string goes through the chat template as one user message, as `mlx_lm.generate` does it, unless `raw` is set or
    the model has no template, which gets the `chat_template_kwargs` beside it. `seed` starts the random numbers anew
    for each prompt. `adapter` false leaves the adapter off while the answer is written.

    Raises:
        DataError: messages for a model without chat template, or a prompt that tokenizes to nothing.
        UsageError: `max_tokens`, `temp` or `top_p` out of range, or an argument that the template does not read.
    """
    _check(max_tokens, temp, top_p)
    if not raw:
        check_arguments(loaded.tokenizer, chat_template_kwargs)
    for prompt in prompts:
        with nullcontext() if adapter else lora.switched_off(loaded.model):
            if seed is not None:
                mx.random.seed(seed)
            ids = encode(loaded, prompt, raw=raw, chat_template_kwargs=chat_template_kwargs)
            yield answer(loaded, ids, max_tokens=max_tokens, temp=temp, top_p=top_p, on_token=on_token)


def compare(
    loaded: LoadedModel,
    prompts: Iterable[Prompt],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    raw: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_token: Callable[[str, str], Any] | None = None,
) -> Iterator[Comparison]:
    """Both models' answers to each prompt: the adapter off, then on. `on_token(side, text)` hears "base" and "tuned".

    Raises:
        UsageError: the model has no adapter, or a setting is out of range.
        DataError: a prompt that cannot be used.
    """
    if not lora.parameters(loaded.model):
        raise UsageError("nothing to compare: the model has no adapter", "name one with --adapter")
    for prompt in prompts:
        answers = []
        for side, on in (("base", False), ("tuned", True)):
            hear = None if on_token is None else (lambda text, side=side: on_token(side, text))
            found = generate(
                loaded, [prompt], max_tokens=max_tokens, temp=temp, top_p=top_p, seed=seed,
                adapter=on, raw=raw, chat_template_kwargs=chat_template_kwargs, on_token=hear,
            )  # fmt: skip
            answers += list(found)
        yield Comparison(prompt, *answers)


def encode(
    loaded: LoadedModel, prompt: Prompt, *, raw: bool = False, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """The token ids that the model reads before it answers."""
    tokenizer = unwrap(loaded.tokenizer)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    text: Text = prompt if isinstance(prompt, str) else tuple(prompt)
    if isinstance(text, str) and has_template and not raw:
        text = ({"role": "user", "content": text},)
    if not isinstance(text, str) and not has_template:
        raise DataError(
            "the prompt is a list of messages, but the model's tokenizer has no chat template",
            "use an instruction-tuned model, or give plain strings",
        )
    ids = encode_text(tokenizer, text, generation_prompt=True, **arguments(tokenizer, chat_template_kwargs))
    if not ids:
        raise DataError("an empty prompt: there is nothing to continue", "give at least one word")
    return ids


def stop_tokens(loaded: LoadedModel) -> set[int]:
    """Every token that ends an answer, as mlx-lm's wrapper and the model's configuration name them."""
    return {int(token) for token in loaded.wrapper.eos_token_ids} | end_tokens(loaded.tokenizer, loaded.config)


def end_tokens(tokenizer: Any, config: dict[str, Any]) -> set[int]:
    """The tokenizer's end of sequence, and those of `config`, into which mlx-lm reads generation_config.json too."""
    named = config.get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    return {int(token) for token in [*ids, unwrap(tokenizer).eos_token_id] if token is not None}


def answer(
    loaded: LoadedModel,
    ids: list[int],
    *,
    max_tokens: int,
    temp: float = 0.0,
    top_p: float = 1.0,
    on_token: OnToken | None = None,
) -> Answer:
    """The answer to a prompt of token ids, by the model as it is, in evaluation mode; greedy unless `temp` is above 0.

    A greedy answer draws no random number.
    """
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    loaded.model.eval()
    # mlx-lm's wrapper alone may know one end of several: an instruct model would go on past the end of its turn
    loaded.wrapper.eos_token_ids = stop_tokens(loaded)
    began = time.perf_counter()
    pieces, last = [], None
    sampler = make_sampler(temp, top_p)
    for last in stream_generate(loaded.model, loaded.wrapper, ids, max_tokens=max_tokens, sampler=sampler):
        pieces.append(last.text)
        if on_token is not None and last.text:
            on_token(last.text)
    assert last is not None  # max_tokens is above 0, so at least one response came
    stopped = last.finish_reason == "stop"
    tokens = last.generation_tokens - stopped
    return Answer("".join(pieces), tokens, str(last.finish_reason), len(ids), time.perf_counter() - began)


def _check(max_tokens: int, temp: float, top_p: float) -> None:
    wrong = {
        f"--max-tokens {max_tokens} must be at least 1": max_tokens < 1,
        f"--temp {temp} must not be negative": temp < 0,
        f"--top-p {top_p} must lie in (0, 1]": not 0 < top_p <= 1,
    }
    if any(wrong.values()):
        raise UsageError("; ".join(said for said, is_so in wrong.items() if is_so))
