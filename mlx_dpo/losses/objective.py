"""What a run minimizes: the loss of a micro-batch from its log-probs, its metrics, and its weight in a step.

Training differentiates this, evaluation reports it, and planning traces it: there is no second copy.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_dpo.config import LossConfig
from mlx_dpo.data.batching import Batch
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.losses.metrics import Sums, batch_metrics
from mlx_dpo.losses.mix import mean_over
from mlx_dpo.types import Kind, TokenLogps


def batch_loss(
    policy: TokenLogps, ref_logps: mx.array | None, batch: Batch, config: LossConfig, kind: Kind
) -> tuple[mx.array, Sums]:
    """Mean loss [] and metrics of a micro-batch from log π and log π_ref of its tokens, both `[R, K, C]`.

    `ref_logps` is None for a loss without a reference. `config` and `kind` as in `compute_loss` and `batch_metrics`.
    """
    mask, rank = mx.array(batch.mask), mx.array(batch.rank)
    label = mx.array(batch.label.astype(np.float32)) if kind == "unpaired" else None
    output = compute_loss(policy, ref_logps, mask, rank, label, config)
    weight = batch_weight(batch, config)
    return output.loss, batch_metrics(output, policy, ref_logps, mask, rank, label, kind, weight=weight)


def batch_weight(batch: Batch, config: LossConfig) -> float:
    """How much a micro-batch's loss counts beside others: its scored tokens for a mean over tokens, else its rows.

    Weighted so and divided by the sum of all weights, the micro-batches of a step give the gradient of the whole, as
    1 × 8, 2 × 4 and 8 × 1. TRL's SFTTrainer does the same by `num_items_in_batch`.
    """
    if mean_over(config) == "tokens":
        return float(batch.mask[:, 0].sum())  # of a pair or a ranking only the best answer is imitated
    return float(len(batch.index))
