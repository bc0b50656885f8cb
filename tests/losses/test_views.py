"""What a loss reads of a batch: LD-DPO's weights, and batches that lack what a view is made of."""

from __future__ import annotations

import math

import pytest

from support.loss_rows import loss_of


@pytest.mark.parametrize(("alpha", "chosen", "rejected"), [(1.0, -10.0, -5.0), (0.5, -7.5, -5.0), (0.0, -5.0, -5.0)])
def test_ld_dpo_discounts_the_tokens_that_only_the_longer_answer_has(
    alpha: float, chosen: float, rejected: float
) -> None:
    # chosen has 4 tokens of -2.5, rejected 2 of -2.5: two are shared, two count α times; the reference is cut alike
    policy, reference = [[[-2.5] * 4, [-2.5] * 2]], [[[-1.0] * 4, [-1.0] * 2]]
    expected = math.log(1 + math.exp(-0.1 * ((chosen - rejected) - (-2.0 - 2.0 * alpha + 2.0))))
    assert loss_of("sigmoid", policy, reference, beta=0.1, ld_alpha=alpha) == pytest.approx(expected, rel=1e-6)


def test_a_pair_loss_refuses_other_than_two_answers_and_an_unpaired_one_wants_labels() -> None:
    with pytest.raises(ValueError, match="compares two answers"):
        loss_of("sigmoid", [[[-1.0], [-2.0], [-3.0]]], rank=[[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="needs a label"):
        loss_of("kto", [[[-1.0], [-2.0]]])
    with pytest.raises(ValueError, match="log_sum_p2"):
        loss_of("sigmoid", [[[-1.0], [-2.0]]], use_weighting=True)
