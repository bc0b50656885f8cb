"""GGUF, the file format of llama.cpp, both ways: files to MLX folders, and models and adapters to files."""

from __future__ import annotations

from collections.abc import Callable

OnTensor = Callable[[int, int], None]
"""Called after each tensor with how many are done and how many there are."""
