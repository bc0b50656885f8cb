"""Functions of log-probs that overflow when they are written down as in the papers."""

from __future__ import annotations

import mlx.core as mx


def log_sigmoid(x: mx.array) -> mx.array:
    """log σ(x) = -log(1 + e^-x), element-wise; finite, with the gradient σ(-x), for every finite x."""
    return -mx.logaddexp(0.0, -x)


def smoothed_nll(logits: mx.array, flipped: float) -> mx.array:
    """-(1 - ε) log σ(x) - ε log σ(-x), element-wise: the logistic loss of a label that is wrong with probability ε."""
    return -(1 - flipped) * log_sigmoid(logits) - flipped * log_sigmoid(-logits)


def log_one_minus_exp(x: mx.array) -> mx.array:
    """log(1 - e^x) for log-probs x ≤ 0, element-wise.

    Two forms, each exact on its side of -log 2. A log-prob that float32 cannot tell from 0 is taken as -1e-6, so that a
    certain token costs 13.8 nats rather than infinity.
    """
    x = mx.minimum(x, -1e-6)
    near_zero = x > -0.6931
    return mx.where(
        near_zero,
        mx.log(-mx.expm1(mx.where(near_zero, x, -1.0))),
        mx.log1p(-mx.exp(mx.where(near_zero, -1.0, x))),
    )
