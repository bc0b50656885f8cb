"""Stand-ins for a model's transformer blocks, for one pass: left out, fed from a cache, noted, or checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_dpo.logprobs.kv_cache import PromptCache
from mlx_dpo.models.trees import flat

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
        # arrays that a block gets beside its input may hang on the blocks below: gemma 4's last ones read others' keys
        beside = _arrays((args, kwargs))
        form: list[Any] = []  # of what the block gives, which may be more than an array

        def pure(parameters: dict[str, Any], x: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
            given = iter(arrays[: len(beside)])
            local = now.with_arrays(arrays[len(beside) :]) if now is not None else None

            def swap(leaf: Any) -> Any:
                return next(given) if _has_gradient(leaf) else local if leaf is cache else leaf

            self._block.update(parameters)  # as arguments, or mx.checkpoint gives them no gradient
            positional, named = tree_map(swap, (args, kwargs))
            out = self._block(x, *positional, **named)
            form[:] = [tree_map(lambda leaf: _ARRAY if _has_gradient(leaf) else leaf, out)]
            results, left = _arrays(out), local.left() if local is not None else ()
            # of an array that is a result twice MLX takes the gradient of one of them alone
            twice = {id(array) for array in results}
            return (*results, *(mx.contiguous(array) if id(array) in twice else array for array in left))

        results = iter(self._checkpoint_fn(pure)(parameters, x, *beside, *before))
        self._block.update(parameters)  # the trace left its own arrays in the block
        out = tree_map(lambda leaf: next(results) if leaf is _ARRAY else leaf, form[0])
        if cache is not None:
            cache.leave(list(results))
        return out


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for leaf in flat(tree).values() if _has_gradient(leaf)]


def _has_gradient(leaf: Any) -> bool:
    """Masks and offsets have none."""
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


_ARRAY = object()
"""Stands for an array in the form of what a block gives."""
