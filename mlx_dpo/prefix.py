"""The prompt once for all its answers: its keys and values, computed once and read by every answer.

Causal attention lets a token see only what stands before it, so a prompt's hidden states do not depend on the answer
that follows. Run prompts `[R, P]`, keep each block's keys and values, which are ordinary differentiable arrays, and run
the answers `[R·K, C]` on top of them. The gradient of K answers flows back into one prompt pass as a sum: the same sum
that K separate passes would have given.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


class PromptCache:
    """What a block sees as its cache while the prompts are read: it keeps keys and values `[R, heads, P, size]`."""

    offset = 0

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keeps them and gives them back: nothing stands before a prompt."""
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str:
        """Plain causal attention: padding lies on the right, where no real token looks."""
        if return_array or (window_size is not None and n > window_size):
            return mx.array(causal(np.arange(n), np.arange(n), window_size))
        return "causal"


class AnswerCache:
    """What a block sees as its cache while the answers are read: the prompts' keys and values stand before their own.

    `width` is P, the prompts' padded length; `lengths [R·K]` are their real ones, which are the answers' position
    offset too. A mask can be had before any prompt is read: models make it from the cache of a block that may be left
    out.
    """

    def __init__(self, prompt: PromptCache, answers: int, width: int, lengths: np.ndarray) -> None:
        self.prompt = prompt
        self.answers = answers
        self.width = width
        self.lengths = lengths
        equal = len(set(lengths.tolist())) == 1
        self.offset: int | mx.array = int(lengths[0]) if equal else mx.array(lengths)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """`[R·K, heads, P + C, size]`: each answer's own, behind its prompt's."""
        before_keys, before_values = self.prompt.keys, self.prompt.values
        assert before_keys is not None and before_values is not None
        return (
            mx.concatenate([mx.repeat(before_keys, self.answers, axis=0), keys], axis=2),
            mx.concatenate([mx.repeat(before_values, self.answers, axis=0), values], axis=2),
        )

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """`[R·K, 1, C, P + C]` bool: an answer's token sees its prompt's real tokens and the answer so far."""
        own = self.lengths[:, None] + np.arange(n)  # [R·K, C] positions of the answers' tokens
        before = np.broadcast_to(np.arange(self.width), (len(self.lengths), self.width))
        real = np.concatenate([before < self.lengths[:, None], np.ones_like(own, bool)], axis=1)
        seen = causal(own, np.concatenate([before, own], axis=1), window_size)
        return mx.array(seen & real[:, None, :])[:, None]


def causal(query: np.ndarray, key: np.ndarray, window_size: int | None) -> np.ndarray:
    """Whether a query at one position sees a key at another: `[…, queries, keys]` bool from positions `[…, n]`."""
    distance = query[..., :, None] - key[..., None, :]
    seen = distance >= 0
    return seen & (distance < window_size) if window_size is not None else seen
