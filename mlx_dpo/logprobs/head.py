"""The language-model head on scored positions alone, in chunks, so that logits `[tokens, vocab]` never exist at once.

With a vocabulary of 152,000 the logits of one pair of 1,000 tokens are 1.2 GB in float32, and training wants several
arrays of that size. This is what most memory complaints about DPO are about.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

CHUNK_LOGITS = {"cpu": 2**22, "gpu": 2**23, "large gpu": 2**24}
"""Logits that are made at a time. On a CPU more than these 16 MiB in float32 are no faster (measured). A GPU is idle in
so small products: it gets 64 tokens of a vocabulary of 128,000, and one with many cores twice that. MLX runs ahead by
some ten operations, so that a dozen such arrays live at once; planning traces them."""

LEAST_TOKENS = {"cpu": 32, "gpu": 64, "large gpu": 64}
"""Tokens that are read at a time however large the vocabulary."""

LARGE = ("s", "d")
"""The last letter of what Metal calls the architecture of a Max or an Ultra (mlx/backend/metal/device.cpp)."""

Head = Callable[[mx.array], mx.array]
"""A model's own head: hidden states `[N, hidden]` to raw logits `[N, vocab]`."""


def head_logps(
    head: Head, hidden: mx.array, target: mx.array, stats: tuple[str, ...] = (), *, gradient: bool
) -> mx.array:
    """`token_logps(head(hidden), target, stats)`, `[N, 1 + stats]` float32, computed in chunks of tokens.

    log p of a token depends on that token's hidden state alone, so its gradient is one vector of the hidden size:
    J_n = ∂/∂h_n (logit[target] − logsumexp(logits)) = headᵀ(onehot(target) − softmax). It is computed while the chunk's
    logits are at hand and kept; the backward pass is then cotangent · J, with no logits made again: the value is
    log p + J · (h − h₀), where h₀ is h itself, held fixed. The head itself gets no gradient: it must be frozen.
    """
    chunk = chunk_tokens(head(hidden[:1]).shape[-1], device_size())  # shapes are known without computing
    if not gradient:
        return _by_chunks(lambda h, t: token_logps(head(h), t, stats), hidden, target, chunk)
    width = 1 + len(stats)
    # values and slopes come in one array a chunk: read apart, each reader would keep the chunk's logits alive
    fixed = mx.stop_gradient(hidden)
    out = _by_chunks(lambda h, t: _token_logps_and_slope(head, h, t, stats), fixed, target, chunk)
    values, slope = mx.split(mx.stop_gradient(out), [width], axis=-1)
    moved = ((hidden - fixed).astype(mx.float32) * slope).sum(-1, keepdims=True)  # 0, and its gradient is J
    return mx.concatenate([values[:, :1] + moved, values[:, 1:]], axis=-1)


def chunk_tokens(vocabulary: int, device: str) -> int:
    """Tokens whose logits are made at a time; `device` is a key of `CHUNK_LOGITS`. On a GPU a multiple of 32."""
    tokens = max(LEAST_TOKENS[device], CHUNK_LOGITS[device] // vocabulary)
    return tokens if device == "cpu" else tokens // 32 * 32


def device_size() -> str:
    """The key of `CHUNK_LOGITS` for the device that MLX computes on."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    large = not mx.metal.is_available() or str(mx.device_info().get("architecture", "")).endswith(LARGE)
    return "large gpu" if large else "gpu"


def _by_chunks(
    measure: Callable[[mx.array, mx.array], mx.array], hidden: mx.array, target: mx.array, chunk: int
) -> mx.array:
    """`measure(hidden, target)` of `chunk` tokens at a time, one after the other."""
    parts: list[mx.array] = []
    for start in range(0, hidden.shape[0], chunk):
        piece = hidden[start : start + chunk]
        if parts:
            (piece,) = mx.depends([piece], parts[-1:])  # else MLX, which goes breadth first, makes all logits at once
        parts.append(measure(piece, target[start : start + chunk]))
    return mx.concatenate(parts)


def token_logps(logits: mx.array, target: mx.array, stats: tuple[str, ...]) -> mx.array:
    """`[N, 1 + stats]` float32 from logits `[N, vocab]`: log p of the targets, then each of `stats` (no gradient)."""
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


def _token_logps_and_slope(head: Head, hidden: mx.array, target: mx.array, stats: tuple[str, ...]) -> mx.array:
    """`token_logps` of `head(hidden)` and behind it the gradient of each log p by its hidden state.

    `[N, 1 + stats + hidden]` float32. The vocabulary's exponentials, the dearest operation here, are taken once: for
    the normalizer, for the gradient by the logits (onehot − softmax), and for `stats`.
    """

    def weighted(hidden: mx.array) -> tuple[mx.array, mx.array]:
        logits = head(hidden)
        raw = mx.stop_gradient(logits).astype(mx.float32)
        top = raw.max(axis=-1, keepdims=True)
        weights = mx.exp(raw - top)
        total = weights.sum(axis=-1, keepdims=True)
        p = weights / total
        at = target[:, None]
        log_p = mx.take_along_axis(raw, at, axis=-1) - top - mx.log(total)
        by_logits = mx.put_along_axis(-p, at, 1 - mx.take_along_axis(p, at, axis=-1), axis=-1)
        measures: dict[str, Callable[[], mx.array]] = {
            "entropy": lambda: (top + mx.log(total))[:, 0] - (p * raw).sum(-1),
            "mean_logit": lambda: raw.mean(-1),
            "correct": lambda: (raw.argmax(-1) == target).astype(mx.float32),
            "log_sum_p2": lambda: mx.log((p * p).sum(-1)),
        }
        measured = mx.stack([log_p[:, 0], *(measures[name]() for name in stats)], axis=-1)
        # by_logits is constant here, so the gradient of this sum by `hidden` is headᵀ(onehot − softmax), row by row
        return (logits * by_logits.astype(logits.dtype)).sum(), measured

    cotangents = [mx.array(1.0, hidden.dtype), mx.zeros((hidden.shape[0], 1 + len(stats)))]
    (_, measured), (gradient,) = mx.vjp(weighted, [hidden], cotangents)
    return mx.concatenate([measured, gradient.astype(mx.float32)], axis=-1)
