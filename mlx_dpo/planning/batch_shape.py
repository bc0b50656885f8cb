"""How large micro-batches are, and what the arrays are for that they are read in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mlx_dpo.data.batching import Batch
from mlx_dpo.data.tokenize import TokenizedRow
from mlx_dpo.logprobs.scorer import Scorer


class BatchShape(NamedTuple):
    """How large a micro-batch is: `rows` of up to `answers`, the longest prompt and the longest completion.

    `tokens` are to be read where each prompt is read once; at `scores` pairs of tokens attention looks, in a head of a
    block.
    """

    rows: int
    answers: int
    prompt: int
    completion: int
    tokens: int
    scores: int


def batch_shape(rows: Sequence[TokenizedRow]) -> BatchShape:
    """The batch_shape of a micro-batch of these rows."""
    lengths = [(len(row.prompt), [len(ids) for ids in row.completions]) for row in rows]
    return BatchShape(
        rows=len(rows),
        answers=max(len(answers) for _, answers in lengths),
        prompt=max(prompt for prompt, _ in lengths),
        completion=max(max(answers) for _, answers in lengths),
        tokens=sum(prompt + sum(answers) for prompt, answers in lengths),
        scores=sum(prompt**2 + sum(n * (prompt + n) for n in answers) for prompt, answers in lengths),
    )


class Widths(NamedTuple):
    """How many tokens look (`queries`), and at how many (`keys`), in the arrays of some micro-batches."""

    queries: frozenset[int]
    keys: frozenset[int]


def part_of(shape: tuple[int, ...], widths: Widths, vocabulary: int) -> str:
    """What an array of a micro-batch is for: nothing but the head has the vocabulary's width, nothing but attention
    looks from tokens at tokens.
    """
    if shape[-1:] == (vocabulary,):
        return "head"
    if len(shape) >= 4 and shape[-1] in widths.keys and shape[-2] in widths.queries:
        return "attention scores"
    if len(shape) == 4 and shape[-2] in widths.keys:
        return "queries, keys, values"
    return "activations"


def attention_widths(scorer: Scorer, batches: Sequence[Batch]) -> Widths:
    """Those of the arrays in which `scorer` and the plain path read these micro-batches."""
    queries, keys = set[int](), set[int]()
    for batch in batches:
        layout = scorer.layout(batch)
        queries |= {batch.tokens.shape[1]}
        for bucket in layout.buckets:
            queries |= {end - start for start, end in scorer.steps(bucket)}
            keys |= {end for _, end in scorer.steps(bucket)}
        for bucket in layout.answers:
            keys |= {end + bucket.before for _, end in scorer.steps(bucket)}
    return Widths(frozenset(queries), frozenset(queries | keys))
