"""Trees of arrays (parameters, gradients, optimizer states) by dotted name, and the files of model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_dpo.errors import ModelError


def flat(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree of parameters, gradients or states by dotted name."""
    return dict(tree_flatten(tree))


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file by name. Raises RuntimeError where it cannot be read."""
    return mx.load(str(file))  # type: ignore[return-value]


def read_weights(file: Path, remedy: str = "copy or fetch it again") -> dict[str, mx.array]:
    """The arrays of a file that a user gave, each read when it is first used; ModelError where they cannot be."""
    if not file.is_file():
        raise ModelError(f"no adapter weights: {file} is missing", remedy)
    try:
        return read_arrays(file)
    except RuntimeError as error:
        raise ModelError(f"{file} cannot be read: {error}", remedy) from error


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The settings in a JSON file that a user gave; ModelError with `remedy` where there are none."""
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} is missing or cannot be read: {error.strerror}", remedy) from error
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}", remedy) from error
    return settings
