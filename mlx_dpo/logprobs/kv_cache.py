"""What a prompt leaves in each block, computed once for all answers: differentiable stand-ins for mlx-lm's caches.

Causal blocks let a token see only what stands before it, so a prompt's hidden states do not depend on the answer that
follows. Run prompts `[R, P]`, keep what each block keeps of them, which are ordinary differentiable arrays, and run the
answers on top of it. The gradient of K answers flows back into one prompt pass as a sum: the same sum that K separate
passes would have given. Which stand-in a block gets is said by the model's own `make_cache`: attention keeps keys and
values, a recurrence or a short convolution the state behind the last token.

For the same reason a long sequence can be read in steps (chunked prefill), each on top of what those before it left. Of
all pairs of tokens nearly half are masked, and of these only the ones within a step are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache

KeysValues = tuple[mx.array, mx.array]
IGNORE_LENGTHS = ("jamba", "nemotron_h", "olmo_hybrid")
"""Files of mlx-lm whose blocks keep the state behind the padding too. `check.py` finds what else does: such a model
reads whole sequences."""

C = TypeVar("C", bound="PromptCache")


class PromptCache:
    """What a block sees as its cache, and what it leaves there as arrays that a pure function takes and gives.

    The next call reads the columns `step` of the sequences, which the reader says: a block that is left out leaves
    nothing, and its cache still makes masks. A call leaves `results` arrays.
    """

    step = (0, 0)
    results: int

    @property
    def read(self) -> int:
        """How many tokens stand before the next one."""
        return self.step[0]

    def arrays(self) -> tuple[mx.array, ...]:
        """All that the next call reads."""
        raise NotImplementedError

    def with_arrays(self: C, arrays: Sequence[mx.array]) -> C:
        """The same with other arrays in place of `arrays()`."""
        other = copy(self)
        other._take(arrays)
        return other

    def left(self) -> tuple[mx.array, ...]:
        """What the last call left here."""
        raise NotImplementedError

    def leave(self, arrays: Sequence[mx.array]) -> None:
        """Puts here what a call left in a copy."""
        raise NotImplementedError

    def _take(self, arrays: Sequence[mx.array]) -> None:
        raise NotImplementedError


class PrefixKVCache(PromptCache):
    """Keys and values while sequences are read from their beginning, all at once or in steps.

    `pieces` are the keys and values `[R, heads, tokens, size]` of each step.
    """

    results = 2

    def __init__(self) -> None:
        self.pieces: list[KeysValues] = []

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
        return tuple(array for piece in self.pieces for array in piece)

    def left(self) -> tuple[mx.array, ...]:
        return self.pieces[-1]

    def leave(self, arrays: Sequence[mx.array]) -> None:
        self.pieces.append((arrays[0], arrays[1]))

    def _take(self, arrays: Sequence[mx.array]) -> None:
        self.pieces = list(zip(arrays[::2], arrays[1::2], strict=True))


class PrefixStates(PromptCache, ArraysCache):
    """States `[R, …]` behind the last token read: a recurrence's, or a convolution's last inputs.

    A state has no columns, so that padding cannot be cut off it afterwards. Where sequences of unequal `real [R]`
    lengths are continued, blocks are told `lengths` and a mask, as in mlx-lm's batched generation, and leave each state
    as it was at its sequence's end (`pads_states`).
    """

    left_padding = None

    def __init__(self, size: int, real: np.ndarray | None = None) -> None:
        self.cache: list[mx.array | None] = [None] * size
        self.real = real
        self.results = size

    @property
    def lengths(self) -> mx.array | None:
        """`[R]`: how many tokens of each sequence are read now; below 0 where it has ended before.

        mlx-lm counts all that are still to be read, and its Mamba 2 then indexes past the end of what it has.
        """
        start, end = self.step
        return None if self.real is None else mx.array(np.minimum(self.real, end) - start)

    def advance(self, N: int) -> None:
        """Nothing: the reader says where it is."""

    def arrays(self) -> tuple[mx.array, ...]:
        return self.left()

    def left(self) -> tuple[mx.array, ...]:
        return tuple(array for array in self.cache if array is not None)

    def leave(self, arrays: Sequence[mx.array]) -> None:
        self.cache = list(arrays) or [None] * self.results

    def _take(self, arrays: Sequence[mx.array]) -> None:
        self.leave(arrays)


class Continuation(PromptCache):
    """A cache while answers are read: what their prompts left stands before their own.

    `prompts` were read in buckets; `picks` says for each answer which bucket and which line of it its prompt is.
    """

    prompts: Sequence[PromptCache]
    picks: Sequence[tuple[int, int]]

    def arrays(self) -> tuple[mx.array, ...]:
        """What the prompts left, then the answers' own."""
        return (*(array for prompt in self.prompts for array in prompt.arrays()), *super().arrays())

    def _take(self, arrays: Sequence[mx.array]) -> None:
        counts = [len(prompt.arrays()) for prompt in self.prompts]
        *parts, own = _split(arrays, counts)
        self.prompts = [prompt.with_arrays(part) for prompt, part in zip(self.prompts, parts, strict=True)]
        super()._take(own)

    def _lines(self, buckets: Sequence[mx.array]) -> mx.array:
        """`[n, …]`, the answers' prompts, from each bucket's `[R, …]`.

        Lines are split and joined, not gathered: the gradient of that is joining and splitting, not scattering.
        """
        lines = {(g, i): line for g, b in enumerate(buckets) for i, line in enumerate(mx.split(b, b.shape[0]))}
        return mx.concatenate([lines[pick] for pick in self.picks])


class ContinuationKVCache(Continuation, PrefixKVCache):
    """Keys and values of answers, behind those of their prompts.

    `lengths [n]` are the prompts' real lengths, which are the answers' position offset too, and `width` the longest. A
    mask can be had before any prompt is read: models make it from the cache of a block that may be left out.
    """

    prompts: Sequence[PrefixKVCache]

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

    def _picked(self, buckets: Sequence[mx.array]) -> mx.array:
        """`[n, heads, width, size]` from each bucket's `[R, heads, P, size]`."""

        def as_wide(x: mx.array) -> mx.array:
            return mx.pad(x[:, :, : self.width], [(0, 0), (0, 0), (0, max(0, self.width - x.shape[2])), (0, 0)])

        return self._lines([as_wide(bucket) for bucket in buckets])


class ContinuationStates(Continuation, PrefixStates):
    """States of answers, which begin as their prompts' states.

    Answers have no `real` lengths: what is read behind their last token reaches nothing but padding.
    """

    prompts: Sequence[PrefixStates]

    def __init__(self, prompts: Sequence[PrefixStates], picks: Sequence[tuple[int, int]], lengths: np.ndarray) -> None:
        super().__init__(prompts[0].results)
        self.prompts = prompts
        self.picks = picks
        self.begun = lengths > 0

    def __getitem__(self, index: int) -> mx.array | None:
        own = self.cache[index]
        if own is not None:
            return own
        picked = self._lines([prompt[index] for prompt in self.prompts])
        if self.begun.all():
            return picked
        # where no token was read but padding, the state is what every block begins with
        return mx.where(mx.array(self.begun).reshape(-1, *[1] * (picked.ndim - 1)), picked, 0)


class CacheGroup(PromptCache):
    """Several caches of one block, as mlx-lm's `CacheList`: of a block that has attention beside a recurrence."""

    def __init__(self, members: Sequence[PromptCache]) -> None:
        self.members = members
        self.results = sum(member.results for member in members)

    @property
    def step(self) -> tuple[int, int]:
        return self.members[0].step

    @step.setter
    def step(self, columns: tuple[int, int]) -> None:
        for member in self.members:
            member.step = columns

    def __getitem__(self, index: int) -> PromptCache:
        return self.members[index]

    def arrays(self) -> tuple[mx.array, ...]:
        return tuple(array for member in self.members for array in member.arrays())

    def left(self) -> tuple[mx.array, ...]:
        return tuple(array for member in self.members for array in member.left())

    def leave(self, arrays: Sequence[mx.array]) -> None:
        parts = _split(arrays, [member.results for member in self.members])
        for member, part in zip(self.members, parts, strict=False):
            member.leave(part)

    def _take(self, arrays: Sequence[mx.array]) -> None:
        parts = _split(arrays, [len(member.arrays()) for member in self.members])
        self.members = [member.with_arrays(part) for member, part in zip(self.members, parts, strict=False)]


def pads_states(model: nn.Module) -> bool:
    """Whether `model` keeps the states of sequences of unequal length apart from their padding (`lengths`).

    Of the others, prompts are read in buckets of one length.
    """
    return type(model).__module__.rpartition(".")[2] not in IGNORE_LENGTHS


def prefix_caches(model: nn.Module, real: np.ndarray | None = None) -> list[PromptCache]:
    """Stand-ins for `model`'s own caches, for sequences of `real [R]` lengths that are continued."""

    def stand_in(cache: Any) -> PromptCache:
        if isinstance(cache, CacheList):
            return CacheGroup([stand_in(member) for member in cache.caches])
        return PrefixStates(len(cache.cache), real) if isinstance(cache, ArraysCache) else PrefixKVCache()

    return [stand_in(cache) for cache in make_prompt_cache(model)]


def continuation(prompts: Sequence[Any], picks: Sequence[tuple[int, int]], lengths: np.ndarray) -> PromptCache:
    """The cache of answers behind a block's `prompts`, one for each bucket of them (`ContinuationKVCache`)."""
    if isinstance(prompts[0], CacheGroup):
        members = zip(*(group.members for group in prompts), strict=True)
        return CacheGroup([continuation(of_member, picks, lengths) for of_member in members])
    if isinstance(prompts[0], PrefixStates):
        return ContinuationStates(prompts, picks, lengths)
    return ContinuationKVCache(prompts, picks, lengths)


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


def _split(arrays: Sequence[mx.array], counts: Sequence[int]) -> list[Sequence[mx.array]]:
    """So many of them for each count, and at last the rest."""
    ends = [0, *np.cumsum(counts).tolist(), len(arrays)]
    return [arrays[start:end] for start, end in pairwise(ends)]
