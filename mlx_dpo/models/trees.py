"""Trees of arrays (parameters, gradients, optimizer states) by dotted name, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


def flat(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree of parameters, gradients or states by dotted name."""
    return dict(tree_flatten(tree))


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file by name. Raises RuntimeError where it cannot be read."""
    return mx.load(str(file))  # type: ignore[return-value]
