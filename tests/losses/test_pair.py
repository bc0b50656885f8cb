"""What each loss of pairs against a reference says, in worked arithmetic, and what holds between them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from support.loss_rows import loss_of, pair
from support.worked_losses import PAIRWISE


@pytest.mark.parametrize(("loss", "ratios", "options", "expected"), PAIRWISE)
def test_against_a_reference_by_hand(
    loss: str, ratios: tuple[float, ...], options: dict[str, Any], expected: float
) -> None:
    policy, reference = pair(*ratios)  # type: ignore[arg-type]
    assert loss_of(loss, policy, reference, **options) == pytest.approx(expected, abs=6e-5)


def test_where_policy_and_reference_agree_dpo_starts_at_log_2() -> None:
    answers = [[[-1.5, -0.25], [-3.0]], [[-0.5], [-2.0, -2.5]]]
    assert loss_of("sigmoid", answers, answers) == pytest.approx(math.log(2), rel=1e-7)


def test_aot_pairs_the_sorted_differences() -> None:
    # differences under the policy 3, 1, under the reference 0, 2: sorted apart 1, 1; row by row 3, -1
    policy, reference = [[[-1.0], [-4.0]], [[-1.0], [-2.0]]], [[[-1.0], [-1.0]], [[-1.0], [-3.0]]]
    assert loss_of("aot", policy, reference, beta=1.0) == pytest.approx(-math.log(1 / (1 + math.exp(-1))))
    rows = -(math.log(1 / (1 + math.exp(-3))) + math.log(1 / (1 + math.exp(1)))) / 2
    assert loss_of("sigmoid", policy, reference, beta=1.0) == pytest.approx(rows)


def test_aot_unpaired_pairs_the_sorted_log_ratios() -> None:
    policy, reference = (
        [[[-1.0], [-5.0]], [[-3.0], [-3.0]]],
        [[[-4.0], [-5.0]], [[-4.0], [-5.0]]],
    )  # lr_w 3, 1; lr_l 0, 2
    smoothed = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))
    found = loss_of("aot_unpaired", policy, reference, beta=1.0, label_smoothing=0.1)
    assert found == pytest.approx(smoothed, rel=1e-6)


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    # Averaged over labels of which a share ε is flipped it is the clean loss: that is what it is for.
    policy, reference = pair(4, -1)
    (chosen, rejected), (chosen_base, rejected_base) = policy[0], reference[0]
    flipped_policy, flipped_reference = [[rejected, chosen]], [[rejected_base, chosen_base]]
    options = {"beta": 0.1, "label_smoothing": 0.2}
    noisy = 0.8 * loss_of("robust", policy, reference, **options) + 0.2 * loss_of(
        "robust", flipped_policy, flipped_reference, **options
    )
    assert noisy == pytest.approx(loss_of("sigmoid", policy, reference, beta=0.1), rel=1e-6)


def test_conservative_dpo_is_least_where_the_model_is_as_sure_as_the_labels() -> None:
    # σ(βΔ) = 1 - ε = 0.9 at βΔ = log 9
    best = math.log(9) / 0.1
    losses = [loss_of("cdpo", *pair(margin, 0), beta=0.1, label_smoothing=0.1) for margin in (best - 1, best, best + 1)]
    assert losses[1] < losses[0]
    assert losses[1] < losses[2]
