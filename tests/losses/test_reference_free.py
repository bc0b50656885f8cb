"""What each loss without a reference says, in worked arithmetic and for tokens that are certain."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.types import TokenLogps
from support.loss_rows import PAIR_RANK, loss_of, rows_of
from support.worked_losses import REFERENCE_FREE


@pytest.mark.parametrize(("loss", "chosen", "rejected", "options", "expected"), REFERENCE_FREE)
def test_without_a_reference_by_hand(
    loss: str, chosen: list[float], rejected: list[float], options: dict[str, Any], expected: float
) -> None:
    assert loss_of(loss, [[chosen, rejected]], **options) == pytest.approx(expected, abs=6e-5)


def test_certain_tokens_leave_orpo_and_unlikelihood_finite() -> None:
    for loss in ("orpo", "unlikelihood"):
        logps, mask = rows_of([[[0.0, 0.0], [0.0, 0.0, -1e-9]]])

        def value(logps: mx.array, mask: mx.array = mask, loss: str = loss) -> mx.array:
            return compute_loss(TokenLogps(logps), None, mask, mx.array([PAIR_RANK]), None, LossConfig(type=loss)).loss

        found, gradient = mx.value_and_grad(value)(logps)
        assert mx.isfinite(found)
        assert mx.isfinite(gradient).all()
