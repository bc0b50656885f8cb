"""The command line: each verb parses, calls one library function and renders what it gives."""

from mlx_dpo.cli.app import main

__all__ = ["main"]
