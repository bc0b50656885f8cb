"""Stand-ins for a model's transformer blocks, for one pass: left out, fed from a cache, noted, or checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_dpo.logprobs.kv_cache import PromptCache

CheckpointFn = Callable[[Callable[..., Any]], Callable[..., Any]]
"""A transform like `mx.checkpoint`: of a function, one that is computed again when its gradient is taken."""


class Layer:
    """A block of the model that answers for it in everything (`use_sliding`, its class, …) but its call."""

    def __init__(self, block: Any) -> None:
        self._block = block

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # some models ask for it
        return type(self._block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self._block(x, *args, **kwargs)


class SkipLayer(Layer):
    """Hands its input on: what it would have computed is in the activation cache."""

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return x


class InjectInput(Layer):
    """Reads `states` instead of its input; what lies below is then never computed, since nothing asks for it."""

    def __init__(self, block: Any, states: mx.array) -> None:
        super().__init__(block)
        self._states = states

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self._block(self._states, *args, **kwargs)


class CaptureInput(Layer):
    """Hands its input to `capture`, then computes."""

    def __init__(self, block: Any, capture: Callable[[mx.array], None]) -> None:
        super().__init__(block)
        self._capture = capture

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self._capture(mx.stop_gradient(x))
        return self._block(x, *args, **kwargs)


class CheckpointedLayer(Layer):
    """Gradient checkpointing: keeps its input instead of its activations, and computes them again (Chen et al. 2016).

    What is computed twice must be a pure function, or the second time differs from the first: what a cache holds goes
    in as arguments and comes out as results, instead of lying in a cache that the block changes.
    """

    def __init__(self, block: Any, checkpoint_fn: CheckpointFn = mx.checkpoint) -> None:
        super().__init__(block)
        self._checkpoint_fn = checkpoint_fn

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        cache = next((c for c in [*args, *kwargs.values()] if isinstance(c, PromptCache)), None)
        before = cache.arrays() if cache is not None else ()
        # a copy that stays at this position: by the time this is computed again the cache itself has read on
        now = cache.with_arrays(before) if cache is not None else None
        parameters = self._block.trainable_parameters()

        def pure(parameters: dict[str, Any], x: mx.array, *before: mx.array) -> Any:
            local = now.with_arrays(before) if now is not None else None
            swap = {id(cache): local}
            self._block.update(parameters)  # as arguments, or mx.checkpoint gives them no gradient
            out = self._block(
                x,
                *[swap.get(id(a), a) for a in args],
                **{name: swap.get(id(a), a) for name, a in kwargs.items()},
            )
            return (out, *local.left()) if local is not None else out

        out = self._checkpoint_fn(pure)(parameters, x, *before)
        self._block.update(parameters)  # the trace left its own arrays in the block
        if cache is not None:
            out, *left = out
            cache.leave(left)
        return out
