"""DPO under another divergence than the reverse KL, in worked arithmetic and at its limits."""

from __future__ import annotations

from typing import Any

import pytest

from support.loss_rows import loss_of, pair
from support.worked_losses import DIVERGENT


@pytest.mark.parametrize(("loss", "ratios", "options", "expected"), DIVERGENT)
def test_another_divergence_by_hand(
    loss: str, ratios: tuple[float, ...], options: dict[str, Any], expected: float
) -> None:
    policy, reference = pair(*ratios)  # type: ignore[arg-type]
    assert loss_of(loss, policy, reference, **options) == pytest.approx(expected, abs=6e-5)


def test_alpha_divergence_runs_from_forward_to_reverse_kl() -> None:
    policy, reference = pair(0.7, -0.4)

    def at(alpha: float) -> float:
        options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
        return loss_of("sigmoid", policy, reference, beta=1.0, **options)

    assert at(0.0) == pytest.approx(loss_of("sigmoid", policy, reference, beta=1.0, f_divergence_type="forward_kl"))
    assert at(1.0) == pytest.approx(loss_of("sigmoid", policy, reference, beta=1.0))
    assert at(1.0001) == pytest.approx(at(1.0), rel=1e-3)
