"""ggml's blocks and MLX's groups are the same numbers in two layouts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("gguf", reason="GGUF files need the gguf package")

import gguf

from mlx_dpo.gguf.blocks import (
    BITS,
    exact_kind,
    pack_affine,
    pack_blocks,
    unpack_affine,
    unpack_blocks,
)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)


@pytest.mark.parametrize("kind", BITS)
def test_a_ggml_block_and_an_mlx_group_are_the_same_numbers(kind: str, values: np.ndarray) -> None:
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    q, scale, bias = unpack_blocks(raw, kind)
    in_mlx = mx.dequantize(
        mx.array(pack_affine(q, BITS[kind])),
        mx.array(scale).astype(mx.float32),
        mx.array(bias).astype(mx.float32),
        group_size=32,
        bits=BITS[kind],
    )
    np.testing.assert_allclose(np.array(in_mlx), expected, rtol=0, atol=2e-6)
    assert np.array_equal(unpack_affine(pack_affine(q, BITS[kind]), BITS[kind]), q)


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_1"), (5, "Q5_1"), (8, "Q8_0")])
def test_an_mlx_group_that_fits_becomes_a_block_with_no_weight_changed(bits: int, kind: str) -> None:
    draw = np.random.default_rng(1)
    q = draw.integers(0, 2**bits, size=(4, 128), dtype=np.uint8)
    scale = draw.normal(size=(4, 2)).astype(np.float16).astype(np.float32)  # groups of 64
    bias = -128 * scale if bits == 8 else draw.normal(size=(4, 2)).astype(np.float16).astype(np.float32)
    assert exact_kind(64, bits, "affine", scale, bias) == kind
    found = gguf.quants.dequantize(pack_blocks(q, scale, bias, kind), gguf.GGMLQuantizationType[kind])
    expected = q * np.repeat(scale, 64, axis=1) + np.repeat(bias, 64, axis=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_what_ggml_cannot_hold_exactly_has_no_kind() -> None:
    one, third = np.ones((1, 1), np.float32), np.full((1, 1), 1 / 3, np.float32)
    assert exact_kind(64, 4, "affine", third, one) is None  # a third has no float16
    assert exact_kind(64, 4, "affine", one, third) is None
    assert exact_kind(64, 8, "affine", one, one) is None  # Q8_0 keeps no bias
    assert exact_kind(64, 6, "affine", one, one) is None
    assert exact_kind(16, 4, "nvfp4", one, one) is None
