"""A model taken apart through its public interface: embedding, blocks and head, for any architecture of mlx-lm.

Nothing is patched. `ModuleProxy` calls a module's own code with some attributes replaced, so the model's own
soft-capping, embedding scale, masks and tied head stay what they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class ModuleProxy:
    """A module with some attributes replaced, for calls of its own code; the module itself stays untouched.

    With `call`, that is what a call of it does instead.
    """

    def __init__(self, module: Any, call: Callable[..., Any] | None = None, **replaced: Any) -> None:
        self._module = module
        self._call = call
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name in self._replaced:
            return self._replaced[name]
        # methods and properties are bound to the proxy, so that what they look up is found replaced as well
        found = getattr(type(self._module), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        if inspect.isfunction(found):
            return MethodType(found, self)
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is not None:
            return self._call(*args, **kwargs)
        return type(self._module).__call__(self, *args, **kwargs)

    def __getitem__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else self._module[name]

    def __contains__(self, name: str) -> bool:
        return name in self._replaced or name in self._module


class SplitModel:
    """A model whose transformer and head can be called apart, the transformer with other blocks than its own.

    `path` is where the inner transformer, which holds the blocks, hangs in the model: `model`, or
    `language_model.model`.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model = model
        self.path = path
        self.inner: Any = model
        for name in path.split("."):
            self.inner = self.inner[name]

    def hidden(self, tokens: mx.array, cache: Any = None, layers: Sequence[Any] | None = None) -> mx.array:
        """Hidden states before the head, `[B, T, hidden]`, of `tokens [B, T]`; `layers` stand in for the blocks."""
        inner = self.inner if layers is None else ModuleProxy(self.inner, layers=layers)
        found: list[mx.array] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            found.append(inner(*args, **kwargs))
            return found[0]

        # the whole model is called, since what it does before its transformer is its own; MLX is lazy, so the logits
        # that come out are described and never computed
        self._outer(record)(tokens, cache=cache)
        return found[0]

    def logits(self, hidden: mx.array) -> mx.array:
        """The model's own head on `hidden [N, hidden]`: raw logits `[N, vocab]`."""
        tokens = mx.zeros((1, hidden.shape[0]), mx.int32)
        out: mx.array = self._outer(lambda *args, **kwargs: hidden[None])(tokens)
        return out.squeeze(0)  # out[0] would gather a copy of the logits, and scatter their gradient

    def _outer(self, transformer: Callable[..., Any]) -> ModuleProxy:
        """The model with a call of its inner transformer replaced; a tied head still finds the embedding there."""
        *parents, last = self.path.split(".")
        chain = [self.model]
        for name in parents:
            chain.append(chain[-1][name])
        proxy = ModuleProxy(chain[-1], **{last: ModuleProxy(self.inner, transformer)})
        for module, name in zip(reversed(chain[:-1]), reversed(parents), strict=True):
            proxy = ModuleProxy(module, **{name: proxy})
        return proxy


def split_model(model: nn.Module) -> SplitModel | None:
    """`model` taken apart; None where it holds its blocks in a way that leaves no transformer to call alone."""
    blocks = list(model.layers)
    for path, module in model.named_modules():
        held = module.get("layers")
        if path and isinstance(held, list) and held and held[0] is blocks[0]:
            return SplitModel(model, path)
    return None
