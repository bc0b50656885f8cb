"""Stand-ins for a model's blocks, for one pass: left out, fed, listened to, or computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_dpo.logprobs.kv_cache import PromptCache

Twice = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A transform of functions, such as `mx.checkpoint`."""


class Block:
    """A block of the model that answers for it in everything (`use_sliding`, `layer_type`, …) but its call."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self._block(x, *args, **kwargs)


class Skipped(Block):
    """Hands its input on: what it would have computed is known already."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return x


class Fed(Block):
    """Reads `states` instead of what the blocks below would have given; those are then never computed."""

    def __init__(self, block: Any, states: mx.array) -> None:
        super().__init__(block)
        self._states = states

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self._block(self._states, *args, **kwargs)


class Heard(Block):
    """Hands its input to `listen`, then computes."""

    def __init__(self, block: Any, listen: Callable[[mx.array], None]) -> None:
        super().__init__(block)
        self._listen = listen

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self._listen(mx.stop_gradient(x))
        return self._block(x, *args, **kwargs)


class Checkpointed(Block):
    """Keeps its input instead of its activations, and computes them again for the backward pass (Chen et al. 2016).

    What is computed twice must be a pure function, or the second time differs from the first: keys and values go in as
    arguments and come out as results, instead of lying in a cache that the block changes.
    `twice` makes of a function one that is computed again when its gradient is taken.
    """

    def __init__(self, block: Any, twice: Twice = mx.checkpoint) -> None:
        super().__init__(block)
        self._twice = twice

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        cache = next((c for c in [*args, *kwargs.values()] if isinstance(c, PromptCache)), None)
        before = cache.arrays() if cache is not None else ()
        now = cache.reading(before) if cache is not None else None  # the cache reads on before this is computed again
        parameters = self._block.trainable_parameters()

        def pure(parameters: dict[str, Any], x: mx.array, *before: mx.array) -> Any:
            local = now.reading(before) if now is not None else None
            swap = {id(cache): local}
            self._block.update(parameters)
            out = self._block(
                x,
                *[swap.get(id(a), a) for a in args],
                **{name: swap.get(id(a), a) for name, a in kwargs.items()},
            )
            return (out, *local.pieces[-1]) if local is not None else out

        out = self._twice(pure)(parameters, x, *before)
        self._block.update(parameters)
        if cache is not None:
            out, keys, values = out
            cache.pieces.append((keys, values))
        return out
