"""The DPO family: each loss a pure function of named log-probs, in one table, and the function that computes a mix of
them."""

from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.losses.mix import (
    accepted_kinds,
    check_loss_config,
    needs_reference,
    parse_mix,
    reads_mismatched,
    row_kind,
    row_separable,
)
from mlx_dpo.losses.objective import batch_loss, batch_weight
from mlx_dpo.losses.table import LOSSES, LossSpec
from mlx_dpo.types import Kind, LossOutput, TokenLogps

__all__ = [
    "LOSSES",
    "Kind",
    "LossOutput",
    "LossSpec",
    "TokenLogps",
    "accepted_kinds",
    "batch_loss",
    "batch_weight",
    "check_loss_config",
    "compute_loss",
    "needs_reference",
    "parse_mix",
    "reads_mismatched",
    "row_kind",
    "row_separable",
]
