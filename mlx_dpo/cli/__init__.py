"""The command line: one file a verb, which parses, calls one library function and renders what it gives."""

from mlx_dpo.cli.app import main

__all__ = ["main"]
