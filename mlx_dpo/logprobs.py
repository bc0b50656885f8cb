"""log π(y|x), token by token: the heart.

Two ways to the same numbers. `plain_logps` is the definition: the whole model over whole sequences, a logit for every
token of the vocabulary at every position, a log-softmax in float32. `Scorer` leaves out what does not matter: the head
runs on the positions that predict a completion token and on no other, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_dpo.batching import Batch
from mlx_dpo.arrays import TokenLogps
from mlx_dpo.parts import Parts, take_apart

CHUNK_LOGITS = 2**24
"""Logits that the head makes at a time (64 MiB in float32)."""

STATS = ("entropy", "mean_logit", "correct", "log_sum_p2")

Head = Callable[[mx.array], mx.array]


class Scored(NamedTuple):
    """Which predictions of a batch count, as flat arrays over its N scored tokens.

    `position [N]` in the flattened sequences `[R·K·T]`, `target [N]` the token to predict there, `slot [R, K, C]` where
    each completion token's result stands: n + 1 for the n-th scored token, 0 for padding.
    """

    position: mx.array
    target: mx.array
    slot: mx.array


def scored_positions(batch: Batch) -> Scored:
    """The scored tokens of whole sequences, as the plain pass reads them."""
    rows, answers, width = batch.mask.shape
    context = batch.tokens_length.reshape(rows, answers) - batch.completion_length
    r, k, c = np.nonzero(batch.mask)
    sequence = r * answers + k
    position = sequence * batch.tokens.shape[1] + context[r, k] + c - 1
    slot = np.zeros((rows, answers, width), np.int32)
    slot[r, k, c] = np.arange(1, len(r) + 1)
    return Scored(mx.array(position), mx.array(batch.completion[r, k, c]), mx.array(slot))


def plain_logps(model: nn.Module, batch: Batch, stats: tuple[str, ...] = ()) -> TokenLogps:
    """The definition: logits of every position, float32 log-softmax, the completion tokens picked out."""
    logits = model(mx.array(batch.tokens))
    scored = scored_positions(batch)
    picked = logits.reshape(-1, logits.shape[-1])[scored.position]
    return _place(_measure(picked, scored.target, stats), scored.slot, stats)


class Scorer:
    """Log-probs of a model's completions by the shortest way that this model allows."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts = take_apart(model)
        self.head_is_frozen = self.parts is not None and _frozen_outside_blocks(model, self.parts)

    def __call__(self, batch: Batch, stats: tuple[str, ...] = (), *, gradient: bool) -> TokenLogps:
        """Token log-probs `[R, K, C]` of `batch`, with `stats` beside them; `gradient` says whether one will be taken."""
        if self.parts is None or not self.head_is_frozen:
            return plain_logps(self.model, batch, stats)
        scored = scored_positions(batch)
        hidden = self.parts.hidden(mx.array(batch.tokens))
        picked = hidden.reshape(-1, hidden.shape[-1])[scored.position]
        return _place(head_logps(self.parts.logits, picked, scored.target, stats, gradient=gradient), scored.slot, stats)


def head_logps(
    head: Head, hidden: mx.array, target: mx.array, stats: tuple[str, ...] = (), *, gradient: bool
) -> mx.array:
    """What `_measure` gives for `head(hidden)`, `[N, 1 + stats]`, without ever holding `[N, vocab]`.

    log p of a token depends on that token's hidden state alone, so its gradient is one vector of the hidden size:
    J_n = ∂/∂h_n (logit[target] − logsumexp(logits)) = headᵀ(onehot(target) − softmax). It is computed while the chunk's
    logits are at hand and kept; the backward pass is then cotangent · J, with no logits made again. The head itself gets
    no gradient: it must be frozen.
    """
    chunk = max(16, CHUNK_LOGITS // head(hidden[:1]).shape[-1])  # shapes are known without computing
    starts = range(0, hidden.shape[0], chunk)
    if not gradient:
        parts = [_measure(head(hidden[i : i + chunk]), target[i : i + chunk], stats) for i in starts]
        return mx.concatenate(parts)
    width = 1 + len(stats)

    @mx.custom_function
    def score(hidden: mx.array, target: mx.array) -> mx.array:
        # one array a chunk: values and J are consumed together, so a chunk's logits are gone before the next's exist
        parts = [_measure_with_gradient(head, hidden[i : i + chunk], target[i : i + chunk], stats) for i in starts]
        return mx.concatenate(parts)

    @score.vjp
    def pull_back(primals: tuple[mx.array, ...], cotangent: mx.array, out: mx.array) -> tuple[mx.array, ...]:
        hidden, target = primals
        return (cotangent[:, :1] * out[:, width:]).astype(hidden.dtype), mx.zeros_like(target)

    return score(hidden, target)[:, :width]


def _measure(logits: mx.array, target: mx.array, stats: tuple[str, ...]) -> mx.array:
    """`[N, 1 + stats]` float32: log p of the targets, then each of `stats` (without gradient)."""
    raw = logits.astype(mx.float32)
    normalizer = mx.logsumexp(raw, axis=-1)
    columns = [mx.take_along_axis(raw, target[:, None], axis=-1)[:, 0] - normalizer]
    if stats:
        raw, normalizer = mx.stop_gradient(raw), mx.stop_gradient(normalizer)
        log_p = raw - normalizer[:, None]
        measures: dict[str, Callable[[], mx.array]] = {
            "entropy": lambda: -(mx.exp(log_p) * log_p).sum(-1),
            "mean_logit": lambda: raw.mean(-1),
            "correct": lambda: (raw.argmax(-1) == target).astype(mx.float32),
            "log_sum_p2": lambda: mx.logsumexp(2 * log_p, axis=-1),
        }
        columns += [measures[name]() for name in stats]
    return mx.stack(columns, axis=-1)


def _measure_with_gradient(head: Head, hidden: mx.array, target: mx.array, stats: tuple[str, ...]) -> mx.array:
    """`[N, 1 + stats + hidden]` float32: `_measure`, and beside it the gradient of each log p by its hidden state."""

    def weighted(hidden: mx.array) -> tuple[mx.array, mx.array]:
        logits = head(hidden)
        measured = mx.stop_gradient(_measure(logits, target, stats))
        raw = mx.stop_gradient(logits).astype(mx.float32)
        softmax = mx.softmax(raw, axis=-1)
        hit = mx.arange(raw.shape[-1])[None] == target[:, None]
        return (logits * (hit - softmax).astype(logits.dtype)).sum(), measured

    (_, measured), (gradient,) = mx.vjp(weighted, [hidden], [mx.array(1.0, hidden.dtype), mx.zeros((hidden.shape[0], 1 + len(stats)))])
    return mx.concatenate([measured, gradient.astype(mx.float32)], axis=-1)


def _place(measured: mx.array, slot: mx.array, stats: tuple[str, ...]) -> TokenLogps:
    """Flat results `[N, columns]` to `[R, K, C]`, with 0 where nothing is scored."""
    padded = mx.concatenate([mx.zeros((1, measured.shape[1]), measured.dtype), measured])
    placed = padded[slot]
    return TokenLogps(placed[..., 0], **{name: placed[..., 1 + i] for i, name in enumerate(stats)})


def _frozen_outside_blocks(model: nn.Module, parts: Parts) -> bool:
    prefix = f"{parts.path}.layers."
    return all(name.startswith(prefix) for name, _ in tree_flatten(model.trainable_parameters()))
