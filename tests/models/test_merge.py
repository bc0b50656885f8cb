"""What base and adapter compute together is one plain weight; packed weights are numbers, taken out in float32."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_dpo.models.merge import full_weight, merged_weight, plain_layer


def test_lora_is_added_as_scale_times_b_a() -> None:
    from mlx_lm.tuner.lora import LoRALinear

    base = nn.Linear(2, 3, bias=False)
    base.weight = mx.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    adapted = LoRALinear.from_base(base, r=1, scale=2.0)
    adapted.lora_a, adapted.lora_b = mx.array([[1.0], [3.0]]), mx.array([[1.0, 0.0, -1.0]])
    # B A = [1, 0, -1]ᵀ [1, 3], doubled: [[2, 6], [0, 0], [-2, -6]]
    assert merged_weight(adapted).tolist() == [[3.0, 6.0], [0.0, 1.0], [0.0, -4.0]]


def test_doras_rows_have_the_length_that_was_learnt() -> None:
    from mlx_lm.tuner.dora import DoRALinear

    base = nn.Linear(2, 2, bias=False)
    base.weight = mx.array([[3.0, 0.0], [0.0, 1.0]])
    adapted = DoRALinear.from_base(base, r=1, scale=1.0)
    adapted.lora_a, adapted.lora_b = mx.array([[0.0], [4.0]]), mx.array([[1.0, 0.0]])
    adapted.m = mx.array([10.0, 0.5])
    # rows [3, 4] of length 5 and [0, 1] of length 1, made 10 and 0.5 long
    np.testing.assert_allclose(np.array(merged_weight(adapted)), [[6.0, 8.0], [0.0, 0.5]], rtol=1e-6)


def test_packed_weights_are_unpacked_in_float32() -> None:
    weight = mx.random.normal((8, 64), key=mx.random.key(0)).astype(mx.bfloat16)
    packed, scales, biases = mx.quantize(weight, 64, 4)
    layer = nn.QuantizedLinear(64, 8, bias=False, group_size=64, bits=4)
    layer.weight, layer.scales, layer.biases = packed, scales, biases
    levels = (np.array(packed)[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(8, 64)
    expected = levels * np.array(scales.astype(mx.float32)) + np.array(biases.astype(mx.float32))
    np.testing.assert_allclose(np.array(full_weight(layer)), expected, rtol=1e-6)


def test_a_plain_layer_computes_what_the_packed_one_does_with_its_bias() -> None:
    layer = nn.Linear(64, 8)
    layer.bias = mx.random.normal((8,), key=mx.random.key(1))
    packed = nn.QuantizedLinear.from_linear(layer, 64, 4)
    x = mx.random.normal((3, 64), key=mx.random.key(2))
    plain = plain_layer(packed, full_weight(packed))
    assert isinstance(plain, nn.Linear)
    np.testing.assert_allclose(np.array(plain(x)), np.array(packed(x)), atol=1e-5)
