"""`mlx-dpo import`: files that cannot be imported are named."""

from __future__ import annotations

from pathlib import Path

from support.command_line import call


def test_a_gguf_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "no.gguf" in call("import", tmp_path / "no.gguf", "--output", tmp_path / "model", code=1).stderr
