"""KTO and unpaired APO-zero, in worked arithmetic."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import pytest

from mlx_dpo.config import LossConfig
from mlx_dpo.losses.compute import compute_loss
from mlx_dpo.types import TokenLogps
from support.loss_rows import loss_of, rows_of


def judged(ratio: float, mismatched: float) -> tuple[list[list[float]], list[list[float]]]:
    """Policy and reference of a row: its completion's log-ratio and that of the mismatched one."""
    return [[-3.0 + ratio], [-4.0 + mismatched]], [[-3.0], [-4.0]]


def kto_of(rows: list[tuple[float, float, float]], kind: str = "kto", **options: Any) -> float:
    policy, reference = zip(*(judged(ratio, mismatched) for ratio, mismatched, _ in rows), strict=True)
    labels = [label for _, _, label in rows]
    return loss_of(kind, list(policy), list(reference), [[1.0, 0.0]] * len(rows), labels, **options)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kto_measures_from_the_mean_log_ratio_of_mismatched_completions() -> None:
    # z = (2 + 4) / 2 = 3; good with lr 5: 1 - σ(0.1 (5 - 3)); bad with lr 1: 1 - σ(0.1 (3 - 1)), twice
    expected = (1 - sigma(0.2) + 2 * (1 - sigma(0.2))) / 2
    found = kto_of([(5.0, 2.0, 1.0), (1.0, 4.0, -1.0)], beta=0.1, undesirable_weight=2.0)
    assert found == pytest.approx(expected, rel=1e-5)


def test_kto_never_measures_from_below_zero() -> None:
    assert kto_of([(10.0, -6.0, 1.0)], beta=0.1) == pytest.approx(0.2689, abs=5e-5)


def test_ktos_estimate_is_reported_and_is_not_what_is_trained() -> None:
    policy, reference = judged(5.0, 2.0)
    logps, mask = rows_of([policy])
    base, rank, label = rows_of([reference])[0], mx.array([[1.0, 0.0]]), mx.array([1.0])

    def loss(logps: mx.array) -> Any:
        return compute_loss(TokenLogps(logps), base, mask, rank, label, LossConfig(type="kto"))

    output, gradient = mx.value_and_grad(loss)(logps)
    assert output.kl.item() == pytest.approx(2.0, rel=1e-6)
    assert gradient[0, 1].item() == 0.0
    assert gradient[0, 0].item() < 0.0


def test_kto_without_mismatched_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="mismatched completion"):
        loss_of("kto", [[[-1.0]]], [[[-1.0]]], [[1.0]], [1.0])


def test_unpaired_apo_zero_by_hand_with_or_without_the_second_answer() -> None:
    expected = 2 * 0.7311
    assert kto_of([(10.0, 5.0, -1.0)], "apo_zero_unpaired", beta=0.1, undesirable_weight=2.0) == pytest.approx(
        expected, abs=1e-4
    )
    alone = loss_of("apo_zero_unpaired", [[[-3.0]]], [[[-13.0]]], [[1.0]], [-1.0], beta=0.1, undesirable_weight=2.0)
    assert alone == pytest.approx(expected, abs=1e-4)
