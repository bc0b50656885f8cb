"""Functions of log-probs, right over their whole range."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from mlx_dpo.losses.numerics import log_one_minus_exp, log_sigmoid


def test_log_sigmoid_and_log_one_minus_exp_are_right_over_their_range() -> None:
    for x in (-300.0, -20.0, -1.0, 0.0, 1.0, 20.0, 300.0):
        expected = x if x < -100 else -math.log1p(math.exp(-x))
        assert log_sigmoid(mx.array(x)).item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    for x in (-50.0, -5.0, -0.7, -0.69, -0.1, -1e-3, -1e-5):
        assert log_one_minus_exp(mx.array(x)).item() == pytest.approx(math.log(-math.expm1(x)), rel=1e-5)
