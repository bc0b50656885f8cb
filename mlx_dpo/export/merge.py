"""Adapted layers to plain ones: the weight that computes what base and adapter compute together, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.errors import ModelError


def is_packed(module: Any) -> bool:
    """Whether a layer holds its weight in quantized form."""
    return "scales" in module and hasattr(module, "bits")


def full_weight(module: Any) -> mx.array:
    """A layer's weight in float32. Scales are widened before they multiply, so nothing is rounded on the way."""
    if not is_packed(module):
        return module.weight.astype(mx.float32)
    scales, biases = module.scales, module.get("biases")
    if module.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(
        module.weight, scales, biases, module.group_size, module.bits, module.mode,
        global_scale=module.get("global_scale"), dtype=mx.float32,
    )  # fmt: skip


def base_of(module: Any) -> Any:
    """The layer that an adapted layer wraps."""
    return module["linear"] if "linear" in module else module["embedding"]


def merged_weight(module: nn.Module) -> mx.array:
    """W' of an adapted layer, float32, of the base weight's shape; W' x + b is what the layer computes.

    LoRA: W' = W + s (A B)ᵀ with A [in, r], B [r, out]. Of a mixture's experts, the same for each: A [E, r, in],
    B [E, out, r]. Of an embedding, W' = W + s A B with A [tokens, r], B [r, width]. DoRA: each row of that W' is
    rescaled to the length m learnt for it (Liu et al. 2024, arXiv 2402.09353, eq. 5).

    Raises:
        ModelError: the model has an adapted layer of a kind of its own.
    """
    kind = type(module).__name__
    if kind not in MERGE:
        raise ModelError(f"a layer of type {kind} cannot be fused", "keep the adapter beside the model")
    delta, has_magnitude = MERGE[kind]
    weight = full_weight(base_of(module)) + module.scale * delta(module)
    if has_magnitude:
        weight = weight * (module.m.astype(mx.float32) / mx.linalg.norm(weight, axis=1))[:, None]
    return weight


def _factors(module: Any) -> tuple[mx.array, mx.array]:
    return module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32)


def _linear(module: Any) -> mx.array:
    a, b = _factors(module)
    return (a @ b).T


def _switch(module: Any) -> mx.array:
    a, b = _factors(module)
    return b @ a


def _embedding(module: Any) -> mx.array:
    a, b = _factors(module)
    return a @ b


MERGE: dict[str, tuple[Callable[[Any], mx.array], bool]] = {
    # mlx-lm's adapted layers: the low-rank product in the base weight's shape, and whether rows have a magnitude
    "LoRALinear": (_linear, False),
    "LoRASwitchLinear": (_switch, False),
    "LoRAEmbedding": (_embedding, False),
    "DoRALinear": (_linear, True),
    "DoRAEmbedding": (_embedding, True),
}
