"""The prompt once for all its answers: its keys and values, computed once and read by every answer.

Causal attention lets a token see only what stands before it, so a prompt's hidden states do not depend on the answer
that follows. Run prompts `[R, P]`, keep each block's keys and values, which are ordinary differentiable arrays, and run
the answers on top of them. The gradient of K answers flows back into one prompt pass as a sum: the same sum
that K separate passes would have given.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """What a block sees as its cache while answers are read: their prompts' keys and values stand before their own.

    `prompts` were read in groups; `picks` says for each answer which group and which line of it its prompt is.
    `lengths [n]` are the prompts' real lengths, which are the answers' position offset too, and `width` the longest. A
    mask can be had before any prompt is read: models make it from the cache of a block that may be left out.
    """

    def __init__(self, prompts: Sequence[PromptCache], picks: Sequence[tuple[int, int]], lengths: np.ndarray) -> None:
        self.prompts = prompts
        self.picks = picks
        self.lengths = lengths
        self.width = max(1, int(lengths.max()))
        equal = len(set(lengths.tolist())) == 1
        self.offset: int | mx.array = int(lengths[0]) if equal else mx.array(lengths)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """`[n, heads, width + C, size]`: each answer's own, behind its prompt's."""
        before_keys = self._picked([cache.keys for cache in self.prompts])
        before_values = self._picked([cache.values for cache in self.prompts])
        return mx.concatenate([before_keys, keys], axis=2), mx.concatenate([before_values, values], axis=2)

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """`[n, 1, C, width + C]` bool: an answer's token sees its prompt's real tokens and the answer so far."""
        own = self.lengths[:, None] + np.arange(n)  # [n, C] positions of the answers' tokens
        before = np.broadcast_to(np.arange(self.width), (len(self.lengths), self.width))
        real = np.concatenate([before < self.lengths[:, None], np.ones_like(own, bool)], axis=1)
        seen = causal(own, np.concatenate([before, own], axis=1), window_size)
        return mx.array(seen & real[:, None, :])[:, None]

    def arrays(self) -> tuple[mx.array, ...]:
        """The keys and values that it reads."""
        arrays: list[mx.array] = []
        for cache in self.prompts:
            assert cache.keys is not None and cache.values is not None
            arrays += [cache.keys, cache.values]
        return tuple(arrays)

    def reading(self, arrays: Sequence[mx.array]) -> AnswerCache:
        """The same with other arrays in place of `arrays()`."""
        prompts = [PromptCache() for _ in self.prompts]
        for i, prompt in enumerate(prompts):
            prompt.keys, prompt.values = arrays[2 * i : 2 * i + 2]
        return AnswerCache(prompts, self.picks, self.lengths)

    def _picked(self, groups: Sequence[mx.array | None]) -> mx.array:
        """`[n, heads, width, size]` from each group's `[R, heads, P, size]`.

        Lines are split and joined, not gathered: the gradient of that is joining and splitting, not scattering.
        """
        lines: dict[tuple[int, int], mx.array] = {}
        for g in {g for g, _ in self.picks}:
            whole = groups[g]
            assert whole is not None
            wide = whole.shape[2]
            if wide > self.width:
                whole = whole[:, :, : self.width]
            elif wide < self.width:
                whole = mx.pad(whole, [(0, 0), (0, 0), (0, self.width - wide), (0, 0)])
            lines |= {(g, i): line for i, line in enumerate(mx.split(whole, whole.shape[0]))}
        return mx.concatenate([lines[pick] for pick in self.picks])


def causal(query: np.ndarray, key: np.ndarray, window_size: int | None) -> np.ndarray:
    """Whether a query at one position sees a key at another: `[…, queries, keys]` bool from positions `[…, n]`."""
    distance = query[..., :, None] - key[..., None, :]
    seen = distance >= 0
    return seen & (distance < window_size) if window_size is not None else seen
