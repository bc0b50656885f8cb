"""What 16 bits do to log-probs: the same model in float32 for a while, and the noise that it has otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_dpo.data.batching import Batch, length, make_batch
from mlx_dpo.data.tokenize import TokenizedRow

T = TypeVar("T")
Score = Callable[[Batch, bool], mx.array]
"""Token log-probs `[R, K, C]` of a batch, with or without a gradient."""

ROWS, CUT = 4, (64, 32)
"""How many rows the noise is measured on, and the tokens of prompt and answer that are read of them."""

SURE = 2.0
"""Standard deviations of the noise beyond which a difference is taken for real."""


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within it `model` computes in float32, whatever its weights are held in.

    Embeddings give float32, and all that follows takes the dtype of what it reads: packed weights are multiplied in
    float32 too. As in `trainable_gated_delta` modules become instances of a subclass, and nothing of MLX is patched.
    """
    before: list[tuple[Any, type]] = []
    try:
        for _, module in model.named_modules():
            kind: Any = type(module)
            if "as_linear" in dir(kind):  # what every embedding has, of MLX, mlx-lm or a model's own
                before.append((module, kind))
                module.__class__ = type(kind.__name__, (kind,), {"__call__": _widened(kind)})
        yield
    finally:
        for module, original in before:
            module.__class__ = original


def _widened(kind: Any) -> Callable[..., mx.array]:
    return lambda self, *ids: kind.__call__(self, *ids).astype(mx.float32)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """`model` in training mode, dropout alone switched off: in evaluation mode a kernel may have no gradient."""
    training = model.training
    model.train()
    for _, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        yield
    finally:
        model.train(training)


def by_gradient_kernels(compute: Callable[[], T]) -> T:
    """What `compute` gives, described as if a gradient were taken of it; there is none, and it costs nothing.

    On a GPU attention is another kernel where a gradient is traced, and rounds otherwise. A reference that is read like
    the policy is rounded like it: of a fresh adapter in bfloat16 the two would differ by 0.07 nats a token.
    """
    found: list[T] = []

    def traced(_: mx.array) -> mx.array:
        found.append(compute())
        return mx.zeros(1)

    mx.vjp(traced, [mx.zeros(1)], [mx.zeros(1)])
    return found[0]


def rounding_noise(score: Score, rows: Sequence[TokenizedRow]) -> float:
    """By how much rounding alone moves a token's log-prob here: root mean square, nats.

    A few rows are read together, each twice, so that some share a bucket, and each alone with a gradient: the same
    function by other shapes. In 16 bits on a GPU some 0.1; in float32 1e-6, or 1e-3 where its products are TF32.
    """
    few = [cut(row, *CUT) for row in _spread(rows)]
    batch = make_batch([*few, *few], range(2 * len(few)))
    together = score(batch, False)
    squares, count = [], 0
    for r, row in enumerate(few):
        alone = make_batch([row], [r])
        found = by_gradient_kernels(partial(score, alone, True))[0]
        difference = (found - together[r, : found.shape[0], : found.shape[1]]) * mx.array(alone.mask[0])
        squares.append(mx.square(difference).sum())
        count += int(alone.mask.sum())
        mx.eval(squares)
    return math.sqrt(sum(float(square) for square in squares) / max(count, 1))


def cut(row: TokenizedRow, prompt: int, completion: int) -> TokenizedRow:
    """A row of at most so many tokens: the prompt's last, each answer's first."""
    shorter = row._replace(completions=tuple(ids[:completion] for ids in row.completions))
    return shorter._replace(prompt=row.prompt[-prompt:]) if row.shares_prompt else shorter


def _spread(rows: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    """A few rows from the shorter half, of unequal lengths."""
    ordered = sorted(rows, key=length)
    return [ordered[(len(ordered) * n) // (2 * ROWS)] for n in range(min(ROWS, len(ordered)))]
