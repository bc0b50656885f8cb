"""f-divergences: what takes the place of the log-ratio when the constraint to the reference is not the reverse KL.

Each gives f'(π/π_ref) of Wang et al. 2023, "Beyond Reverse KL" (arXiv 2309.16240), up to a constant, from
log π - log π_ref; any shape. All take `alpha`, which `alpha_divergence` alone reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_dpo.losses.numerics import log_sigmoid

LARGEST_EXPONENT = 80.0  # e^80 ≈ 5.5e34 still fits float32; beyond it a score is held constant


def reverse_kl(log_ratio: mx.array, alpha: float) -> mx.array:
    """f'(t) = log t + 1, whose constant cancels: the log-ratio itself, plain DPO."""
    return log_ratio


def forward_kl(log_ratio: mx.array, alpha: float) -> mx.array:
    """f'(t) = -1/t, shifted by 1 so that it is 0 where policy and reference agree: 1 - e^(-log t)."""
    return 1 - mx.exp(mx.minimum(-log_ratio, LARGEST_EXPONENT))


def js_divergence(log_ratio: mx.array, alpha: float) -> mx.array:
    """f'(t) = log(2t / (1 + t)) = log 2 + log σ(log t): bounded above by log 2."""
    return math.log(2) + log_sigmoid(log_ratio)


def alpha_divergence(log_ratio: mx.array, alpha: float) -> mx.array:
    """f'(t) = (t^(α-1) - 1) / (α - 1): reverse KL in the limit α → 1, forward KL at α = 0."""
    if abs(alpha - 1) < 1e-6:
        return log_ratio
    return (mx.exp(mx.minimum((alpha - 1) * log_ratio, LARGEST_EXPONENT)) - 1) / (alpha - 1)


DIVERGENCES: dict[str, Callable[[mx.array, float], mx.array]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
