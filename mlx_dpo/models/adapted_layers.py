"""mlx-lm's adapted layers, computed in the activations' own dtype: the parameters and the function are the same.

mlx-lm multiplies the input by float32 factors. A 16-bit input is copied to float32 for that, once for each adapted
layer, and each copy is kept for the backward pass: 2.5 of 11.5 GB of working memory for an 8B model. Here the factors
are cast instead, which are small; they themselves stay float32 for the optimizer, and so do their gradients.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner import dora, lora

# Only the forward pass is ours. Names, shapes, first values and `fuse` are inherited, so files go both ways, and so are
# the names of the classes, by which others know what an adapted layer is.


class LoRALinear(lora.LoRALinear):
    def __call__(self, x: mx.array) -> mx.array:
        return _plus_product(self.linear(x), self.dropout(x), self.lora_a, self.scale * self.lora_b)


class LoRASwitchLinear(lora.LoRASwitchLinear):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        # MLX's CPU backend gathers float32 only; for float16 see _plus_product
        wide = x.dtype == mx.float16 or mx.default_device().type == mx.cpu
        z = self.dropout(x)
        for factor in (self.lora_a, self.scale * self.lora_b):
            factor = factor.astype(mx.float32 if wide else x.dtype).swapaxes(-1, -2)
            z = mx.gather_mm(z, factor, rhs_indices=indices, sorted_indices=sorted_indices)
        return self.linear(x, indices, sorted_indices=sorted_indices) + z.astype(x.dtype)


class LoRAEmbedding(lora.LoRAEmbedding):  # reading it, mlx-lm copies no activations
    def as_linear(self, x: mx.array) -> mx.array:
        return _plus_product(self.embedding.as_linear(x), self.dropout(x), self.scale * self.lora_b.T, self.lora_a.T)


class DoRALinear(dora.DoRALinear):
    lora_a: mx.array

    def set_width(self) -> None:
        """Draws A anew where mlx-lm made it too narrow: it counts 32 // bits numbers a word, wrong for 3, 5, 6 bits."""
        width, rank = self._dequantized_weight().shape[1], self.lora_a.shape[1]
        if self.lora_a.shape[0] != width:
            self.lora_a = mx.random.uniform(-(width**-0.5), width**-0.5, (width, rank))

    def __call__(self, x: mx.array) -> mx.array:
        # the base's own product: mlx-lm's x @ w.T keeps an unpacked w of each quantized layer for the backward pass
        out = _plus_product(self.linear(x), self.dropout(x), self.lora_a, self.scale * self.lora_b)
        adapted = self._dequantized_weight() + (self.scale * self.lora_b.T) @ self.lora_a.T
        stretch = _stretch(self.m, adapted, out.dtype)
        out = stretch * out
        return out + (1 - stretch) * self.linear.bias if "bias" in self.linear else out  # the bias is not stretched


class DoRAEmbedding(dora.DoRAEmbedding):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(self.embedding.weight.dtype)  # float32 would make the whole model float32

    def as_linear(self, x: mx.array) -> mx.array:
        out = _plus_product(self.embedding.as_linear(x), self.dropout(x), self.scale * self.lora_b.T, self.lora_a.T)
        adapted = self.embedding.weight + (self.scale * self.lora_a) @ self.lora_b
        return _stretch(self.m, adapted, out.dtype) * out


OURS: dict[type, type] = {
    kind.__base__: kind for kind in (LoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRALinear, DoRAEmbedding)
}


def use_own_layers(model: nn.Module) -> None:
    """Makes mlx-lm's adapted layers in `model` ours, arrays and all. Those that a model brings itself stay its own."""
    layer: Any
    for _, layer in model.named_modules():
        layer.__class__ = OURS.get(type(layer), type(layer))
        if isinstance(layer, DoRALinear):
            layer.set_width()


def _plus_product(y: mx.array, x: mx.array, first: mx.array, second: mx.array) -> mx.array:
    """y + x · first · second in one pass over y `[…, out]`; x `[…, in]`, first `[in, r]` and second `[r, out]` float32.

    The scale is best on a factor, before the cast: as addmm's alpha it would cost a pass over the gradient by y.
    """
    # float16 has no room for the gradient by A while B is a few steps of the learning rate: nine in ten would be 0
    add = _add_float16 if x.dtype == mx.float16 else _add
    # as matrices: of more dimensions MLX makes a product for each sequence, and sums their gradients in 16 bits
    return add(y.flatten(0, -2), x.flatten(0, -2), first, second).reshape(y.shape)


def _add(y: mx.array, x: mx.array, first: mx.array, second: mx.array) -> mx.array:
    return mx.addmm(y, x @ first.astype(x.dtype), second.astype(x.dtype))


_add_float16: Any = mx.custom_function(_add)


@_add_float16.vjp
def _add_backward(primals: list[mx.array], by_sum: mx.array, _: mx.array) -> tuple[mx.array, ...]:
    """The gradients of `_add`, computed in float32; what is copied to that is gone when the layer is done."""
    y, x, first, second = primals
    x_wide, wide = x.astype(mx.float32), by_sum.astype(mx.float32)
    by_low = wide @ second.T
    return by_sum.astype(y.dtype), (by_low @ first.T).astype(x.dtype), x_wide.T @ by_low, (x_wide @ first).T @ wide


def _stretch(m: mx.array, rows: mx.array, dtype: mx.Dtype) -> mx.array:
    """What makes each row as long as m says, the present length held fixed (Liu et al. 2024, section 4.3)."""
    return (m / mx.stop_gradient(mx.linalg.norm(rows, axis=-1))).astype(dtype)
