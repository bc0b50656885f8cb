"""A CPU that rounds as Metal's kernels do where it matters, so that tests see what people on a Mac will.

MLX's CPU backend sums 16-bit products in one order, whatever their shape, and has one kernel for attention. On a GPU

- a product of 16 bits is summed in parts whose number depends on the number of rows (split-K), each rounded;
- attention without a gradient is one kernel, which keeps everything in float32; where a gradient is traced it is
  three, and scores and weights are rounded between them;
- some kernels have no gradient: in evaluation mode mlx-lm takes one for the gated delta rule.

Here the arrays have the dtypes that they have there, products are made in float32 (which is also faster on a CPU), and
rounded like that. What is in float32 already stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta

NARROW = (mx.bfloat16, mx.float16)
_matmul, _addmm, _attention = mx.array.__matmul__, mx.addmm, mx.fast.scaled_dot_product_attention
_quantized, _gather, _gather_quantized = mx.quantized_matmul, mx.gather_mm, mx.gather_qmm


def parts_of(rows: int) -> int:
    """Into how many parts a sum is split for so many rows: few rows, and many, are summed at once."""
    if rows <= 8 or rows > 512:
        return 1
    return 2 if rows > 64 else 4


def _rounded_product(x: mx.array, w: mx.array) -> mx.array:
    """x · w, both as they are held, in parts that are rounded to the dtype of x, and their sum again."""
    inner, parts = x.shape[-1], parts_of(x.size // x.shape[-1])
    size = -(-inner // parts)
    wide_x, wide_w, total = x.astype(mx.float32), w.astype(mx.float32), None
    for start in range(0, inner, size):
        part = _matmul(wide_x[..., start : start + size], wide_w[..., start : start + size, :])
        part = part.astype(x.dtype).astype(mx.float32)
        total = part if total is None else total + part
    assert total is not None
    return total.astype(x.dtype)


def _product(a: mx.array, b: mx.array) -> mx.array:
    if a.dtype not in NARROW or a.dtype != b.dtype or a.ndim < 2 or b.ndim < 2:
        return _matmul(a, b)
    return _rounded_product(a, b)


def _product_and_sum(c: mx.array, a: mx.array, b: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    if a.dtype not in NARROW or a.dtype != b.dtype or args or kwargs:
        return _addmm(c, a, b, *args, **kwargs)
    product = _rounded_product(a, b).astype(mx.float32)
    return (c.astype(mx.float32) + product).astype(a.dtype)


def _quantized_product(x: mx.array, w: mx.array, scales: mx.array, biases: Any = None, **how: Any) -> mx.array:
    if x.dtype not in NARROW:
        return _quantized(x, w, scales, biases, **how)
    transpose = how.pop("transpose", True)
    how = {name: how[name] for name in ("group_size", "bits", "mode") if how.get(name) is not None}
    unpacked = mx.dequantize(w, scales, biases, **how)
    return _rounded_product(x, (unpacked.T if transpose else unpacked).astype(x.dtype))


def _gathered(product: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Of experts only the result is rounded: each row is summed at once."""

    def gather(x: mx.array, w: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if x.dtype not in NARROW:
            return product(x, w, *args, **kwargs)
        if product is _gather:
            w = w.astype(mx.float32)
        return product(x.astype(mx.float32), w, *args, **kwargs).astype(x.dtype)

    return gather


class _Traced:
    """Whether a gradient is being traced: MLX knows, and does not say."""

    depth = 0


def _traced(transform: Callable[..., Any]) -> Callable[..., Any]:
    """`mx.value_and_grad` and `mx.grad`, which note that what they give is at work."""

    def of(function: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return _noted(transform(function, *args, **kwargs))

    return of


def _noted(function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        _Traced.depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            _Traced.depth -= 1

    return noted


def _attend(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None) -> mx.array:
    how = {"scale": scale, "mask": mask}
    if sinks is not None:
        how["sinks"] = sinks
    if q.dtype not in NARROW:
        return _attention(q, k, v, **how)
    wide = [x.astype(mx.float32) for x in (q, k, v)]
    if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
        how["mask"] = mask.astype(mx.float32)
    if sinks is not None:
        how["sinks"] = sinks.astype(mx.float32)
    if not _Traced.depth:
        return _attention(*wide, **how).astype(q.dtype)
    groups = q.shape[1] // k.shape[1]
    keys, values = (mx.repeat(x, groups, axis=1) for x in wide[1:])
    scores = _matmul((q * scale).astype(mx.float32), keys.swapaxes(-1, -2)).astype(q.dtype)
    if isinstance(mask, str):
        rows, columns = scores.shape[-2:]
        mask = mx.arange(columns - rows, columns)[:, None] >= mx.arange(columns)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask.astype(scores.dtype)
    if sinks is not None:
        column = mx.broadcast_to(sinks.astype(scores.dtype)[:, None, None], (*scores.shape[:-1], 1))
        scores = mx.concatenate([column, scores], axis=-1)
    weights = mx.softmax(scores.astype(mx.float32), axis=-1).astype(q.dtype)
    weights = weights[..., 1:] if sinks is not None else weights
    return _matmul(weights.astype(mx.float32), values).astype(q.dtype)


@mx.custom_function
def _kernel_without_gradient(*arrays: mx.array) -> tuple[mx.array, ...]:
    q, k, v, g, beta, state, *mask = arrays
    y, state = gated_delta.gated_delta_ops(q, k, v, g, beta, state, *mask)
    return y, state


@_kernel_without_gradient.vjp
def _refused(*_: Any) -> None:
    raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")


def _kernel(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, mask: Any = None) -> tuple[mx.array, mx.array]:
    return _kernel_without_gradient(q, k, v, g, beta, state, *([] if mask is None else [mask]))


class _OnGpu:
    """`mlx.core` as the gated delta rule sees it on a Mac: there it takes the kernel unless it is told not to."""

    metal = SimpleNamespace(is_available=lambda: True)

    def default_device(self) -> Any:
        return mx.gpu

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Within it MLX rounds as a GPU does. Models are to be loaded with `compute_dtype` bfloat16 or float16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.array, "__matmul__", _product)
        patch.setattr(mx, "matmul", _product)
        patch.setattr(mx, "addmm", _product_and_sum)
        patch.setattr(mx, "quantized_matmul", _quantized_product)
        patch.setattr(mx, "gather_mm", _gathered(_gather))
        patch.setattr(mx, "gather_qmm", _gathered(_gather_quantized))
        patch.setattr(mx.fast, "scaled_dot_product_attention", _attend)
        patch.setattr(mx, "value_and_grad", _traced(mx.value_and_grad))
        patch.setattr(mx, "grad", _traced(mx.grad))
        patch.setattr(mx, "vjp", _noted(mx.vjp))
        patch.setattr(gated_delta, "mx", _OnGpu())
        patch.setattr(gated_delta, "gated_delta_kernel", _kernel)
        yield
