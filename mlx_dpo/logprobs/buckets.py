"""Which sequences of a batch are read together: prompts apart from their answers, in buckets of like length.

One array of many sequences is as wide as the longest of them, and every block computes the padding too. A batch of
pairs is mostly padding where one answer is long; read in buckets, each as wide as its own longest, it has little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlx_dpo.data.batching import Batch

BUCKET_OVERHEAD = 48
"""Tokens of padding that cost as much as one more bucket: each block is called, and its weights are read, once more.
Measured on a CPU with a small model; how much it is on a GPU depends on the chip and on the model."""

ONE_BUCKET = 10**9
"""An overhead of more tokens than any batch has: all its sequences are one bucket."""

Span = tuple[int, int, int, int]
"""What lies where in a sequence, as the activation cache keeps it by row: first column here, row of the batch, first
token among the row's cached states, number of tokens."""

SHORTEST = 2
"""Tokens that are read on top of a prompt at least: for a single one mlx-lm takes a kernel without a gradient in Mamba
blocks on Metal."""


class Bucket(NamedTuple):
    """Sequences that are read as one array.

    `sequences` are their indices among all prompts (or all answers) of the batch, `tokens [n, width]` has them padded
    on the right, `spans` says for each of them which of its row's states it holds. `before` tokens at most stand before
    them, in their prompts.
    """

    sequences: list[int]
    tokens: np.ndarray
    spans: list[list[Span]]
    before: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """`[n]`: how many tokens of each sequence are real."""
        return np.array([sum(count for *_, count in spans) for spans in self.spans], np.int32)

    @property
    def padded_lengths(self) -> np.ndarray | None:
        """The same; None where nothing is padded."""
        return self.lengths if (self.lengths < self.tokens.shape[1]).any() else None


class Layout(NamedTuple):
    """How a batch is read. `prompts` come first, one sequence a row; then `answers`, one a completion, on top of them.

    Without `prompts` the answers are whole sequences. `before [R]` counts the tokens of each row's prompt that are read
    with `prompts`. `position [R, K, C]` is where, in the answers' buckets flattened and laid end to end, the hidden
    state stands that predicts a completion token.
    """

    prompts: list[Bucket]
    answers: list[Bucket]
    before: np.ndarray
    position: np.ndarray

    @property
    def buckets(self) -> list[Bucket]:
        """All of them in the order in which they are read."""
        return [*self.prompts, *self.answers]


def split_prompts(batch: Batch, bucket_overhead: int = BUCKET_OVERHEAD, *, pad_prompts: bool = True) -> Layout:
    """Each prompt once, for all the answers that continue it; without `pad_prompts` in buckets of one length each.

    A prompt is read without its last token, which goes in front of each answer instead: that token predicts the
    answer's first one. So prompts are read for what they leave in the caches alone, and every hidden state that is
    scored comes out of the answers' pass. No prompt may be empty.
    """
    before = batch.prompt_length - 1
    prompts = [batch.prompt[r, : before[r]] for r in range(len(before))]
    sequences: list[np.ndarray] = []
    spans: list[list[Span]] = []
    for r, k, start in _answers(batch):
        count = int(batch.completion_length[r, k])
        last = batch.prompt[r, before[r] : before[r] + min(count, 1)]
        sequences.append(np.concatenate([last, batch.completion[r, k, : max(count - 1, 0)]]))
        spans.append([(0, r, int(before[r]), len(last)), (len(last), r, start, len(sequences[-1]) - len(last))])
    answers = batch.completion.shape[1]
    buckets = [
        bucket._replace(before=max(1, int(before[[i // answers for i in bucket.sequences]].max())))
        for bucket in _buckets(sequences, spans, bucket_overhead, at_least=SHORTEST)
    ]
    own = [[(0, r, 0, len(prompt))] for r, prompt in enumerate(prompts)]
    context = np.ones(len(sequences), np.int32)
    # a prompt of one token has nothing left to read, but its answers still look for its keys: keep it, empty
    overhead = bucket_overhead if pad_prompts else 0
    return Layout(
        _buckets(prompts, own, overhead, keep_empty=True), buckets, before, _position(batch, buckets, context)
    )


def whole_sequences(batch: Batch, bucket_overhead: int = BUCKET_OVERHEAD) -> Layout:
    """Each answer behind its prompt; the last token, which predicts nothing, is left out."""
    rows, answers, _ = batch.completion.shape
    sequences: list[np.ndarray] = []
    spans: list[list[Span]] = []
    for r, k, start in _answers(batch):
        index = r * answers + k
        count, length = int(batch.completion_length[r, k]), int(batch.tokens_length[index])
        prompt = length - count
        sequences.append(batch.tokens[index, : length - 1 if count else 0])
        spans.append([(0, r, 0, prompt), (prompt, r, start, max(count - 1, 0))] if count else [])
    buckets = _buckets(sequences, spans, bucket_overhead)
    context = batch.tokens_length - batch.completion_length.reshape(-1)
    return Layout([], buckets, np.zeros(rows, np.int32), _position(batch, buckets, context))


def bucket_by_length(lengths: Sequence[int], bucket_overhead: int) -> list[list[int]]:
    """Indices of `lengths` in buckets that cost least: padded tokens, and `bucket_overhead` for each bucket, in sum.

    Sorted by length, the best buckets are runs of neighbours, so dynamic programming over where the last run begins
    finds them exactly.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    cost, cut = [0], [0]
    for end in range(1, len(order) + 1):
        width = lengths[order[end - 1]]
        best = min(range(end), key=lambda start: cost[start] + width * (end - start))
        cost.append(cost[best] + width * (end - best) + bucket_overhead)
        cut.append(best)
    buckets, end = [], len(order)
    while end:
        buckets.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return buckets[::-1]


MOST_STEPS = 8
"""Steps of a chunked prefill at most. With so many, 7/16 of all pairs of tokens are left out, of 1/2 that are masked;
and each step keeps the keys and values of those before it for the backward pass once more."""


def prefill_steps(bucket: Bucket, size: int) -> list[tuple[int, int]]:
    """Where each step of a chunked prefill begins and ends: equal ones of about `size` tokens, or a single one for 0.

    A step is not shorter than the prompts that stand before it, whose keys and values it reads again; nor is it a
    single token (`SHORTEST`).
    """
    width = bucket.tokens.shape[1]
    count = min(MOST_STEPS, max(1, round(width / max(size, bucket.before, SHORTEST + 1)))) if size else 1
    cuts = [width * i // count for i in range(count + 1)]
    return list(pairwise(cuts))


def padding_share(buckets: Iterable[Bucket]) -> float:
    """Share of the tokens in these buckets that are padding, from 0 to 1."""
    read = real = 0
    for bucket in buckets:
        read += bucket.tokens.size
        real += int(bucket.lengths.sum())
    return 1 - real / read


def _answers(batch: Batch) -> list[tuple[int, int, int]]:
    """Row, answer, and where its states begin among the row's: the prompt's come first, then each answer's but the last
    token's.
    """
    found = []
    for r, lengths in enumerate(batch.completion_length):
        start = int(batch.prompt_length[r])
        for k, count in enumerate(lengths):
            found.append((r, k, start))
            start += max(int(count) - 1, 0)
    return found


def _buckets(
    sequences: Sequence[np.ndarray],
    spans: Sequence[list[Span]],
    bucket_overhead: int,
    *,
    keep_empty: bool = False,
    at_least: int = 1,
) -> list[Bucket]:
    """The sequences in arrays padded to `at_least` that width; absent answers, which are empty, are left out unless
    `keep_empty`.
    """
    lengths = [len(sequence) for sequence in sequences]
    wanted = [i for i, length in enumerate(lengths) if length or keep_empty] or [0]
    buckets = []
    for chosen in bucket_by_length([lengths[i] for i in wanted], bucket_overhead):
        members = [wanted[i] for i in chosen]
        tokens = np.zeros((len(members), max(at_least, *(lengths[i] for i in members))), np.int32)
        for line, i in enumerate(members):
            tokens[line, : lengths[i]] = sequences[i]
        buckets.append(Bucket(members, tokens, [spans[i] for i in members]))
    return buckets


def _position(batch: Batch, buckets: Sequence[Bucket], context: np.ndarray) -> np.ndarray:
    """`Layout.position`; `context [R·K]` tokens stand before an answer's first one in its sequence."""
    columns = batch.completion.shape[2]
    found = np.zeros((batch.completion.shape[0] * batch.completion.shape[1], columns), np.int64)
    base = 0
    for bucket in buckets:
        width = bucket.tokens.shape[1]
        for line, i in enumerate(bucket.sequences):
            found[i] = base + line * width + context[i] - 1 + np.arange(columns)
        base += bucket.tokens.size
    return found.reshape(batch.completion.shape)
