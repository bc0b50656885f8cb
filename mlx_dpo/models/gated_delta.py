"""The gated delta rule in chunks, so that hybrids (Qwen3.5, Qwen3-Next, Kimi-linear, OLMo-hybrid) can be trained.

Of mlx-lm's two ways one is a Metal kernel without a gradient; the other goes token by token and keeps a state matrix
for each: 31 GB for one layer of 2,048. Here a chunk of tokens is a few matrix products (the WY form of Gated DeltaNet,
Yang et al. 2024, arXiv 2412.06464; with a decay per channel, Kimi's KDA, arXiv 2510.26692), and the backward pass
computes a segment of chunks again from the state that it began with.

`mx.fast.gated_delta_update` is not used. It rounds decays to the dtype of q, and bfloat16 has no number between 0.996
and 1; its Metal kernels sum gradients in no fixed order; off Metal and for most shapes it is the loop again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta

CHUNK = 64
"""Tokens of a chunk, a power of 2: its products are `[CHUNK, CHUNK]`, and a state is kept for each."""

SEGMENT = 512
"""Tokens that the backward pass holds intermediate results of at a time; a multiple of `CHUNK`."""

SMALLEST = 1e-30
"""Added to a decay before its logarithm: nothing to a decay that matters, and at 0 it leaves a finite gradient."""


def chunked_gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    checkpoint_fn: Callable[..., Any] = mx.checkpoint,
) -> tuple[mx.array, mx.array]:
    """What `mlx_lm.models.gated_delta.gated_delta_ops` gives, in float32, and with a gradient that can be afforded.

    A state S maps keys to values. A token first lets it decay, then corrects what it gives for its key:
    S ← S diag(g), δ = β (v − S k), S ← S + δ kᵀ, y = S q (eq. 10 of the paper, with S diag(g) taken first).

    `q, k [B, T, Hk, Dk]`, `v [B, T, Hv, Dv]`, of which Hv / Hk heads share a key; `g [B, T, Hv]` or, a decay for each
    channel, `[B, T, Hv, Dk]`, in 0 … 1; `beta [B, T, Hv]`; `state [B, Hv, Dv, Dk]`, else zeros. Tokens where
    `mask [B, T]` is false leave the state alone; their output is 0, as by the Metal kernel (the loop's is of no use).

    Returns:
        `y [B, T, Hv, Dv]` in the dtype of q, and the last state, float32.
    """
    batch, length, key_heads, key_width = q.shape
    heads, value_width = v.shape[-2:]
    if length == 1:  # a token that is being generated
        return gated_delta.gated_delta_ops(q, k, v, g, beta, state, mask)
    if state is None:
        state = mx.zeros((batch, heads, value_width, key_width))
    log_g = mx.log(g.astype(mx.float32) + SMALLEST).reshape(batch, length, heads, -1)
    beta = beta.astype(mx.float32)[..., None]
    if mask is not None:
        log_g = mx.where(mask[..., None, None], log_g, 0)
        beta = mx.where(mask[..., None, None], beta, 0)
    size = min(CHUNK, 1 << (length - 1).bit_length())
    state = state.astype(mx.float32).reshape(batch, key_heads, -1, value_width, key_width)
    outputs = []
    for start in range(0, length, SEGMENT):
        parts = [_in_chunks(x[:, start : start + SEGMENT], size, key_heads) for x in (q, k, v, log_g, beta)]
        y, state = checkpoint_fn(_segment)(*parts, state)
        outputs.append(y.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, value_width))
    y = mx.concatenate(outputs, axis=1)[:, :length]
    if mask is not None:
        y = mx.where(mask[..., None, None], y, 0)
    return y.astype(q.dtype), state.reshape(batch, heads, value_width, key_width)


def _in_chunks(x: mx.array, size: int, key_heads: int) -> mx.array:
    """`[B, T, H, D]` as `[chunks, B, Hk, H / Hk, size, D]`; zeros fill the last one: with β 0 and log g 0 all stays."""
    batch, length, heads, width = x.shape
    x = mx.pad(x, [(0, 0), (0, -length % size), (0, 0), (0, 0)])
    return x.reshape(batch, -1, size, key_heads, heads // key_heads, width).transpose(1, 0, 3, 4, 2, 5)


def _segment(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Chunks `[chunks, …, C, D]` read one after the other, from `state […, Dv, Dk]`: outputs and the state after them.

    With γ_t = Σ_{i ≤ t} log g_i from the beginning of a chunk and S the state there, all its tokens' corrections solve
        (I + A) δ = β (V − (e^γ K) Sᵀ),   A_ti = β_t (e^(γ_t − γ_i) k_t)·k_i for i < t,
    and with them
        Y = (e^γ Q) Sᵀ + M δ,             M_ti = (e^(γ_t − γ_i) q_t)·k_i for i ≤ t,
        S ← S e^γ_C + δᵀ (e^(γ_C − γ) K).
    The paper's W and U are (I + A)⁻¹ applied to β e^γ K and β V; applied once to their difference it costs less. Every
    exponent is a sum over its own span, and ≤ 0. A difference of two running sums would be rounded as coarsely as these
    are large, and its gradient with it, which is divided by g in the end.
    """
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    from_start = mx.exp(mx.cumsum(log_g, axis=-2))  # e^γ
    to_end = mx.exp(mx.cumsum(log_g, axis=-2, reverse=True, inclusive=False))  # e^(γ_C − γ)
    with_k, with_q = (_channel_decays if log_g.shape[-1] > 1 else _scalar_decay)(k, q, log_g)
    a = mx.tril(beta * with_k, -1)
    inverse = _unit_lower_inverse(mx.stop_gradient(a))
    # d(X⁻¹) = −X⁻¹ dX X⁻¹, of a difference that is 0: a custom gradient would hide it from the memory forecast
    inverse = inverse - inverse @ (a - mx.stop_gradient(a)) @ inverse
    read = mx.concatenate([k * from_start, q * from_start], axis=-2)
    write, kept = k * to_end, from_start[..., -1:, :]
    size = k.shape[-2]
    outputs = []
    for n in range(len(k)):
        recalled = read[n] @ state.swapaxes(-1, -2)
        delta = inverse[n] @ (beta[n] * (v[n] - recalled[..., :size, :]))
        outputs.append(recalled[..., size:, :] + with_q[n] @ delta)
        state = state * kept[n] + delta.swapaxes(-1, -2) @ write[n]
    return mx.stack(outputs), state


def _scalar_decay(k: mx.array, q: mx.array, log_g: mx.array) -> tuple[mx.array, mx.array]:
    """e^(γ_t − γ_i) k_t·k_i and e^(γ_t − γ_i) q_t·k_i for i ≤ t, `[…, C, C]`, of a decay for the head, `[…, C, 1]`."""
    after = mx.tri(k.shape[-2], k=-1)  # [t, i]: whether t comes after i
    decay = mx.tril(mx.exp(mx.cumsum(log_g * after, axis=-2)))
    keys = k.swapaxes(-1, -2)
    return (k @ keys) * decay, (q @ keys) * decay


def _channel_decays(k: mx.array, q: mx.array, log_g: mx.array) -> tuple[mx.array, mx.array]:
    """The same with a decay for each channel, `[…, C, Dk]`, which goes inside the product.

    A later half reads the earlier one across the border between them: what decayed since the border times what decayed
    up to it. Each half is such a pair itself.
    """
    size = k.shape[-2]
    if size == 1:
        return (k * k).sum(-1, keepdims=True), (q * k).sum(-1, keepdims=True)
    k, q, log_g = (x.reshape(*x.shape[:-2], 2, size // 2, -1) for x in mx.broadcast_arrays(k, q, log_g))
    with_k, with_q = _channel_decays(k, q, log_g)
    since = mx.exp(mx.cumsum(log_g[..., 1, :, :], axis=-2))
    until = mx.exp(mx.cumsum(log_g[..., 0, :, :], axis=-2, reverse=True, inclusive=False))
    keys = (k[..., 0, :, :] * until).swapaxes(-1, -2)
    across_k, across_q = ((x[..., 1, :, :] * since) @ keys for x in (k, q))
    return _lower(with_k, across_k), _lower(with_q, across_q)


def _lower(diagonal: mx.array, below: mx.array) -> mx.array:
    """`[[d₀, 0], [below, d₁]]` of blocks `d [..., 2, n, n]` and `below [..., n, n]`."""
    first, second = diagonal[..., 0, :, :], diagonal[..., 1, :, :]
    top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
    return mx.concatenate([top, mx.concatenate([below, second], axis=-1)], axis=-2)


def _unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + A)⁻¹ of strictly lower triangular `A [..., n, n]`, n a power of 2, by halves; without a gradient.

    MLX's triangular solver runs on CPUs alone. (I − A)(I + A²)(I + A⁴)… has fewer steps, and is lost to rounding where
    keys repeat: the powers grow to 10¹⁸ while the inverse stays small.
    """
    size = a.shape[-1]
    if size == 1:
        return mx.ones_like(a)
    half = size // 2
    inverse = _unit_lower_inverse(mx.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3))
    return _lower(inverse, -(inverse[..., 1, :, :] @ a[..., half:, :half] @ inverse[..., 0, :, :]))


@contextmanager
def trainable_gated_delta(model: nn.Module, checkpoint_fn: Callable[..., Any] = mx.checkpoint) -> Iterator[int]:
    """Within it, `model`'s gated-delta blocks take `chunked_gated_delta`, in training and in evaluation mode alike.

    Nothing of mlx-lm is patched: a name replaced in its files would be replaced for every model of the process, and
    for a function traced or recomputed later not. Instead the blocks of this model become instances of a subclass,
    whose methods are mlx-lm's own code with the one name `gated_delta_update` bound otherwise. A block is found by its
    code, not by its class, so that the next family that uses the function is found as well.

    `checkpoint_fn` is as in `Scorer`: a memory forecast needs one that can be traced. Yields how many blocks it found.
    """
    rule = partial(chunked_gated_delta, checkpoint_fn=checkpoint_fn)
    before: list[tuple[Any, type]] = []
    try:
        for _, module in model.named_modules():
            methods = {
                name: method
                for name, method in inspect.getmembers(type(module), inspect.isfunction)
                if "gated_delta_update" in method.__code__.co_names
                and method.__globals__.get("gated_delta_update") is gated_delta.gated_delta_update
            }
            if methods:
                # decays and β are computed by mlx-lm's function itself; both its ways are then the same one
                update = _bound(gated_delta.gated_delta_update, gated_delta_ops=rule, gated_delta_kernel=rule)
                own = {name: _bound(method, gated_delta_update=update) for name, method in methods.items()}
                before.append((module, type(module)))
                module.__class__ = type(type(module).__name__, (type(module),), own)
        yield len(before)
    finally:
        for module, original in before:
            module.__class__ = original


def _bound(function: Any, **names: Any) -> FunctionType:
    """`function`'s own code, which finds `names` in place of what its file calls so."""
    names = function.__globals__ | names
    bound = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    bound.__kwdefaults__ = function.__kwdefaults__
    return bound
