"""A few prompts answered at each evaluation, by base and tuned model: what over-training does is seen as it happens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_dpo.data.records import Record, Text
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.events import OnEvent, Progressed, Sample, Sampled
from mlx_dpo.models import lora
from mlx_dpo.models.load import unload_blocks
from mlx_dpo.run.folder import RunFolder
from mlx_dpo.sampling.generate import answer
from mlx_dpo.training.checkpoint import random_key, set_random_key

if TYPE_CHECKING:
    from mlx_dpo.training.setup import PreparedRun

LONGEST_ANSWER = 128
"""Tokens after which an answer is cut: enough to see what it is like, and with the number of prompts the bound of what
an evaluation's answers cost (3 × 128 tokens, twice that the first time)."""


def choose_samples(
    records: Sequence[Record], rows: Sequence[TokenizedRow], train_rows: int, count: int
) -> dict[int, str]:
    """The indices of `count` rows of unlike prompts, with the words of each prompt: the first that are held out (those
    from `train_rows` on) or, where none are, the first to train on. `records` are what the rows were made of."""
    words = {record.id: _words(record.prompt) for record in records}
    chosen: dict[str, int] = {}
    for i in range(train_rows if train_rows < len(rows) else 0, len(rows)):
        if len(chosen) == count:
            break
        if rows[i].prompt:
            chosen.setdefault(words[rows[i].id], i)
    return {i: text for text, i in chosen.items()}


def _words(prompt: Text) -> str:
    """A prompt for people: a string as it is, of messages what was said last."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "") if prompt else ""


def answer_samples(prepared: PreparedRun, run: RunFolder, step: int, on_event: OnEvent, *, last: bool) -> None:
    """Answers the run's prompts greedily, and writes them to samples.jsonl beside the base model's answers.

    Those are the same at every step and written once in a process. The prompts are read as training reads them.
    Training goes on as if nothing had been: the random state is what it was, and no memory is kept.
    """
    prompts = [(text, prepared.rows[i].prompt) for i, text in prepared.samples.items()]
    if not prompts:
        return
    with _nothing_left(prepared):
        if prepared.base_answers is None:
            with lora.switched_off(prepared.loaded.model):
                prepared.base_answers = list(_answers(prepared, prompts, "the base model's answers", on_event))
        tuned = list(_answers(prepared, prompts, "answers", on_event))
    samples = tuple(
        Sample(text, base, answer)
        for (text, _), base, answer in zip(prompts, prepared.base_answers, tuned, strict=True)
    )
    run.append_samples({"step": step} | sample._asdict() for sample in samples)
    on_event(Sampled(step, samples, bool(prepared.held_out), last))


def _answers(
    prepared: PreparedRun, prompts: Sequence[tuple[str, list[int]]], work: str, on_event: OnEvent
) -> Iterator[str]:
    for done, (_, ids) in enumerate(prompts):
        on_event(Progressed(work, done, len(prompts), "prompts"))
        yield answer(prepared.loaded, ids, max_tokens=LONGEST_ANSWER).text
    on_event(Progressed(work, len(prompts), len(prompts), "prompts"))


@contextmanager
def _nothing_left(prepared: PreparedRun) -> Iterator[None]:
    """Puts back what answering changes: random state, and memory that frozen blocks had left and are read into."""
    key = random_key()
    try:
        with redirect_stdout(StringIO()):  # mlx-lm says there that a model is large, which the plan has said before
            yield
    finally:
        if prepared.blocks_unloaded:
            unload_blocks(prepared.loaded, prepared.config.model, prepared.scorer.first_adapted)
        set_random_key(key)  # last: a model that is made anew, to be read lazily, draws numbers
        mx.clear_cache()
