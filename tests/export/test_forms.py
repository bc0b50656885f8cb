"""What rounding takes from a layer's change, by its definition; the forms that can be asked for are in test_fuse.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_dpo.export.forms import Form, LayerRoundingError, rounded, total_rounding_error


def test_a_change_below_half_a_step_is_rounded_away() -> None:
    form = Form(mx.float32, bits=2, group_size=32)
    grid = mx.array([[0.0, 1.0, 2.0, 3.0] * 8])  # four levels hold it exactly
    assert mx.array_equal(rounded(grid, form), grid)
    assert mx.array_equal(rounded(grid + mx.array([[0.0, 0.3, -0.3, 0.0] * 8]), form), grid)


def test_the_rounding_error_of_layers_together_weighs_them_by_their_change() -> None:
    layers = [LayerRoundingError("a", "", 3.0, 1.0, 0.0), LayerRoundingError("b", "", 4.0, 0.5, 1.0)]
    # error: (1 · 3)² + (0.5 · 4)² = 13 of 3² + 4² = 25; kept: 0 · 9 + 1 · 16 of 25
    assert total_rounding_error(layers) == pytest.approx((np.sqrt(13 / 25), 16 / 25))
    assert total_rounding_error([LayerRoundingError("a", "", 0.0, 0.0, 1.0)]) == (0.0, 1.0)
