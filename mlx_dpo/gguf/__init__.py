"""GGUF, the file format of llama.cpp, both ways: files to MLX folders, and models and adapters to files."""

from __future__ import annotations
