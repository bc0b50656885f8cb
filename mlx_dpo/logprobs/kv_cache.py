"""Keys and values of a prompt, computed once and read by every answer: differentiable stand-ins for mlx-lm's caches.

Causal attention lets a token see only what stands before it, so a prompt's hidden states do not depend on the answer
that follows. Run prompts `[R, P]`, keep each block's keys and values, which are ordinary differentiable arrays, and run
the answers on top of them. The gradient of K answers flows back into one prompt pass as a sum: the same sum
that K separate passes would have given. A model whose blocks keep another state than keys and values (state-space,
convolution) cannot be read this way; `check.py` finds that out.

For the same reason a long sequence can be read in steps (chunked prefill), each on top of the keys and values of those
before it. Of all pairs of tokens nearly half are masked, and of these only the ones within a step are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

KeysValues = tuple[mx.array, mx.array]


class PrefixKVCache:
    """What a block sees as its cache while sequences are read from their beginning, all at once or in steps.

    `pieces` are the keys and values `[R, heads, tokens, size]` of each step. `read` tokens stand before the next one,
    which the reader says: a block that is left out leaves no pieces, and its cache still makes masks.
    """

    def __init__(self) -> None:
        self.pieces: list[KeysValues] = []
        self.read = 0

    @property
    def offset(self) -> int | mx.array:
        """The position of the token that is read next."""
        return self.read

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Keeps them and gives them back behind those that were read before."""
        self.pieces.append((keys, values))
        return self.joined()

    def joined(self) -> KeysValues:
        """All keys and values read so far."""
        return _join(self.pieces)

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str:
        """Plain causal attention: padding lies on the right, where no real token looks."""
        end = self.read + n
        if return_array or (window_size is not None and end > window_size):
            return mx.array(causal(np.arange(self.read, end), np.arange(end), window_size))
        return "causal"

    def arrays(self) -> tuple[mx.array, ...]:
        """The keys and values that are read with the next ones."""
        return tuple(array for piece in self.pieces for array in piece)

    def with_arrays(self, arrays: Sequence[mx.array]) -> PrefixKVCache:
        """The same with other arrays in place of `arrays()`."""
        other = PrefixKVCache()
        other.pieces, other.read = _paired(arrays), self.read
        return other


class ContinuationKVCache(PrefixKVCache):
    """What a block sees as its cache while answers are read: their prompts' keys and values stand before their own.

    `prompts` were read in buckets; `picks` says for each answer which bucket and which line of it its prompt is.
    `lengths [n]` are the prompts' real lengths, which are the answers' position offset too, and `width` the longest. A
    mask can be had before any prompt is read: models make it from the cache of a block that may be left out.
    """

    def __init__(self, prompts: Sequence[PrefixKVCache], picks: Sequence[tuple[int, int]], lengths: np.ndarray) -> None:
        super().__init__()
        self.prompts = prompts
        self.picks = picks
        self.lengths = lengths
        self.width = max(1, int(lengths.max()))

    @property
    def offset(self) -> int | mx.array:
        """The position of each answer's token that is read next: one number where all are the same, else `[n]`."""
        first = self.lengths + self.read
        return int(first[0]) if (first == first[0]).all() else mx.array(first)

    def joined(self) -> KeysValues:
        """`[n, heads, width + C, size]`: each answer's own, behind its prompt's."""
        keys, values = zip(*(prompt.joined() for prompt in self.prompts), strict=True)
        return _join([(self._picked(keys), self._picked(values)), *self.pieces])

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """`[n, 1, C, width + C]` bool: an answer's token sees its prompt's real tokens and the answer so far."""
        own = self.lengths[:, None] + np.arange(self.read + n)  # [n, C] positions of the answers' tokens
        before = np.broadcast_to(np.arange(self.width), (len(self.lengths), self.width))
        real = np.concatenate([before < self.lengths[:, None], np.ones_like(own, bool)], axis=1)
        seen = causal(own[:, self.read :], np.concatenate([before, own], axis=1), window_size)
        return mx.array(seen & real[:, None, :])[:, None]

    def arrays(self) -> tuple[mx.array, ...]:
        """The prompts' keys and values, then the answers' own."""
        return (*(array for prompt in self.prompts for array in prompt.arrays()), *super().arrays())

    def with_arrays(self, arrays: Sequence[mx.array]) -> ContinuationKVCache:
        """The same with other arrays in place of `arrays()`."""
        prompts, start = [], 0
        for prompt in self.prompts:
            end = start + 2 * len(prompt.pieces)
            prompts.append(prompt.with_arrays(arrays[start:end]))
            start = end
        other = ContinuationKVCache(prompts, self.picks, self.lengths)
        other.pieces, other.read = _paired(arrays[start:]), self.read
        return other

    def _picked(self, buckets: Sequence[mx.array]) -> mx.array:
        """`[n, heads, width, size]` from each bucket's `[R, heads, P, size]`.

        Lines are split and joined, not gathered: the gradient of that is joining and splitting, not scattering.
        """
        lines: dict[tuple[int, int], mx.array] = {}
        for g in {g for g, _ in self.picks}:
            whole = buckets[g]
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


def _join(pieces: Sequence[KeysValues]) -> KeysValues:
    if len(pieces) == 1:
        return pieces[0]
    keys, values = zip(*pieces, strict=True)
    return mx.concatenate(list(keys), axis=2), mx.concatenate(list(values), axis=2)


def _paired(arrays: Sequence[mx.array]) -> list[KeysValues]:
    return list(zip(arrays[::2], arrays[1::2], strict=True))
