"""`mlx-dpo fuse`: a folder that answers as model and adapter do."""

from __future__ import annotations

import json
from pathlib import Path

from support.command_line import call


def test_fuse_writes_a_folder_that_answers_alike(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    result = call("fuse", "--model", tiny_llama, "--adapter", run, "--output", fused, "--rows", "4")
    assert result.stdout == f"{fused}\n"
    assert "verified" in result.stderr
    words = ("--max-tokens", "5", "--json", "Hello")
    before = json.loads(call("generate", "--model", tiny_llama, "--adapter", run, *words).stdout)
    assert json.loads(call("generate", "--model", fused, *words).stdout)["text"] == before["text"]
