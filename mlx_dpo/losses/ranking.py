"""The loss of rankings of K answers."""

from __future__ import annotations

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.views import Rankings

NEVER = -1e30  # a log-weight that no exponential sees, and finite, so that its gradient is 0 rather than NaN


def plackett_luce(rankings: Rankings, config: LossConfig) -> mx.array:
    """Plackett-Luce DPO: of all answers not yet placed, the best one should be drawn first, then the next.

    Σ_k -log( e^r_k / (e^r_k + Σ_{j worse than k} e^r_j) ), r = β lr; gives [R]. For K = 2 it is `sigmoid`.
    Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3.

    Ties: an answer competes with itself and the strictly worse ones, never with its equals. So tied answers do not
    push each other apart, a row of nothing but ties costs 0, and without ties it is Plackett-Luce to the letter.
    Absent answers (rank 0) take no part.
    Example: three answers in order, all rewards equal: log 3 + log 2 = 1.7918; the first two tied: 2 log 2 = 1.3863.
    """
    ratio, rank = rankings.log_ratio, rankings.rank
    lead = config.beta * (ratio[:, None, :] - ratio[:, :, None])  # [R, k, j]: r_j - r_k
    worse = (rank[:, None, :] > rank[:, :, None]) & (rank[:, :, None] > 0)
    return mx.logaddexp(0.0, mx.logsumexp(mx.where(worse, lead, NEVER), axis=-1)).sum(axis=-1)
