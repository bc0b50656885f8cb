"""Losses of completions that are judged good or bad one by one. Each takes `Unpaired` and the settings and gives
[R]."""

from __future__ import annotations

import mlx.core as mx

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.views import Unpaired


def kto(rows: Unpaired, config: LossConfig) -> mx.array:
    """KTO: how much a person gains or loses by an answer, measured from what the policy usually gives.

    λ_D (1 - σ(r - βz)) for a good answer, λ_U (1 - σ(βz - r)) for a bad one, with r = β lr, z of `mismatched_kl`,
    λ_D = `desirable_weight`, λ_U = `undesirable_weight`. z is shared by the micro-batch, so micro-batches do not add up
    to a large batch; the larger they are, the better z is known.
    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7.
    Example: r = 1, z = 0, λ = 1, good: 1 - σ(1) = 0.2689.
    """
    if rows.kl is None:
        raise ValueError("kto needs a mismatched completion as each row's second answer")
    return _weight(rows, config) * mx.sigmoid(-rows.label * config.beta * (rows.log_ratio - rows.kl))


def apo_zero_unpaired(rows: Unpaired, config: LossConfig) -> mx.array:
    """APO-zero, unpaired: raise good answers and lower bad ones, measured from the reference.

    λ_D (1 - σ(r)) for a good answer, λ_U σ(r) for a bad one: KTO with z = 0, and so a mean over rows.
    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7; in TRL a loss of the KTOTrainer.
    Example: r = 1, bad, λ_U = 2: 2 σ(1) = 1.4621.
    """
    return _weight(rows, config) * mx.sigmoid(-rows.label * config.beta * rows.log_ratio)


def _weight(rows: Unpaired, config: LossConfig) -> mx.array:
    return mx.where(rows.label > 0, config.desirable_weight, config.undesirable_weight)
