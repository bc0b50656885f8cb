"""Imitation: the loss of supervised fine-tuning."""

from __future__ import annotations

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.views import Demonstrations


def sft(rows: Demonstrations, config: LossConfig) -> mx.array:
    """SFT: make the demonstration likely; on pairs the chosen answer, which is Preferred-FT.

    -Σ log π(y|x) / Σ |y|, both sums over the micro-batch, a scalar: a mean over tokens, so that micro-batches add up to
    a large batch only when they are weighted by their tokens. Cross-entropy, and the `sft` term of TRL's mixes.
    Preferred-FT is a baseline of Rafailov et al. 2023 (arXiv 2305.18290), section 6.
    Example: two rows, -6 nats over 3 tokens and -2 over 1: 8 / 4 = 2.
    """
    return token_mean_nll(rows.policy, rows.length)


def token_mean_nll(logps: mx.array, length: mx.array) -> mx.array:
    """-Σ log π / Σ tokens over a micro-batch; `logps` and `length` are [R]; gives a scalar in nats per token."""
    return -logps.sum() / length.sum()
