"""The command line in this process, and a small file of preferences for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mlx_dpo.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: object, code: int = 0, piped: str | None = None) -> Any:
    """Runs a command line in this process; `stdout` and `stderr` of what comes back are kept apart."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=piped)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def pairs(file: Path, rows: int = 6) -> Path:
    """A small file of preferences, each with a prompt of its own."""
    row = {"prompt": "Question {}?", "chosen": " Yes {}.", "rejected": " No, not {} at all."}
    lines = [json.dumps({key: text.format(n) for key, text in row.items()}) for n in range(rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
