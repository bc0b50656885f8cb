"""The `gguf` package of llama.cpp, an optional dependency: imported where it is needed, missed with a word."""

from __future__ import annotations

from types import ModuleType

from mlx_dpo.errors import MlxDpoError


def gguf_package() -> ModuleType:
    """The imported `gguf` package; MlxDpoError with the command that installs it when it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise MlxDpoError(
            f"GGUF files need the `gguf` package, which cannot be imported: {error}.",
            "Install it with: pip install 'mlx-dpo[gguf]'",
        ) from error
    return gguf
