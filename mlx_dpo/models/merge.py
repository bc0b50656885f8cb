"""Layers taken apart: what an adapter wraps, packed weights in float32, and what both compute as one plain weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.errors import ModelError


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers with an adapter, by name."""
    return [(name, module) for name, module in model.named_modules() if "lora_a" in module]


def base_of(module: Any) -> Any:
    """The layer that an adapted layer wraps."""
    return module["linear"] if "linear" in module else module["embedding"]


def is_packed(layer: Any) -> bool:
    """Whether a layer holds its weight in quantized form."""
    return "scales" in layer and hasattr(layer, "bits")


def full_weight(layer: Any) -> mx.array:
    """A layer's weight in float32, unpacked where it is quantized."""
    if not is_packed(layer):
        return layer.weight.astype(mx.float32)
    how = (layer.group_size, layer.bits, layer.mode)
    if (wide := layer.get("global_scale")) is not None:  # of nvfp4 experts, one scale more for each
        parts = zip(layer.weight, layer.scales, wide, strict=True)
        return mx.stack([mx.dequantize(weight, scale, None, *how, of, mx.float32) for weight, scale, of in parts])
    return unpacked(layer.weight, layer.scales, layer.get("biases"), *how)


def unpacked(
    weight: mx.array, scales: mx.array, biases: mx.array | None, group_size: int, bits: int, mode: str
) -> mx.array:
    """Packed weights in float32; only affine ones have biases, and scales that are numbers to be widened first."""
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, group_size, bits, mode, dtype=mx.float32)


def plain_layer(layer: Any, weight: mx.array) -> nn.Module:
    """An unpacked layer of `layer`'s kind with this weight and `layer`'s own bias."""
    from mlx_lm.models.switch_layers import SwitchLinear

    plain: Any
    if weight.ndim == 3:
        plain = SwitchLinear(1, 1, 1, bias=False)
    elif isinstance(layer, (nn.Embedding, nn.QuantizedEmbedding)):
        plain = nn.Embedding(1, 1)
    else:
        plain = nn.Linear(1, 1, bias=False)
    plain.weight = weight
    if "bias" in layer:
        plain.bias = layer.bias
    return plain


def merged_weight(module: Any) -> mx.array:
    """W' of an adapted layer, float32, in the base weight's shape: W' x + b is what the layer computes.

    LoRA: W' = W + s (A B)ᵀ with A [in, r], B [r, out]. Of a mixture's experts, the same for each: A [E, r, in],
    B [E, out, r]. Of an embedding, W' = W + s A B with A [tokens, r], B [r, width]. DoRA: each row of that W' is
    rescaled to the length m learnt for it (Liu et al. 2024, arXiv 2402.09353, eq. 5).

    Raises:
        ModelError: the model has adapted layers of a kind of its own.
    """
    kind = type(module).__name__
    if kind not in MERGE:
        raise ModelError(f"an adapted layer of type {kind} cannot be fused", "keep the adapter beside the model")
    product, has_magnitude = MERGE[kind]
    weight = full_weight(base_of(module)) + module.scale * product(
        module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32)
    )
    if has_magnitude:
        weight = weight * (module.m.astype(mx.float32) / mx.linalg.norm(weight, axis=1))[:, None]
    return weight


MERGE: dict[str, tuple[Callable[[mx.array, mx.array], mx.array], bool]] = {
    # by the name of an adapted layer, mlx-lm's or ours: its product in the base weight's shape, and whether rows have a
    # magnitude
    "LoRALinear": (lambda a, b: (a @ b).T, False),
    "LoRASwitchLinear": (lambda a, b: b @ a, False),
    "LoRAEmbedding": (lambda a, b: a @ b, False),
    "DoRALinear": (lambda a, b: (a @ b).T, True),
    "DoRAEmbedding": (lambda a, b: a @ b, True),
}
