"""SFT: cross-entropy over the tokens of a micro-batch, on demonstrations and on chosen answers."""

from __future__ import annotations

import pytest

from support.loss_rows import loss_of


def test_sft_is_the_mean_over_the_batchs_tokens() -> None:
    assert loss_of("sft", [[[-1.0, -2.0, -3.0]], [[-2.0]]], rank=[[1.0], [1.0]]) == pytest.approx(8 / 4)


def test_sft_on_pairs_is_preferred_ft_and_sees_the_chosen_answer_alone() -> None:
    assert loss_of("sft", [[[-1.0, -3.0], [-9.0, -9.0, -9.0]]]) == pytest.approx(2.0)
